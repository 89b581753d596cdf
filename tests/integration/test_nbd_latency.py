#!/usr/bin/python3
"""A long line: a proxy delays every byte by 5 ms each way and holds a bounded window of them per connection."""
# One configuration: the line is what takes the time.

import json
import os
import pathlib
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, Daemon, libnbd, wait_for
from slow_proxy import SlowProxy

SIZE = 32 * MIB
DELAY = 0.005


class Latency(Case):
    def setUp(self):
        super().setUp()
        self.image = self.raw_image("disk.raw", SIZE, lambda number: bytes([number % 251 + 1]) * 65536)
        self.socket = self.path("nbd.sock")
        self.server = self.daemon(
            "--blockdev", f"driver=file,node-name=disk,filename={self.image}", "--nbd-server",
            f"addr.type=unix,addr.path={self.socket}", "--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on")

    def proxy(self, window):
        proxy = SlowProxy(self.path("slow.sock"), self.socket, DELAY, window)
        self.addCleanup(proxy.close)
        return proxy

    def node(self, proxy, connections):
        """Another daemon, whose node is our export beyond the line; its socket."""
        gantry_test.require_gantry("a driver of gantryd")
        directory = tempfile.mkdtemp(prefix="c-", dir=self.dir)
        out = os.path.join(directory, "out.sock")
        daemon = Daemon(directory, "--blockdev", json.dumps({
            "driver": "nbd", "node-name": "n", "export": "disk", "multi-conn": connections,
            "server": {"type": "unix", "path": proxy.path}}), "--nbd-server", f"addr.type=unix,addr.path={out}",
            "--export", "type=nbd,id=out,node-name=n,name=out")
        self.addCleanup(self._end, daemon)
        return out

    def moved(self, uri, handles, depth):
        """Bytes per second that as many connections to `uri` read, each with as many requests of 32 KiB under way."""
        nbd = libnbd()
        seconds, size, total = 1.0, 32 * KIB, [0] * handles
        barrier = threading.Barrier(handles)

        def read(number):
            h = nbd.NBD()
            h.connect_uri(uri)
            buffers = [nbd.Buffer(size) for _ in range(depth)]
            barrier.wait()
            end, at = time.monotonic() + seconds, number
            flying = []
            while True:
                while len(flying) < depth:
                    flying.append(h.aio_pread(buffers[len(flying)], at % (SIZE // size) * size))
                    at += handles
                h.poll(-1)
                left = [cookie for cookie in flying if not h.aio_command_completed(cookie)]
                if time.monotonic() > end:
                    break
                total[number] += (len(flying) - len(left)) * size
                flying = left
        threads = [threading.Thread(target=read, args=(number,)) for number in range(handles)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(total) / seconds

    def test_eight_connections_to_our_server_move_five_times_one(self):
        uri = self.uri(self.proxy(64 * KIB).path, "disk")
        one, eight = self.moved(uri, 1, 4), self.moved(uri, 8, 4)
        self.assertGreaterEqual(eight / one, 5, f"one connection {one / MIB:.1f} MiB/s, eight {eight / MIB:.1f} MiB/s")

    def test_eight_connections_of_our_node_move_five_times_one(self):
        """Whoever reads has one connection to the node."""
        proxy = self.proxy(64 * KIB)
        rates = {}
        for connections in (1, 8):
            before = proxy.connections
            out = self.node(proxy, connections)
            wait_for(lambda: proxy.connections - before == connections, f"{connections} connections")
            rates[connections] = self.moved(self.uri(out, "out"), 1, 128) / MIB
        self.assertGreater(rates[8] / rates[1], 5, rates)

    def test_one_connection_is_filled_by_pipelining(self):
        """Depth 64 does close to 64 times as much as depth 1."""
        nbd = libnbd()
        out = self.node(self.proxy(4 * MIB), 1)
        h = nbd.NBD()
        h.connect_uri(self.uri(out, "out"))

        def rate(depth, requests):
            begin = time.monotonic()
            flying, issued, finished = [], 0, 0
            while finished < requests:
                while len(flying) < depth and issued < requests:
                    flying.append(h.aio_pread(nbd.Buffer(4096), issued % (SIZE // 4096) * 4096))
                    issued += 1
                h.poll(-1)
                left = [cookie for cookie in flying if not h.aio_command_completed(cookie)]
                finished += len(flying) - len(left)
                flying = left
            return requests / (time.monotonic() - begin)
        single, many = rate(1, 60), rate(64, 64 * 40)
        self.assertLess(single, 1 / (2 * DELAY))
        self.assertGreater(many / single, 40, f"depth 1: {single:.0f}/s, depth 64: {many:.0f}/s")


if __name__ == "__main__":
    gantry_test.main()
