#!/usr/bin/env python3
"""vhost-user: messages, as they should be and otherwise. A connection may end; the daemon and other exports do not."""

import os
import pathlib
import random
import socket
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import MIB, require_gantry, wait_for
from vhost_case import VhostCase
from vhost_disk import OK, OUT
from vhost_front import (F_EVENT_IDX, F_INDIRECT, F_LOG_ALL, F_PACKED, F_PROTOCOL, F_VERSION_1, NEED_REPLY, NO_FD, P_WANTED, REPLY,
                         VERSION, Closed, Connection, Msg, Refused, Region)

ACK = VERSION | NEED_REPLY


class Protocol(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("the reference ends itself, or waits, where messages are wrong")
        self.serve(num_queues=3)

    def ready(self):
        """A connection that acknowledges everything."""
        front = self.connection()
        front.ask_u64(Msg.GET_FEATURES)
        protocol = front.ask_u64(Msg.GET_PROTOCOL_FEATURES)
        front.tell_u64(Msg.SET_PROTOCOL_FEATURES, protocol & P_WANTED)
        front.reply_ack = True
        front.tell(Msg.SET_OWNER)
        return front

    def alive(self):
        def works():
            disk = self.disk()
            self.works(disk)
            disk.close()
            return True
        works()

    def fatal(self, request, payload=b"", fds=(), flags=VERSION, size=None):
        """The message ends the connection, or is answered with an error; it never succeeds."""
        front = self.ready()
        try:
            front.send(request, payload, fds, flags, size)
            _, _, answer, _ = front.receive()
            self.assertEqual(len(answer), 8, answer)
            self.assertNotEqual(struct.unpack("=Q", answer)[0], 0, (request, payload))
        except Closed:
            pass
        front.close()


class Talk(Protocol):
    def test_features(self):
        front = self.connection()
        features = front.ask_u64(Msg.GET_FEATURES)
        for name, bits in {"ring": F_EVENT_IDX | F_INDIRECT | F_PACKED | F_VERSION_1, "transport": F_PROTOCOL | F_LOG_ALL,
                           "block": sum(1 << n for n in (2, 6, 9, 10, 11, 12, 13, 14))}.items():
            self.assertEqual(features & bits, bits, name)
        for bit in (1, 4, 5, 7, 15, 16, 17, 33, 35, 40):
            self.assertFalse(features & 1 << bit, bit)
        self.assertEqual(front.ask_u64(Msg.GET_PROTOCOL_FEATURES), P_WANTED)

    def test_bits_that_were_not_offered_are_refused(self):
        front = self.ready()
        offered = front.ask_u64(Msg.GET_FEATURES)
        for bit in (n for n in range(64) if not offered & 1 << n):
            with self.assertRaises(Refused, msg=bit):
                front.tell_u64(Msg.SET_FEATURES, F_VERSION_1 | F_PROTOCOL | 1 << bit)
        for bit in (n for n in range(64) if not P_WANTED & 1 << n):
            with self.assertRaises(Refused, msg=bit):
                front.tell_u64(Msg.SET_PROTOCOL_FEATURES, 1 << 3 | 1 << bit)
        with self.assertRaises(Refused):
            front.tell_u64(Msg.SET_FEATURES, offered & ~F_VERSION_1 & ~F_LOG_ALL)
        front.tell_u64(Msg.SET_FEATURES, offered & ~F_LOG_ALL)
        front.close()
        self.alive()

    def test_limits(self):
        front = self.ready()
        self.assertGreaterEqual(front.ask_u64(Msg.GET_QUEUE_NUM), 64)
        self.assertEqual(front.ask_u64(Msg.GET_MAX_MEM_SLOTS), 509)

    def test_acknowledgements(self):
        front = self.ready()
        self.assertEqual(front.ask_u64(Msg.SET_OWNER, flags=ACK), 0)
        # One reply, its own, to what has one.
        self.assertEqual(front.ask_u64(Msg.GET_PROTOCOL_FEATURES, flags=ACK), P_WANTED)
        front.synchronize()
        # None without the flag.
        front.send(Msg.SET_OWNER)
        front.send(Msg.RESET_OWNER)
        front.synchronize()

    def test_requests_that_nobody_knows(self):
        for request in (0, Msg.SEND_RARP, Msg.NET_SET_MTU, Msg.SET_VRING_ENDIAN, Msg.CREATE_CRYPTO_SESSION, Msg.POSTCOPY_LISTEN,
                        Msg.GPU_SET_SOCKET, Msg.GET_SHARED_OBJECT, 44, 99, 0xFFFFFFFF):
            with self.subTest(request=request):
                self.fatal(request, b"", flags=ACK)
                self.fatal(request, bytes(8), flags=ACK)
        self.alive()

    def test_messages_in_pieces(self):
        """Every byte comes alone, in one connection after another."""
        region = Region(0, 1 * MIB)
        messages = [(Msg.GET_FEATURES, b"", []), (Msg.GET_PROTOCOL_FEATURES, b"", []),
                    (Msg.SET_PROTOCOL_FEATURES, struct.pack("=Q", P_WANTED), []), (Msg.SET_OWNER, b"", []),
                    (Msg.SET_MEM_TABLE, struct.pack("=II", 1, 0) + region.wire(), [region.fd]),
                    (Msg.GET_CONFIG, struct.pack("=III", 0, 60, 0) + bytes(60), [])]
        front = self.connection()
        for request, payload, fds in messages:
            data = struct.pack("=III", request, VERSION, len(payload)) + payload
            front.raw(data[:1], fds)
            for at in range(1, len(data)):
                front.raw(data[at:at + 1])
            if request.name.startswith("GET"):
                front.receive()
        front.close()
        for at in range(1, 12 + 8):
            front = self.connection()
            data = struct.pack("=IIIQ", Msg.SET_PROTOCOL_FEATURES, VERSION, 8, P_WANTED)
            front.raw(data[:at])
            front.raw(data[at:])
            front.synchronize()
            front.close()

    def test_several_messages_at_once(self):
        front = self.connection()
        front.raw(struct.pack("=III", Msg.GET_FEATURES, VERSION, 0) * 50 + struct.pack("=IIIQ", Msg.SET_PROTOCOL_FEATURES, VERSION, 8,
                  P_WANTED) + struct.pack("=III", Msg.SET_OWNER, ACK, 0) + struct.pack("=III", Msg.GET_QUEUE_NUM, VERSION, 0))
        requests = [front.receive()[0] for _ in range(52)]
        self.assertEqual(requests, [Msg.GET_FEATURES] * 50 + [Msg.SET_OWNER, Msg.GET_QUEUE_NUM])

    def test_front_ends_that_stop_in_the_middle(self):
        for data in (b"\1", struct.pack("=III", Msg.SET_FEATURES, VERSION, 8), struct.pack("=IIII", Msg.SET_FEATURES, VERSION, 8, 0)):
            front = self.connection()
            front.raw(data)
            front.close()
        self.alive()

    def test_a_front_end_that_reads_nothing(self):
        front = self.connection()
        front.socket.setblocking(False)
        try:
            for _ in range(200000):
                front.raw(struct.pack("=III", Msg.GET_CONFIG, VERSION, 268) + struct.pack("=III", 0, 256, 0) + bytes(256))
        except (BlockingIOError, Closed):
            pass
        self.server.qmp.cmd("query-block-exports")  # the daemon does not wait for it
        front.close()
        self.alive()


class Wrong(Protocol):
    def test_headers(self):
        for flags, size in ((0, 0), (2, 0), (3, 0), (VERSION | REPLY, 0), (VERSION, 4097), (VERSION, 1 << 31), (VERSION, 0xFFFFFFFF)):
            with self.subTest(flags=flags, size=size):
                front = self.connection()
                front.send(Msg.GET_FEATURES, flags=flags, size=size)
                self.assertTrue(front.ended())
                front.close()
        self.alive()

    def test_sizes(self):
        region = Region(0, 1 * MIB)
        for request, size, fds in (
                (Msg.GET_FEATURES, 0, 0), (Msg.SET_FEATURES, 8, 0), (Msg.SET_OWNER, 0, 0), (Msg.SET_LOG_BASE, 16, 1),
                (Msg.SET_VRING_NUM, 8, 0), (Msg.SET_VRING_ADDR, 40, 0), (Msg.SET_VRING_BASE, 8, 0), (Msg.GET_VRING_BASE, 8, 0),
                (Msg.SET_VRING_ENABLE, 8, 0), (Msg.SET_PROTOCOL_FEATURES, 8, 0), (Msg.ADD_MEM_REG, 40, 1), (Msg.REM_MEM_REG, 40, 0),
                (Msg.SET_STATUS, 8, 0), (Msg.GET_STATUS, 0, 0), (Msg.RESET_DEVICE, 0, 0), (Msg.SET_VRING_KICK, 8, 0)):
            for wrong in {0, 1, size - 1, size + 1, size + 8, 2 * size, 4096} - {size, -1}:
                with self.subTest(request=request, size=wrong):
                    self.fatal(request, bytes(wrong), [region.fd] * fds, ACK)
        self.alive()

    def test_memory_tables_of_wrong_sizes(self):
        region = Region(0, 1 * MIB)
        for count, regions, fds in ((2, 1, 1), (1, 1, 0), (1, 1, 2), (2, 2, 1), (9, 9, 8), (0xFFFFFFFF, 1, 1), (1 << 31, 8, 8),
                                    (1, 0, 1), (8, 1, 1)):
            with self.subTest(count=count, regions=regions, fds=fds):
                self.fatal(Msg.SET_MEM_TABLE, struct.pack("=II", count, 0) + region.wire() * regions, [region.fd] * fds, ACK)
        self.alive()

    def test_configuration_requests_of_wrong_sizes(self):
        for payload in (struct.pack("=III", 0, 60, 0), struct.pack("=III", 0, 60, 0) + bytes(59),
                        struct.pack("=III", 0, 0xFFFFFFFF, 0) + bytes(60), struct.pack("=III", 0, 257, 0) + bytes(257), b"", b"123"):
            front = self.ready()
            try:
                self.assertEqual(front.ask(Msg.GET_CONFIG, payload)[0], b"")
            except Closed:
                pass
            front.close()
        self.alive()

    def test_descriptors_where_there_should_be_none_or_others(self):
        null = os.open("/dev/null", os.O_RDWR)
        pipe = os.pipe()
        memory = os.memfd_create("m")
        fds = os.listdir(f"/proc/{self.server.process.pid}/fd")
        for request, payload, sent in (
                (Msg.SET_VRING_KICK, struct.pack("=Q", 0), []), (Msg.SET_VRING_KICK, struct.pack("=Q", 0), [null]),
                (Msg.SET_VRING_KICK, struct.pack("=Q", 0), [pipe[0]]), (Msg.SET_VRING_CALL, struct.pack("=Q", 0), [pipe[1]]),
                (Msg.SET_VRING_CALL, struct.pack("=Q", 0), [null, null]), (Msg.SET_VRING_ERR, struct.pack("=Q", 0), [memory]),
                (Msg.SET_VRING_KICK, struct.pack("=Q", 200), [os.eventfd(0)]),
                (Msg.SET_LOG_BASE, struct.pack("=QQ", 4096, 0), [null]),
                (Msg.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 4096, 0, 1, 128), [null]),
                (Msg.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 4096, 0, 1, 128), [memory]),
                (Msg.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 0, 4096, 0, 0), [null]),
                (Msg.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 0, 4096, 0, 0), [memory])):
            with self.subTest(request=request, sent=sent):
                self.fatal(request, payload, sent, ACK)
        front = self.ready()
        try:
            front.send(Msg.SET_OWNER, fds=[null] * 8)
            front.send(Msg.GET_FEATURES, fds=[null] * 30)
            front.receive()
        except Closed:
            pass
        front.close()
        for fd in (null, memory, *pipe):
            os.close(fd)
        # None of them is kept.
        wait_for(lambda: len(os.listdir(f"/proc/{self.server.process.pid}/fd")) <= len(fds), "descriptors to be closed")
        self.alive()

    def test_rings(self):
        for request, index, number in (
                (Msg.SET_VRING_NUM, 0, 0), (Msg.SET_VRING_NUM, 0, 1), (Msg.SET_VRING_NUM, 0, 2048), (Msg.SET_VRING_NUM, 0, 0xFFFFFFFF),
                (Msg.SET_VRING_NUM, 64, 128), (Msg.SET_VRING_NUM, 0xFFFFFFFF, 128), (Msg.SET_VRING_BASE, 255, 0),
                (Msg.SET_VRING_BASE, 0x80000000, 0), (Msg.SET_VRING_ENABLE, 300, 1), (Msg.SET_VRING_ENABLE, 0, 2)):
            with self.subTest(request=request.name, index=index, number=number):
                self.fatal(request, struct.pack("=II", index, number), flags=ACK)
        front = self.ready()
        try:
            answer, _ = front.ask(Msg.GET_VRING_BASE, struct.pack("=II", 1000, 0))
            self.assertNotEqual(len(answer), 8)
        except Closed:
            pass
        front.close()
        self.alive()

    def test_random_messages(self):
        rng = random.Random(11)
        memory = Region(0, 64 * 1024)
        for _ in range(150):
            front = self.connection()
            try:
                for _ in range(20):
                    payload = rng.choice((b"", rng.randbytes(rng.choice((1, 8, 16, 20, 24, 40, 64))), bytes(rng.choice((8, 16, 24, 40))),
                                          struct.pack("=II", rng.randrange(3), rng.randrange(300))))
                    fds = [rng.choice((memory.fd, self.eventfd()))] * rng.choice((0, 0, 1, 2))
                    front.send(rng.randrange(46), payload, fds, rng.choice((VERSION, ACK)))
            except Closed:
                pass
            front.close()
        self.alive()

    def eventfd(self):
        if not hasattr(self, "spare"):
            self.spare = os.eventfd(0)
            self.addCleanup(os.close, self.spare)
        return self.spare


class Connections(Protocol):
    def test_a_second_front_end_is_sent_away(self):
        disk = self.disk()
        for _ in range(3):
            other = self.connection()
            self.assertTrue(other.ended())
            other.close()
        self.works(disk)
        disk.close()
        self.alive()

    def test_fifty_front_ends_one_after_another(self):
        disk = self.disk(open=False, queues=2)
        fds = None
        for _ in range(50):
            disk.open()
            self.works(disk)
            disk.finish(disk.submit(OUT, 0, b"q" * 512, queue=1))
            disk.stop()
            disk.disconnect()
            fds = fds or len(os.listdir(f"/proc/{self.server.process.pid}/fd"))
        wait_for(lambda: len(os.listdir(f"/proc/{self.server.process.pid}/fd")) <= fds, "descriptors to be closed")

    def test_front_ends_that_go_without_a_word(self):
        disk = self.disk(open=False)
        for _ in range(50):
            disk.open()
            self.works(disk)
            disk.disconnect()

    def test_a_first_connection_that_asks_only(self):
        front = self.ready()
        capacity = struct.unpack("=Q", front.get_config(0, 8))[0]
        front.close()
        disk = self.disk()
        self.assertEqual(disk.capacity, capacity)
        self.works(disk)

    def test_minimal_front_end(self):
        """No protocol features: rings are enabled from the start."""
        disk = self.disk(protocol=None)
        self.assertFalse(disk.chosen & F_PROTOCOL)
        self.works(disk)
        disk.stop()
        disk.close()
        self.alive()

    def test_sockets_that_are_handed_over(self):
        listening, (ours, theirs) = socket.socket(socket.AF_UNIX), socket.socketpair()
        listening.bind(self.path("given.sock"))
        listening.listen()
        for fd in (listening, theirs):
            os.set_inheritable(fd.fileno(), True)
        self.server.stop()
        server = self.daemon(*self.node_option("a"), *self.node_option("b"),
                             "--export", f"type=vhost-user-blk,id=a,node-name=a,addr.type=fd,addr.str={listening.fileno()},writable=on",
                             "--export", f"type=vhost-user-blk,id=b,node-name=b,addr.type=fd,addr.str={theirs.fileno()},writable=on",
                             pass_fds=[listening.fileno(), theirs.fileno()])
        listening.close()
        theirs.close()
        self.works(self.disk("given"))
        disk = self.disk("b", open=False)
        disk.connect(connected=ours).start()
        self.works(disk)
        disk.close()
        self.assertEqual({e["id"] for e in server.qmp.cmd("query-block-exports")}, {"a", "b"})

    def test_removal(self):
        disk = self.disk()
        kind, text = self.server.qmp.error("block-export-del", id="disk")
        self.assertEqual(kind, "GenericError")
        self.assertIn("still in use", text)
        self.works(disk)
        disk.close()
        self.server.qmp.delete_export("disk")
        self.assertFalse(os.path.exists(self.path("disk.sock")))
        self.server.qmp.cmd("block-export-add", {"type": "vhost-user-blk", "id": "disk", "node-name": "disk", "writable": True,
                                                 "addr": {"type": "unix", "path": self.path("disk.sock")}})
        disk = self.disk()
        self.works(disk)
        self.server.qmp.cmd("block-export-del", id="disk", mode="hard")
        self.assertTrue(disk.connection.ended())
        self.server.qmp.event("BLOCK_EXPORT_DELETED", id="disk")
        self.server.qmp.cmd("blockdev-del", node_name="disk")


if __name__ == "__main__":
    gantry_test.main()
