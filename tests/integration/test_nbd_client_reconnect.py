#!/usr/bin/python3
"""The block driver nbd and servers that go away: under load, for good, or without a word; and those that come late."""

import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import GANTRYD, MIB, freeze, libnbd, wait_for
from nbd_node_case import NodeCase

SIZE = 6 * MIB


class Reconnect(NodeCase):
    def test_a_server_is_killed_and_restarted_under_load(self):
        image = self.raw_image("disk.raw", 16 * MIB)

        def restart(server):
            if server:
                server.kill()
                server.wait()
                os.unlink(server.socket)
            return self.nbdkit("file", image)
        self.under_load(image, restart)

    def test_a_server_takes_leave_and_comes_back_under_load(self):
        """It answers ESHUTDOWN, on several connections."""
        image, path = self.raw_image("disk.raw", 16 * MIB), self.path("other.sock")

        def restart(server):
            if server:
                server.stop()
            return self.gantry_server(image, path=path)
        self.under_load(image, restart, export="disk", multi_conn=4)

    def under_load(self, image, restart, **options):
        """No request fails, and what was written is there."""
        nbd = libnbd()
        server = restart(None)
        self.client(server, reconnect_delay=60, **options)
        errors, stop = [], threading.Event()
        regions = 4
        size = 16 * MIB // regions
        written = [{} for _ in range(regions)]

        def load(region):
            rng = random.Random(region)
            try:
                h = nbd.NBD()
                h.connect_uri(self.uri(self.out, "out"))
                while not stop.is_set():
                    block = rng.randrange(size // 4096)
                    if block in written[region] and rng.random() < 0.5:
                        data = h.pread(4096, region * size + block * 4096)
                        if data != written[region][block]:
                            errors.append(f"region {region}: block {block} differs")
                    else:
                        data = struct.pack("<QQ", region, rng.getrandbits(60)) * 256
                        h.pwrite(data, region * size + block * 4096)
                        written[region][block] = data
                h.shutdown()
            except nbd.Error as error:
                errors.append(f"region {region}: {error}")
        threads = [threading.Thread(target=load, args=(region,)) for region in range(regions)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            before = sum(len(w) for w in written)
            wait_for(lambda: errors or sum(len(w) for w in written) > before + 200, "some load")
            server = restart(server)
        before = sum(len(w) for w in written)
        wait_for(lambda: errors or sum(len(w) for w in written) > before + 200, "the last load")
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        with open(image, "rb") as file:
            for region in range(regions):
                for block, data in written[region].items():
                    file.seek(region * size + block * 4096)
                    self.assertEqual(file.read(4096), data)

    def lost_client(self, **options):
        """A client whose server is gone, and which has a request that waits."""
        server = self.nbdkit("memory", str(SIZE))
        self.client(server, **options)
        h = self.connect()
        h.pwrite(b"y" * 4096, 0)
        server.kill()
        server.wait()
        os.unlink(server.socket)
        buffer = libnbd().Buffer(4096)
        h.aio_pread(buffer, 0)
        wait_for(lambda: "requests wait for its return" in self.node_daemon.stderr(), "the loss to be seen")
        return h

    def test_quitting_does_not_wait_for_a_lost_server(self):
        self.lost_client(reconnect_delay=600)
        begin = time.monotonic()
        self.node_daemon.stop()
        self.assertLess(time.monotonic() - begin, 8)

    def test_removing_does_not_wait_for_a_lost_server(self):
        self.lost_client(reconnect_delay=600)
        begin = time.monotonic()
        # Monitors are served all the time.
        self.q.cmd("query-named-block-nodes")
        self.q.cmd("block-export-del", id="out", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="out")
        self.q.cmd("blockdev-del", node_name="n")
        self.assertLess(time.monotonic() - begin, 8)

    def test_closing_an_image_does_not_wait_for_a_lost_server(self):
        """Its metadata is not yet written; the node of the server stays."""
        disk = self.raw_image("disk.raw", SIZE)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "4M"], check=True)
        os.truncate(disk, SIZE)
        server = self.nbdkit("file", disk)
        self.empty_client()
        self.q.cmd("blockdev-add", **self.add(server, reconnect_delay=600))
        self.q.cmd("blockdev-add", driver="qcow2", node_name="top", file="n")
        out = self.path("out.sock")
        self.q.cmd("nbd-server-start", addr={"type": "unix", "data": {"path": out}})
        self.q.cmd("block-export-add", type="nbd", id="out", node_name="top", writable=True)
        h = libnbd().NBD()
        h.connect_uri(self.uri(out, "top"))
        h.pwrite(b"y" * 65536, 65536)
        h.shutdown()
        self.q.cmd("block-export-del", id="out")
        self.q.event("BLOCK_EXPORT_DELETED", id="out")
        server.kill()
        server.wait()
        os.unlink(server.socket)
        begin = time.monotonic()
        self.q.cmd("blockdev-del", node_name="top")
        self.q.cmd("blockdev-del", node_name="n")
        self.assertLess(time.monotonic() - begin, 8)

    def test_a_server_that_does_not_answer_is_left_in_the_end(self):
        """Stopped, not dead: its socket is as good as ever."""
        server = self.nbdkit("memory", str(SIZE))
        self.client(server, reconnect_delay=600)
        h = self.connect()
        freeze(server)
        h.aio_pread(libnbd().Buffer(4096), 0)
        wait_for(lambda: self.requests_in_flight() > 0, "the request")
        begin = time.monotonic()
        self.node_daemon.stop()
        self.assertLess(time.monotonic() - begin, 12)

    def test_an_image_on_a_silent_server_does_not_wait_for_each_connection(self):
        """Metadata of the image and the flush of the node come when it is known that nobody answers."""
        disk = self.raw_image("disk.raw", SIZE)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "4M"], check=True)
        os.truncate(disk, SIZE)
        server = self.nbdkit("file", disk)
        self.node_daemon = self.empty_client()
        self.q.cmd("blockdev-add", **self.add(server, multi_conn=4))
        self.q.cmd("blockdev-add", driver="qcow2", node_name="top", file="n")
        self.out = self.path("out.sock")
        self.q.cmd("nbd-server-start", addr={"type": "unix", "data": {"path": self.out}})
        self.q.cmd("block-export-add", type="nbd", id="out", node_name="top", writable=True)
        h = libnbd().NBD()
        h.connect_uri(self.uri(self.out, "top"))
        h.pwrite(b"y" * 65536, 65536)
        freeze(server)
        h.aio_pread(libnbd().Buffer(4096), 65536)
        wait_for(lambda: self.requests_in_flight() > 0, "the request")
        begin = time.monotonic()
        self.node_daemon.stop()
        self.assertLess(time.monotonic() - begin, 20)
        self.assertIn("is given up", self.node_daemon.stderr())

    def requests_in_flight(self):
        return sum(c["in-flight"] for s in self.q.cmd("query-nbd-servers") for c in s["clients"])

    def test_opening_waits_for_a_server_and_can_be_given_up(self):
        self.empty_client()
        path = self.path("k.sock")
        replies = []

        def add(name, timeout):
            monitor = self.node.monitor()
            monitor.socket.settimeout(60)
            replies.append(monitor.ask(json.dumps({"execute": "blockdev-add", "arguments": self.add(
                self.unix(path), open_timeout=timeout) | {"node-name": name}})))
        self.node = self._daemons_node()
        thread = threading.Thread(target=add, args=("late", 60))
        thread.start()
        self.nbdkit("memory", "1M")
        thread.join()
        self.assertEqual(replies.pop(), {"return": {}})
        # One that never comes; the other monitor is served, and gives it up.
        path = self.path("never.sock")
        thread = threading.Thread(target=add, args=("never", 600))
        thread.start()

        def given_up():
            kind = self.q.ask(json.dumps({"execute": "blockdev-del", "arguments": {"node-name": "never"}}))
            return "return" in kind
        wait_for(given_up, "the opening to have begun, and to be given up")
        thread.join()
        self.assertIn("error", replies.pop())

    def test_a_signal_ends_an_opening_of_the_command_line(self):
        with open(self.path("log"), "w+") as log:
            process = subprocess.Popen([GANTRYD, *gantry_test.gantryd_options(), "--log-level", "debug", "--blockdev", json.dumps(
                self.add(self.unix(self.path("never.sock")), open_timeout=600))], stderr=log)
            self.addCleanup(process.kill)
            wait_for(lambda: "trying again" in pathlib.Path(self.path("log")).read_text(), "the first attempt")
            process.terminate()
            process.wait(10)
            self.assertIn("Failed to connect to", pathlib.Path(self.path("log")).read_text())

    def _daemons_node(self):
        class Handle:
            def __init__(handle):
                handle.monitor = lambda: gantry_test.Qmp(self.path("qmp.sock"))
        return Handle()


if __name__ == "__main__":
    gantry_test.main()
