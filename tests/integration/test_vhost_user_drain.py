#!/usr/bin/env python3
"""vhost-user-blk: changes of the graph while requests are in flight: sizes, reopening, bitmaps, other exports, removal."""

import os
import pathlib
import struct
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import GANTRY, MIB, require_gantry, wait_for
from vhost_case import SIZE, VhostCase
from vhost_disk import IN, OK, OUT, Model
from vhost_front import Msg


class Drains(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("queues and events are ours")

    def load(self, change, rounds=20, **options):
        """change(n) between the batches of a model."""
        self.serve(num_queues=2, size=SIZE)
        for packed in (False, True):
            disk = self.disk(queues=2, packed=packed, **options)
            model = Model(disk, SIZE, 41, most=32 * 1024)
            model.content[:] = self.content(length=SIZE)
            for n in range(rounds):
                model.fill()
                change(n)
                model.fill()
                model.step()
            model.drain()
            model.verify(self.content(length=SIZE))
            disk.close()

    def test_sizes(self):
        self.load(lambda n: self.server.qmp.cmd("block_resize", node_name="disk", size=SIZE + n % 5 * MIB))

    def test_bitmaps(self):
        def change(n):
            qmp = self.server.qmp
            if n % 2 == 0:
                qmp.cmd("block-dirty-bitmap-add", node="disk", name="b")
            else:
                qmp.cmd("block-dirty-bitmap-remove", node="disk", name="b")
        self.load(change)

    def test_reopening(self):
        path = self.path("disk.raw")

        def change(n):
            self.server.qmp.cmd("blockdev-reopen", {"options": [{"driver": "file", "node-name": "disk", "filename": path,
                                                                 "discard": "unmap" if n % 2 else "ignore"}]})
        self.load(change)

    def test_other_exports_and_queries(self):
        def change(n):
            qmp = self.server.qmp
            qmp.cmd("block-export-add", {"type": "vhost-user-blk", "id": "more", "node-name": "disk",
                                         "addr": {"type": "unix", "path": self.path("more.sock")}})
            qmp.cmd("query-block-exports")
            qmp.cmd("query-named-block-nodes")
            qmp.cmd("block-export-del", id="more")
            qmp.event("BLOCK_EXPORT_DELETED", id="more")
        self.load(change)

    def test_a_bitmap_sees_every_write(self):
        self.serve()
        self.server.qmp.cmd("block-dirty-bitmap-add", node="disk", name="b", granularity=65536)
        disk = self.disk()
        for n in (0, 5, 9):
            disk.write(n * 65536, b"b" * 512)
        disk.discard((20 * 128, 128, 0))
        disk.write_zeroes((30 * 128, 128, 0))
        node = next(n for n in self.server.qmp.cmd("query-named-block-nodes") if n["node-name"] == "disk")
        bitmap = next(b for b in node["dirty-bitmaps"] if b["name"] == "b")
        self.assertEqual(bitmap["count"], 5 * 65536)

    def test_the_daemon_ends_with_requests_in_flight(self):
        """SIGTERM: what was taken is answered first."""
        self.server = self.daemon(*self.null_option("disk", latency_ns=50_000_000), *self.export_option())
        disk = self.disk()
        requests = [disk.submit(IN, room=4096) for _ in range(16)]
        disk.connection.synchronize()
        self.server.stop()
        disk.reap(disk.queues[0])
        taken = disk.queues[0].ring.used[1]
        self.assertEqual(sum(request.done for request in requests), taken)
        self.assertEqual({request.status for request in requests if request.done} - {OK}, set())

    def test_two_guests_of_one_image(self):
        self.serve(*self.export_option("second", node="disk"))
        one, two = self.disk(), self.disk("second")
        for n in range(50):
            one.write(n * 4096, os.urandom(4096))
            self.assertEqual(two.read(n * 4096, 4096), one.read(n * 4096, 4096))
        requests = [disk.submit(OUT, 8 * n, b"o" * 4096) for n in range(30) for disk in (one, two)]
        wait_for(lambda: [d.reap(d.queues[0]) for d in (one, two)] and all(r.done for r in requests), "both")

    def test_a_message_that_waits_for_requests_is_shown(self):
        self.server = self.daemon(*self.stuck_node_option(), *self.export_option("stuck"))
        disk = self.disk("stuck")
        self.freeze()
        requests = [disk.submit(OUT, 8 * n, b"w" * 4096) for n in range(3)]
        wait_for(lambda: disk.taken() == 3, "the requests to be taken")
        disk.connection.send(Msg.GET_VRING_BASE, struct.pack("=II", 0, 0))

        def front():
            return self.server.qmp.cmd("query-vhost-user-exports")[0]["front-end"]
        wait_for(lambda: front().get("waits-for-answer-to") == "GET_VRING_BASE", "the message to wait")
        self.assertEqual(front()["queues"][0]["in-flight"], 3)
        status = subprocess.run([GANTRY, "status", "--qmp", self.server.qmp_path], capture_output=True, text=True, check=True).stdout
        self.assertIn("1 queues run, 3 requests in flight; ", status)
        self.assertIn("waits for the answer to GET_VRING_BASE", status)
        self.thaw()
        self.assertEqual(disk.connection.receive()[0], Msg.GET_VRING_BASE)
        disk.reap(disk.queues[0])
        self.assertTrue(all(request.done for request in requests))
        self.assertNotIn("waits-for-answer-to", front())
        self.assertEqual(front()["queues"][0]["in-flight"], 0)

    def test_queries_show_the_queues(self):
        self.serve(num_queues=2)
        disk = self.disk(queues=2)
        for n in range(10):
            disk.finish(disk.submit(OUT, 8 * n, b"q" * 4096, queue=1))
        disk.read(0, 8192)
        info = next(e for e in self.server.qmp.cmd("query-vhost-user-exports") if e["id"] == "disk")
        self.assertTrue(info["connected"])
        queues = {queue["index"]: queue for queue in info["front-end"]["queues"]}
        self.assertEqual((queues[1]["requests"], queues[1]["bytes-written"]), (10, 40960))
        self.assertEqual((queues[0]["requests"], queues[0]["bytes-read"]), (1, 8192))
        self.assertEqual(queues[0]["size"], 128)
        self.assertTrue(all(queue["running"] and queue["enabled"] and not queue["packed"] for queue in queues.values()))
        disk.queues[0].ring.offer(1000)
        disk.queues[0].publish(always=True)
        disk.wait_broken()

        def broken():
            info = next(e for e in self.server.qmp.cmd("query-vhost-user-exports") if e["id"] == "disk")
            return next(q for q in info["front-end"]["queues"] if q["index"] == 0).get("broken")
        self.assertIn("1000", wait_for(broken, "the reason"))
        disk.close()
        wait_for(lambda: not self.server.qmp.cmd("query-vhost-user-exports")[0]["connected"], "the end")


if __name__ == "__main__":
    gantry_test.main()
