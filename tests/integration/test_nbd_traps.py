#!/usr/bin/python3
"""What other NBD servers fell into, one test per class: the CVEs of nbd-server, qemu and nbdkit, and traps without a number. What
concerns TLS is in test_nbd_tls.py. After each test the daemon serves others and ends cleanly."""
# One configuration: the parsers are the same on every back end, and stress has its own tests.

import os
import pathlib
import signal
import socket
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
import nbd_raw as nbd
from gantry_test import GIB, IS_GANTRY, KIB, MIB
from nbd_case import RawCase

SIZE = 1 * MIB + 1000  # the last block is not whole


class Traps(RawCase):
    def setUp(self):
        super().setUp()
        self.image = self.raw_image("disk.raw", SIZE, gt.text_block)
        self.socket = self.path("nbd.sock")
        self.server = self.daemon(
            "--blockdev", f"driver=file,node-name=disk,filename={self.image},discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0",
            "--export", "type=nbd,id=rw,node-name=disk,name=disk,writable=on",
            "--export", "type=nbd,id=ro,node-name=disk,name=ro")
        self.q = self.server.qmp

    def tearDown(self):
        if self.server.process.poll() is None and os.path.exists(self.socket):
            client = self.entered()
            self.assertEqual(len(client.read(0, 4096)), 4096)
            client.close()
        super().tearDown()


class NbdServer(Traps):
    def test_cve_2005_3534_and_2011_0530_a_request_longer_than_any_buffer(self):
        before = self.contents()
        for command, length in ((nbd.READ, 0xFFFFFFFF), (nbd.WRITE, 0xFFFFFFFF), (nbd.WRITE, 0x80000000), (nbd.READ, 0x80000000)):
            client = self.entered()
            client.send(nbd.request(command, 0, length))
            if command == nbd.READ:
                self.assertEqual(client.reply(1)[1], nbd.EINVAL)
            else:
                self.assertTrue(client.ends())
        self.assertEqual(self.contents(), before)

    def test_cve_2011_1925_and_2013_7441_a_failed_negotiation_concerns_one_client(self):
        witness = self.entered()
        for talk in (struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, 7) + b"nothing", b"\xff" * 16,
                     struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_ABORT, 0)):
            client = self.greeted()
            client.send(talk)
            self.assertTrue(client.ends())
            self.assertEqual(len(witness.read(0, 512)), 512)

    def test_cve_2015_0847_signals_in_the_midst_of_connections(self):
        for i in range(50):
            client = self.raw()
            self.server.process.send_signal(signal.SIGCHLD if i % 2 else signal.SIGPIPE)
            client.enter("disk")
            self.server.process.send_signal(signal.SIGWINCH)
            self.assertEqual(len(client.read(0, 4096)), 4096)
            client.close()

    def test_cve_2022_26495_name_lengths_that_wrap(self):
        client = self.greeted()
        for length in (0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFA, 0x80000000, 7, 6):
            payload = struct.pack(">I", length) + b"disk" + struct.pack(">H", 0)
            for option in (nbd.OPT_GO, nbd.OPT_INFO):
                self.assertEqual(client.final(option, payload), nbd.INVALID)
            for option in (nbd.OPT_LIST_META, nbd.OPT_SET_META):
                self.assertEqual(client.final(option, struct.pack(">I", length) + b"disk" + bytes(4)), nbd.INVALID)
                self.assertEqual(client.final(option, struct.pack(">I", 4) + b"disk" + struct.pack(">II", 1, length) + b"q"),
                                 nbd.INVALID)
                self.assertEqual(client.final(option, struct.pack(">I", 4) + b"disk" + struct.pack(">I", length)), nbd.INVALID)
        client.go("disk")

    def test_cve_2022_26496_and_2017_15118_names_as_long_as_they_may_be(self):
        client = self.greeted()
        for name in ("x" * 257, "x" * 4096, "ü" * 2048):
            self.assertEqual(client.final(nbd.OPT_GO, nbd.info(name)), nbd.UNKNOWN)
            # The reference wants structured replies first.
            self.assertIn(client.final(nbd.OPT_LIST_META, nbd.contexts(name.encode().decode("latin-1"))) & 0x80000000, (0x80000000,))
        for name in ("x" * 4097, "x" * 60000):
            self.assertIn(client.final(nbd.OPT_GO, nbd.info(name)), (nbd.INVALID, nbd.TOO_BIG))
        client.go("disk")


class Qemu(Traps):
    def test_cve_2017_7539_a_client_that_vanishes_during_its_requests(self):
        for i in range(20):
            client = self.entered(structured=i % 2 == 1)
            client.send(b"".join(nbd.request(nbd.READ, n * 1000, 200_000, cookie=n) for n in range(4))
                        + nbd.request(nbd.WRITE, 0, 100_000, data=bytes(50_000)))
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    def test_cve_2017_9524_a_client_that_leaves_before_it_negotiates(self):
        for sent in (b"", b"\0", b"\0\0\0", b"\0\0\0\3", b"\0\0\0\3" + struct.pack(">Q", nbd.IHAVEOPT)):
            client = self.raw()
            client.send(sent)
            client.close()

    def test_cve_2017_10664_replies_to_nobody(self):
        for _ in range(20):
            client = self.entered()
            client.send(nbd.request(nbd.READ, 0, MIB) * 8)
            client.socket.shutdown(socket.SHUT_RD)
            client.close()

    def test_cve_2017_15119_gigabytes_of_option_payload(self):
        client = self.greeted()
        client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_GO, 0xFFFFFFFF))
        self.assertTrue(client.ends())
        # Many that are just short enough to be skipped cost no memory.
        client = self.greeted()
        for _ in range(4):
            self.assertIn(client.final(nbd.OPT_LIST_META, bytes(2 * MIB)), (nbd.TOO_BIG, nbd.INVALID)) if IS_GANTRY else None

    def test_cve_2020_10761_error_texts_have_room(self):
        client = self.greeted()
        for name in (b"n" * 4096, b"\xff" * 4096, b"\0" * 4096, "\U0001F600".encode() * 1024):
            kind, text = client.option(nbd.OPT_GO, nbd.info(name))[-1]
            self.assertIn(kind, (nbd.UNKNOWN, nbd.INVALID))
            self.assertLessEqual(len(text), 4096)
            if IS_GANTRY:
                text.decode()

    def test_cve_2024_7409_the_server_stops_while_clients_negotiate(self):
        gt.require_gantry("the installed reference crashes")
        clients = [self.raw() for _ in range(50)]
        for i, client in enumerate(clients):
            if i % 2:
                client.greet()
            if i % 3 == 0:
                client.send(b"NBD")
        self.q.cmd("nbd-server-stop")
        for client in clients:
            self.assertTrue(client.ends())
        self.assertEqual(self.q.cmd("query-block-exports"), [])


class Nbdkit(Traps):
    def test_cve_2019_14850_connecting_uses_nothing_of_the_disk(self):
        gt.require_gantry("looks at gantryd's own counters")
        before = sorted(os.readlink(f"/proc/{self.server.process.pid}/fd/{fd}") for fd in self.descriptors())
        clients = [self.greeted() for _ in range(20)]
        after = [os.readlink(f"/proc/{self.server.process.pid}/fd/{fd}") for fd in self.descriptors()]
        self.assertEqual(before.count(self.image), after.count(self.image))
        self.assertEqual(len(clients), 20)

    def descriptors(self):
        return os.listdir(f"/proc/{self.server.process.pid}/fd")

    def test_cve_2019_14851_info_before_go_in_any_order(self):
        client = self.greeted()
        for _ in range(3):
            self.assertEqual(client.final(nbd.OPT_INFO, nbd.info("disk", 3)), nbd.ACK)
            self.assertEqual(client.final(nbd.OPT_INFO, nbd.info("nothing", 3)), nbd.UNKNOWN)
            self.assertEqual(client.final(nbd.OPT_INFO, nbd.info("ro", 3)), nbd.ACK)
            self.assertEqual(client.final(nbd.OPT_GO, nbd.info("nothing")), nbd.UNKNOWN)
        client.go("disk")
        self.assertEqual(client.ask(nbd.WRITE, 0, 512, data=bytes(512)), 0)

    def test_cve_2025_47711_and_47712_status_of_more_than_4_gib(self):
        huge = self.raw_image("huge.raw", 20 * GIB)
        self.q.cmd("blockdev-add", {"driver": "file", "node-name": "huge", "filename": huge})
        self.q.cmd("block-export-add", {"type": "nbd", "id": "huge", "node-name": "huge"})
        client = self.entered("huge", structured=True, status=True)
        for offset, length in ((0, 0xFFFFFFFF), (0, 0xFFFFFE00), (20 * GIB - 0xFFFFFE00, 0xFFFFFE00), (1, 0xFFFFFFFE)):
            if IS_GANTRY or not (offset | length) & 511:
                for flags in (0, nbd.REQ_ONE):
                    extents = client.status(offset, length, flags)
                    self.assertTrue(all(kind == 3 for _, kind in extents))
                    self.assertLess(sum(size for size, _ in extents[:-1]), length)


class Unnumbered(Traps):
    def test_bytes_left_over_after_the_last_query(self):
        gt.require_gantry("the reference takes them as nothing")
        client = self.greeted()
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
        for rest in (b"x", bytes(4), bytes(100)):
            for option in (nbd.OPT_LIST_META, nbd.OPT_SET_META):
                self.assertEqual(client.final(option, nbd.contexts("disk", "base:allocation") + rest), nbd.INVALID)
        client.go("disk")
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, 512), nbd.EINVAL)

    def test_replies_on_a_connection_that_another_request_ended(self):
        for _ in range(10):
            client = self.entered()
            client.send(nbd.request(nbd.READ, 0, 500_000) * 3 + nbd.request(nbd.FLUSH) + b"\xde\xad\xbe\xef" * 7)
            self.assertTrue(client.ends())

    def test_fast_zero_where_it_is_not_offered(self):
        self.assertEqual(self.entered("ro").ask(nbd.WRITE_ZEROES, 0, 512, nbd.FAST_ZERO), nbd.EINVAL)

    def test_disconnecting_right_behind_requests(self):
        gt.require_gantry("the reference drops what DISC follows closely")
        for _ in range(20):
            client = self.entered()
            client.send(nbd.request(nbd.READ, 0, 300_000) + nbd.request(nbd.WRITE, 4096, 5000, cookie=2, data=b"z" * 5000)
                        + nbd.request(nbd.DISC))
            data = b""
            while part := client.socket.recv(1 << 20):
                data += part
            self.assertEqual(len(data), 16 + 300_000 + 16)
        self.assertEqual(self.contents()[4096:9096], b"z" * 5000)

    def test_overlapping_requests_in_flight(self):
        before = self.contents()
        client = self.entered()
        for round_ in range(3):
            for i in range(60):
                size = (4096, 32 * KIB, 40 * KIB, 200 * KIB)[i % 4]
                client.send(nbd.request(nbd.WRITE, 64 * KIB, size, cookie=i, data=bytes([100 + i]) * size))
                if i % 5 == 0:
                    client.send(nbd.request(nbd.WRITE_ZEROES, 64 * KIB, 16 * KIB, cookie=1000 + i))
            for _ in range(60 + 12):
                self.assertEqual(client.reply()[1], 0)
            now = client.read(0, SIZE if IS_GANTRY else SIZE // 512 * 512)
            self.assertEqual(now[: 64 * KIB], before[: 64 * KIB])
            self.assertEqual(now[264 * KIB :], before[264 * KIB : len(now)])
            for at in range(64 * KIB, 264 * KIB, 4096):
                block = now[at : at + 4096]
                self.assertEqual(block, block[:1] * 4096, at)

    def test_info_and_go_tell_one_size(self):
        client = self.greeted()
        (about,) = (payload for kind, payload in client.option(nbd.OPT_INFO, nbd.info("disk", 0, 3))
                    if kind == nbd.INFO and payload[:2] == b"\0\0")
        size = struct.unpack(">Q", about[2:10])[0]
        self.assertEqual(size, client.go("disk", 0, 3)[0])
        self.assertEqual(size, SIZE if IS_GANTRY else -(-SIZE // 512) * 512)

    def test_unknown_client_flags(self):
        gt.require_gantry("the reference lets some pass")
        for flags in (4, 7, 1 << 31, 0xFFFFFFFF):
            client = self.raw()
            client.greet(flags)
            self.assertTrue(client.ends())

    def test_each_option_is_answered_once(self):
        client = self.greeted()
        for number, payload in ((nbd.OPT_STRUCTURED, b"x"), (nbd.OPT_LIST, b"x"), (nbd.OPT_GO, b""), (nbd.OPT_SET_META, b""),
                                (nbd.OPT_PEEK, b"x"), (77, bytes(1000)), (nbd.OPT_INFO, nbd.info("nothing"))):
            self.assertTrue(client.option(number, payload)[-1][0] & 0x80000000)
            client.send(struct.pack(">QII", nbd.IHAVEOPT, 4711, 0))
            self.assertEqual(client.replies(4711)[-1][0], nbd.UNSUP)

    def test_names_that_are_no_text(self):
        gt.require_gantry("the reference quotes them as they are")
        client = self.greeted()
        for name in (b"\xff\xfe", b"\x1b[2J", b"a\0b", b"\xc3"):
            kind, text = client.option(nbd.OPT_GO, nbd.info(name))[-1]
            self.assertEqual(kind, nbd.UNKNOWN)
            self.assertTrue(text.decode("ascii").isprintable(), text)

    def test_zeroing_a_whole_export_reaches_its_last_byte(self):
        client = self.entered()
        size = SIZE if IS_GANTRY else SIZE // 512 * 512
        for flags in (0, nbd.NO_HOLE):
            self.assertEqual(client.ask(nbd.WRITE, size - 5000, 5000, data=b"\xaa" * 5000), 0)
            self.assertEqual(client.ask(nbd.WRITE_ZEROES, 0, size, flags), 0)
            self.assertEqual(client.read(size - 5000, 5000), bytes(5000))
        self.assertEqual(client.ask(nbd.FLUSH), 0)
        self.assertEqual(self.contents()[:size], bytes(size))


if __name__ == "__main__":
    gt.main()
