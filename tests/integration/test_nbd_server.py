#!/usr/bin/env python3
"""The NBD server under management: exports that come and go, limits, addresses, shutdown."""

import os
import pathlib
import random
import resource
import signal
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
from gantry_test import KIB, MIB, Case, free_port, require_gantry, text_block, wait_for
from nbd_raw import Raw

SIZE = 4 * MIB


class Server(Case):
    def start(self, *more, **options):
        self.image = self.raw_image("disk.raw", SIZE, text_block)
        self.server = self.daemon("--blockdev", f"driver=file,node-name=disk,filename={self.image},discard=unmap", *more, **options)
        self.qmp = self.server.qmp
        return self.qmp

    def serve(self, *more, **server):
        self.start(*more)
        self.socket = self.start_nbd(self.qmp, **server)
        self.export()

    def export(self, id="e", **more):
        self.qmp.cmd("block-export-add", {"type": "nbd", "id": id, "node-name": "disk", **more})

    def raw(self):
        client = Raw(self.socket)
        self.addCleanup(client.close)
        return client

    def entered(self, name="disk", **options):
        client = self.raw()
        client.enter(name, **options)
        return client

    def exports(self):
        return {e["id"]: e for e in self.qmp.cmd("query-block-exports")}


class Exports(Server):
    def test_texts_of_refusals(self):
        self.start()
        add = lambda **options: self.qmp.error("block-export-add", {"type": "nbd", "node-name": "disk", **options})[1]
        self.assertEqual(add(id="e"), "NBD server not running")
        self.start_nbd(self.qmp)
        path = self.path("nbd.sock")
        self.assertEqual(self.qmp.error("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})[1],
                         "NBD server already running")
        self.export()
        self.assertEqual(add(id="e", name="x"), "Block export id 'e' is already in use")
        self.assertEqual(add(id="f"), "NBD server already has export named 'disk'")
        self.assertEqual(add(id="0f"), "Invalid block export id")
        self.assertEqual(add(id="f", iothread="nope", name="x"), 'iothread "nope" not found')
        self.assertEqual(self.qmp.error("block-export-add", {"type": "nbd", "id": "f", "node-name": "nope"})[1],
                         "Cannot find device='' nor node-name='nope'")
        self.assertTrue(add(id="f", name="n" * 4097).startswith("export name '"))
        self.assertTrue(add(id="f", name="f", description="d" * 4097).startswith("description '"))
        self.assertEqual(self.qmp.error("block-export-del", {"id": "nope"})[1], "Export 'nope' is not found")
        self.assertEqual(list(self.exports()), ["e"])

    def test_safe_and_hard_removal(self):
        self.serve()
        client = self.entered()
        self.assertTrue(self.qmp.error("block-export-del", {"id": "e"})[1].startswith("export 'e' still in use"))
        client.read(0, 512)
        self.qmp.cmd("block-export-del", {"id": "e", "mode": "hard"})
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertTrue(client.ends())
        self.assertEqual(self.exports(), {})
        self.export()
        self.entered().read(0, 512)

    def test_a_client_in_the_handshake_does_not_hold_an_export(self):
        self.serve()
        client = self.raw()
        client.greet()
        client.option(nbd.OPT_INFO, nbd.info("disk", 3))
        self.qmp.cmd("block-export-del", {"id": "e"})
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertEqual(client.final(nbd.OPT_GO, nbd.info("disk", 3)), nbd.UNKNOWN)
        self.assertEqual(client.option(nbd.OPT_LIST), [(nbd.ACK, b"")])

    def test_hard_removal_ends_although_a_client_reads_nothing(self):
        require_gantry("the reference waits for such a client")
        self.serve()
        client = self.entered()
        client.socket.settimeout(0.2)
        try:
            for i in range(100):
                client.socket.sendall(nbd.request(nbd.READ, 0, SIZE, cookie=i))
        except TimeoutError:
            pass
        self.qmp.cmd("block-export-del", {"id": "e", "mode": "hard"})
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e")

    def test_writes_reach_the_file_and_a_read_only_node_is_refused(self):
        self.serve()
        self.export("w", name="w", writable=True)
        client = self.entered("w")
        self.assertEqual(client.ask(nbd.WRITE, 1000, 5000, data=b"\x77" * 5000), 0)
        self.assertEqual(self.entered().read(1000, 5000), b"\x77" * 5000)
        self.qmp.cmd("blockdev-add", {"driver": "file", "node-name": "ro", "filename": self.image, "read-only": True, "locking": "off"})
        self.assertTrue(self.qmp.error("block-export-add", {"type": "nbd", "id": "x", "node-name": "ro", "writable": True})[1]
                        .startswith("Cannot export read-only node as writable"))

    def test_iothreads(self):
        require_gantry("the reference of this version aborts when a client of an iothread leaves")
        self.start("--object", "iothread,id=t1", "--object", "iothread,id=t2")
        self.socket = self.start_nbd(self.qmp)
        self.export(iothread="t1", writable=True)
        clients = [self.entered() for _ in range(4)]
        for i, client in enumerate(clients):
            self.assertEqual(client.ask(nbd.WRITE, i * 4096, 4096, data=bytes([i]) * 4096), 0)
        for client in clients:
            for i in range(4):
                self.assertEqual(client.read(i * 4096, 4096), bytes([i]) * 4096)
        self.assertTrue(self.qmp.error("object-del", {"id": "t1"})[1].startswith("object 't1' is in use"))
        self.qmp.cmd("block-export-del", {"id": "e", "mode": "hard"})
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.qmp.cmd("object-del", {"id": "t1"})

    def test_nodes_and_resizes_are_blocked_while_exported(self):
        self.serve()
        self.qmp.error("blockdev-del", {"node-name": "disk"})
        self.qmp.error("block_resize", {"node-name": "disk", "size": 2 * SIZE})
        self.entered().read(0, 512)

    def test_exports_come_and_go_under_verified_load(self):
        require_gantry("the reference waits for clients that read nothing")
        self.serve()
        self.export("w", name="w", writable=True)
        stop, failures = threading.Event(), []

        def load(slot):
            try:
                rng = random.Random(slot)
                base = slot * 256 * KIB
                client = Raw(self.socket)
                client.enter("w", structured=slot % 2 == 1)
                while not stop.is_set():
                    size = rng.choice((512, 4096, 50000, 200000))
                    at = base + rng.randrange(256 * KIB - size)
                    data = rng.randbytes(size)
                    assert client.ask(nbd.WRITE, at, size, data=data) == 0
                    got = client.read_chunks(at, size)[0] if slot % 2 else client.read(at, size)
                    assert got == data, "wrong data"
                client.close()
            except BaseException as error:  # whatever it is, the test must hear of it
                failures.append(repr(error))

        threads = [threading.Thread(target=load, args=(slot,)) for slot in range(4)]
        for thread in threads:
            thread.start()
        for i in range(60):
            self.export(f"x{i}", name=f"x{i}")
            visitor = self.entered(f"x{i}")
            visitor.send(nbd.request(nbd.READ, 0, MIB) * 4)
            self.qmp.cmd("block-export-del", {"id": f"x{i}", "mode": "hard"})
            self.qmp.event("BLOCK_EXPORT_DELETED", id=f"x{i}")
            self.assertTrue(visitor.ends())
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])


class Limits(Server):
    def test_max_connections_makes_clients_wait(self):
        self.serve(**{"max-connections": 2})
        first, second = self.entered(), self.entered()
        third = self.raw()
        third.socket.settimeout(0.3)
        with self.assertRaises(TimeoutError):
            third.socket.recv(1)
        third.socket.settimeout(20)
        first.close()
        third.enter("disk")
        third.read(0, 512)
        second.read(0, 512)

    def test_one_connection_has_no_multi_conn(self):
        self.serve(**{"max-connections": 1})
        client = self.raw()
        client.greet()
        self.assertFalse(client.go("disk", 3)[1] & nbd.T_MULTI_CONN)

    def test_the_handshake_has_a_time_limit(self):
        require_gantry("newer than the reference")
        self.serve(**{"handshake-max-seconds": 1})
        entered = self.entered()
        silent, slow = self.raw(), self.raw()
        begin = time.monotonic()
        self.assertTrue(silent.ends())
        self.assertTrue(slow.ends())
        self.assertLess(time.monotonic() - begin, 15)
        entered.read(0, 512)

    def test_running_out_of_descriptors_is_survived(self):
        require_gantry("the limit is set for gantryd")
        if gantry_test.BUILD.name == "asan":
            gantry_test.missing("the undefined-behaviour sanitizer itself needs descriptors", installable=False)
        self.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)))
        self.socket = self.start_nbd(self.qmp, **{"max-connections": 0})
        self.export()
        good = self.entered()
        crowd = [self.raw() for _ in range(70)]
        wait_for(lambda: "cannot accept a client" in self.server.stderr(), "the server to run out of descriptors")
        good.read(0, 512)
        for client in crowd:
            client.close()
        self.entered().read(0, 512)

    def test_many_clients_at_once(self):
        self.serve()
        clients = [self.entered() for _ in range(60)]
        for client in clients:
            client.send(nbd.request(nbd.READ, 0, 64 * KIB))
        for client in clients:
            client.reply()
            client.receive(64 * KIB)
        for client in clients:
            client.close()
        self.entered().read(0, 512)


class Addresses(Server):
    def start_at(self, **data):
        kind = data.pop("type")
        self.qmp.cmd("nbd-server-start", {"addr": {"type": kind, "data": data}})

    def test_tcp(self):
        self.start()
        port = free_port()
        self.start_at(type="inet", host="127.0.0.1", port=str(port))
        self.export()
        with Raw(("127.0.0.1", port)) as client:
            self.assertEqual(client.enter("disk")[0], SIZE)
            client.send(nbd.request(nbd.READ, 0, SIZE))
            client.reply()
            with open(self.image, "rb") as file:
                self.assertEqual(client.receive(SIZE), file.read())
        self.qmp.cmd("nbd-server-stop")
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        with self.assertRaises(ConnectionRefusedError):
            Raw(("127.0.0.1", port))

    def test_bad_addresses(self):
        require_gantry("the reference accepts some of them")
        self.start()
        for data in ({"type": "inet", "host": "127.0.0.1", "port": "99999"}, {"type": "inet", "host": "127.0.0.1", "port": ""},
                     {"type": "unix", "path": "/nowhere/at/all.sock"}, {"type": "unix", "path": "/" + "x" * 200}):
            data = dict(data)
            kind = data.pop("type")
            self.qmp.error("nbd-server-start", {"addr": {"type": kind, "data": data}})
        self.start_nbd(self.qmp)

    def test_a_live_socket_is_not_taken_over(self):
        require_gantry("the reference takes it over")
        self.serve()
        other = gantry_test.Daemon(os.path.join(self.dir, "."), monitor=False, extra=[
            "--nbd-server", f"addr.type=unix,addr.path={self.socket}"])
        self.addCleanup(other.kill)
        self.assertEqual(other.wait(), 1)
        self.assertIn(self.socket, other.stderr())
        self.entered().read(0, 512)

    def test_a_stale_socket_is_replaced(self):
        self.serve()
        self.server.kill()
        self.assertTrue(os.path.exists(self.socket))
        self.serve()
        self.entered().read(0, 512)


class Shutdown(Server):
    def stop_server(self):
        silent = self.raw()
        negotiating = self.raw()
        negotiating.greet()
        negotiating.final(nbd.OPT_LIST)
        return [silent, negotiating, self.entered()]

    def test_nbd_server_stop(self):
        require_gantry("the reference waits for clients in the handshake")
        self.serve()
        clients = self.stop_server()
        self.qmp.cmd("nbd-server-stop")
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        for client in clients:
            self.assertTrue(client.ends())
        self.assertFalse(os.path.exists(self.socket))
        self.start_nbd(self.qmp)
        self.export()
        self.entered().read(0, 512)

    def test_no_export_is_left_when_a_server_has_stopped(self):
        self.serve()
        for round_ in range(20):
            client = self.entered()
            client.read(0, 512)
            if round_ % 2:
                client.close()
            self.qmp.cmd("nbd-server-stop")
            self.assertEqual(self.qmp.cmd("query-block-exports"), [])
            self.start_nbd(self.qmp)
            self.export()

    def test_quit_and_signals_leave_no_socket(self):
        for number in (None, signal.SIGTERM, signal.SIGINT):
            self.serve()
            clients = self.stop_server()
            if number is None:
                self.qmp.cmd("quit")
                self.assertEqual(self.server.wait(), 0)
            else:
                self.server.stop(number)
            for client in clients:
                self.assertTrue(client.ends())
            if gantry_test.IS_GANTRY:
                self.assertFalse(os.path.exists(self.socket))

    def test_what_was_acknowledged_is_in_the_file(self):
        self.serve()
        self.export("w", name="w", writable=True)
        client = self.entered("w")
        for i in range(64):
            self.assertEqual(client.ask(nbd.WRITE, i * 65536, 65536, data=bytes([i + 1]) * 65536), 0)
        self.server.stop()
        with open(self.image, "rb") as file:
            for i in range(64):
                self.assertEqual(file.read(65536), bytes([i + 1]) * 65536)


if __name__ == "__main__":
    gantry_test.main()
