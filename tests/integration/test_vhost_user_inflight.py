#!/usr/bin/env python3
"""vhost-user-blk: kill -9 of the daemon with requests in flight. The guest sees a pause: every request is answered once, with the
right data, raw and qcow2, split and packed rings; as well when the front end goes and comes back.
"""

# One configuration: each round starts a daemon.

import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import MIB, require, require_gantry, wait_for
from vhost_case import VhostCase
from vhost_disk import IN, OK, OUT, Model
from vhost_front import Msg

SOAK = bool(os.environ.get("GANTRY_SOAK"))
ROUNDS = 60 if SOAK else 4
SIZE = 4 * MIB


class Killed(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("another daemon's restart is another matter")

    def start(self):
        """The kernel keeps the files of a killed process, and their locks, until its last request to io_uring is over."""
        def started():
            try:
                self.server = self.daemon(*self.words)
            except AssertionError as error:
                if '"write" lock' not in str(error):
                    raise
                return False
            return True
        wait_for(started, "the image to be free")

    def restart(self, disk):
        """kill -9; another daemon; the same guest goes on."""
        self.server.kill()
        disk.disconnect()
        self.start()
        disk.open()


class Models(Killed):
    def rounds(self, words, content, loads=3, **options):
        self.words = words
        self.start()
        disk = self.disk(**options)
        model = Model(disk, SIZE, 99, most=32 * 1024)
        rng = random.Random(5)
        for _ in range(ROUNDS):
            for _ in range(rng.randrange(loads)):
                model.step()
            for _ in range(rng.randrange(1, 4)):
                model.fill()
            if rng.random() < 0.5:  # some are answered, which nobody has looked at
                disk.connection.synchronize()
            self.restart(disk)
            model.fill()
            model.drain()
        model.run(100)
        disk.flush()
        model.verify(content())
        disk.stop()
        disk.close()

    def raw(self, **options):
        words = [*self.node_option(size=SIZE), *self.export_option()]
        self.rounds(words, self.content, **options)

    def test_raw_split(self):
        self.raw()

    def test_raw_split_without_event_idx(self):
        self.raw(event_idx=False, indirect=False, queue_size=16)

    def test_raw_packed(self):
        self.raw(packed=True)

    def test_raw_packed_without_event_idx(self):
        self.raw(packed=True, event_idx=False, indirect=False, queue_size=50)

    def test_raw_with_queues(self):
        self.raw(queues=3)

    def qcow2(self, **options):
        require("qemu-img")
        logs = tempfile.mkdtemp(prefix="gt-logs-", dir="/dev/shm")
        self.addCleanup(subprocess.run, ["rm", "-rf", logs])
        image = self.path("disk.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)

        def content():
            self.server.stop()
            self.run_tool("qemu-img", "check", "-q", image)
            self.run_tool("qemu-img", "convert", "-O", "raw", image, self.path("disk.raw"))
            return self.content()

        def verified():
            data = content()
            self.start()  # the disk stops it as usual
            disk = self.disks["disk"]
            disk.disconnect()
            disk.open()
            return data
        self.rounds(["--mapping-logs", logs, "--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap",
                     "--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap", *self.export_option()], verified, **options)

    def test_qcow2_split(self):
        self.qcow2()

    def test_qcow2_packed(self):
        self.qcow2(packed=True, queues=2)


class Stuck(Killed):
    """Requests that are surely in flight: the server of the image has stopped."""

    def setUp(self):
        super().setUp()
        self.words = [*self.stuck_node_option(size=SIZE), *self.export_option("stuck")]
        self.start()

    def stuck(self, packed, rounds=2, **options):
        disk = self.disk("stuck", packed=packed, **options)
        for n in range(rounds):
            data = [os.urandom(4096) for _ in range(20)]
            self.freeze()
            requests = [disk.submit(OUT, 8 * i, data[i]) for i in range(20)]
            requests += [disk.submit(IN, 8 * (100 + i), room=4096) for i in range(10)]
            disk.connection.synchronize()
            wait_for(lambda: disk.taken() == len(requests), "the requests to be taken")
            disk.reap(disk.queues[0])
            self.assertFalse(any(request.done for request in requests))
            self.server.kill()
            disk.disconnect()
            self.thaw()
            self.start()
            disk.open()
            # Newer requests of the same blocks come after the older ones.
            disk.finish(*requests)
            self.assertEqual({request.answers for request in requests}, {1})
            self.assertEqual({request.status for request in requests}, {OK})
            for i in range(20):
                self.assertEqual(disk.read(4096 * i, 4096), data[i])
        disk.stop()
        disk.disconnect()

    def test_split(self):
        self.stuck(False)

    def test_packed(self):
        self.stuck(True, indirect=False)

    def test_order(self):
        """Requests that were in flight are sent again in their order, whatever their descriptors are."""
        for packed in (False, True):
            disk = self.disk("stuck", packed=packed)
            rng = random.Random(8)
            for _ in range(2):
                if not packed:
                    rng.shuffle(disk.queues[0].ring.free_slots)
                self.freeze()
                requests = []
                for i in range(8):
                    requests.append(disk.submit(OUT, 0, bytes([i]) * 512))
                wait_for(lambda: disk.taken() == len(requests), "the requests to be taken")
                counters = self.counters(disk)
                self.assertEqual(len(set(counters)), len(requests))
                self.restart_thawed(disk)
                disk.finish(*requests)
            disk.stop()
            disk.disconnect()

    def counters(self, disk):
        _, fd = disk.inflight
        size = disk.queues[0].ring.size
        step = 32 if disk.packed else 16
        data = os.pread(fd, step + step * size, 0)
        return [struct.unpack_from("=Q", data, step + step * slot + 8)[0] for slot in range(size) if data[step + step * slot]]

    def restart_thawed(self, disk):
        self.server.kill()
        disk.disconnect()
        self.thaw()
        self.start()
        disk.open()

    def test_a_front_end_that_goes_and_comes_back(self):
        """What was in flight is answered before the next one comes, or taken up by it: once."""
        for packed in (False, True):
            disk = self.disk("stuck", packed=packed)
            self.freeze()
            data = [os.urandom(4096) for _ in range(20)]
            requests = [disk.submit(OUT, 8 * i, data[i]) for i in range(20)]
            wait_for(lambda: disk.taken() == len(requests), "the requests to be taken")
            disk.disconnect()
            self.thaw()
            disk.open()
            disk.finish(*requests)
            self.assertEqual({request.answers for request in requests}, {1})
            for i in range(20):
                self.assertEqual(disk.read(4096 * i, 4096), data[i])
            disk.stop()
            disk.disconnect()

    def test_hard_removal_with_requests_in_flight(self):
        disk = self.disk("stuck")
        self.freeze()
        requests = [disk.submit(OUT, 8 * i, b"x" * 512) for i in range(4)]
        wait_for(lambda: disk.taken() == 4, "the requests to be taken")
        self.server.qmp.cmd("block-export-del", id="stuck", mode="hard")
        self.thaw()
        self.server.qmp.event("BLOCK_EXPORT_DELETED", id="stuck")
        # Another export of the node takes them up.
        self.server.qmp.cmd("block-export-add", {"type": "vhost-user-blk", "id": "again", "node-name": "stuck", "writable": True,
                                                 "addr": {"type": "unix", "path": self.path("stuck.sock")}})
        disk.disconnect()
        disk.open()
        disk.finish(*requests)


class FrontEnds(Killed):
    def setUp(self):
        super().setUp()
        self.words = [*self.node_option(size=SIZE), *self.export_option()]
        self.start()

    def test_disconnects_under_load(self):
        for options in ({}, {"packed": True}, {"queues": 2, "event_idx": False}):
            with self.subTest(**options):
                disk = self.disk(**options)
                model = Model(disk, SIZE, 17, most=32 * 1024)
                model.content[:] = self.content()
                for _ in range(20):
                    model.fill()
                    disk.disconnect()
                    disk.open()
                    model.step()
                model.drain()
                model.verify(self.content())
                disk.close()

    def test_stops_and_starts_with_an_inflight_region(self):
        for packed in (False, True):
            disk = self.disk(packed=packed)
            for _ in range(20):
                requests = [disk.submit(OUT, 8 * n, b"s" * 4096) for n in range(10)]
                disk.stop()
                for queue in disk.queues:
                    disk.start_queue(queue)
                disk.finish(*requests)
            disk.close()

    def test_regions_of_the_inflight_file(self):
        disk = self.disk(open=False, queues=3, queue_size=64).connect()
        for queues, size in ((1, 64), (3, 128), (64, 1024)):
            data, fds = disk.connection.ask(Msg.GET_INFLIGHT_FD, struct.pack("=QQHH", 0, 0, queues, size))
            length, offset, got_queues, got_size = struct.unpack_from("=QQHH", data)
            self.assertEqual((offset, got_queues, got_size), (0, queues, size))
            self.assertGreaterEqual(length, queues * (16 + 16 * size))
            self.assertGreaterEqual(os.fstat(fds[0]).st_size, length)
            self.assertEqual(os.pread(fds[0], length, 0), bytes(length))
            with self.assertRaises(OSError):
                os.ftruncate(fds[0], 0)
            os.close(fds[0])


if __name__ == "__main__":
    gantry_test.main()
