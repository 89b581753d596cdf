#!/usr/bin/env python3
"""vhost-user-blk: rings of every kind against a model, with many requests in flight; kicks and signals that are not needed.

GANTRYD=qemu-storage-daemon runs the same against the reference, which has split rings only.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import IS_GANTRY, KIB, MIB, require_gantry, wait_for
from vhost_case import VhostCase
from vhost_disk import FLUSH, GET_ID, IN, OK, OUT, Model
from vhost_front import NO_FD, Msg, Region
from vhost_rings import AVAIL, USED

SOAK = bool(os.environ.get("GANTRY_SOAK"))
SIZE = 4 * MIB


class Models(VhostCase):
    """Random requests in any layout, compared with a bytearray and with the image afterwards."""

    def model(self, requests=250, seed=1, sizes=(128,), **options):
        queues = options.pop("queues", 1)
        self.serve(size=SIZE, num_queues=queues)
        for size in sizes:
            with self.subTest(size=size):
                disk = self.disk(queues=queues, queue_size=size, **options)
                model = Model(disk, SIZE, seed + size)
                model.content[:] = self.content()
                model.run(requests * (20 if SOAK else 1))
                disk.flush()
                model.verify(self.content())
                disk.stop()
                disk.close()

    def test_split(self):
        self.model(event_idx=False, indirect=False)

    def test_split_with_event_idx(self):
        self.model(event_idx=True, indirect=False)

    def test_split_with_indirect_tables(self):
        self.model(event_idx=False, indirect=True)

    def test_split_with_everything(self):
        self.model(event_idx=True, indirect=True, sizes=(256,))

    def test_four_split_queues(self):
        self.model(queues=4, requests=400)

    def test_split_rings_of_any_size(self):
        self.model(requests=60, sizes=(2, 4, 8, 64, 512, 1024))

    def test_packed(self):
        require_gantry("packed rings")
        self.model(packed=True, event_idx=False, indirect=False)

    def test_packed_with_event_idx(self):
        require_gantry("packed rings")
        self.model(packed=True, event_idx=True, indirect=False)

    def test_packed_with_indirect_tables(self):
        require_gantry("packed rings")
        self.model(packed=True, event_idx=False, indirect=True)

    def test_packed_with_everything(self):
        require_gantry("packed rings")
        self.model(packed=True, event_idx=True, indirect=True, sizes=(256,))

    def test_four_packed_queues(self):
        require_gantry("packed rings")
        self.model(packed=True, queues=4, requests=400)

    def test_packed_rings_of_any_size(self):
        require_gantry("packed rings")
        self.model(packed=True, requests=60, sizes=(2, 3, 7, 64, 100, 1000, 1024))


class Wrapping(VhostCase):
    """Indices of 16 bits come round."""

    def around(self, **options):
        self.server = self.daemon(*self.null_option("disk"), *self.export_option())
        disk = self.disk(queue_size=1024, **options)
        chains = 0
        while chains < (140000 if SOAK else 4000):
            batch = [disk.add(disk.chain(GET_ID, room=20), indirect=True) for _ in range(1000)]
            disk.queues[0].publish()
            disk.finish(*batch)
            self.assertEqual({request.status for request in batch}, {OK})
            chains += len(batch)

    def test_split(self):
        self.around(event_idx=True)

    def test_split_without_event_idx(self):
        self.around(event_idx=False)

    def test_packed(self):
        require_gantry("packed rings")
        self.around(packed=True, event_idx=True)

    def base(self, base, **options):
        """Rings begin where SET_VRING_BASE says."""
        disk = self.disk(open=False, inflight=False, **options)
        disk.connect()
        ring = disk.queues[0].ring
        if ring.packed:
            ring.next = ring.last_used = base & 0x7FFF
            ring.wrap = ring.used_wrap = base >> 15 & 1
            for slot in range(ring.size):  # as if it had come to here
                before = ring.wrap if slot < ring.next else 1 - ring.wrap
                ring.flags[8 * slot + 7] = (AVAIL | USED) * before
        else:
            ring.avail_idx = ring.published = ring.last_used = base
            ring.avail[1] = ring.used[1] = ring.used[2 + 4 * ring.size] = base  # a device had been there
        disk.start()
        for _ in range(300):
            self.works(disk)
        return disk

    def test_split_ring_that_begins_near_the_end(self):
        self.serve()
        for base in (1, 127, 65535, 65300):
            with self.subTest(base=base):
                disk = self.base(base)
                self.assertEqual(disk.stop_queue(disk.queues[0]), (base + 600) & 0xFFFF)
                disk.close()

    def test_packed_ring_that_begins_near_the_end(self):
        require_gantry("packed rings")
        self.serve()
        for base in (99, 99 | 1 << 15, 5 | 1 << 15, 5):
            with self.subTest(base=base):
                disk = self.base(base | base << 16, packed=True, queue_size=100, indirect=False)
                ring = disk.queues[0].ring
                half = ring.next | ring.wrap << 15
                self.assertEqual(disk.stop_queue(disk.queues[0]), half | half << 16)
                disk.close()


class Notifications(VhostCase):
    def batch(self, disk, count=64):
        requests = [disk.add(disk.chain(IN, 8 * i, room=4 * KIB), indirect=disk.indirect) for i in range(count)]
        disk.queues[0].publish()
        return requests

    def look(self, disk, requests):
        """Waits without signals."""
        def done():
            disk.reap(disk.queues[0])
            return all(request.done for request in requests)
        wait_for(done, "answers")

    def kinds(self):
        for packed in (False, True) if IS_GANTRY else (False,):
            for event_idx in (False, True):
                yield {"packed": packed, "event_idx": event_idx}

    def test_one_signal_for_a_batch(self):
        require_gantry("the reference signals request by request")
        self.serve(data=bytes(range(256)) * 4096)
        for options in self.kinds():
            with self.subTest(**options):
                disk = self.disk(**options)
                queue = disk.queues[0]
                rounds = 40
                for _ in range(rounds):
                    disk.finish(*self.batch(disk))
                queue.take_signals()
                # From the page cache they are answered in one go; an odd one may come while the driver arms again.
                self.assertLess(queue.signals, 8 * rounds, options)
                disk.close()

    def test_no_signal_for_a_driver_that_looks_by_itself(self):
        self.serve()
        for options in self.kinds():
            with self.subTest(**options):
                disk = self.disk(**options)
                queue = disk.queues[0]
                self.works(disk)
                queue.ring.quiet()
                self.look(disk, [disk.submit(IN, room=512)])  # after it nothing is told of what was before
                queue.take_signals()
                before = queue.signals
                self.look(disk, self.batch(disk))
                self.look(disk, self.batch(disk))
                queue.take_signals()
                self.assertEqual(queue.signals, before, options)
                disk.close()

    def test_a_call_descriptor_can_be_taken_away_and_replaced(self):
        require_gantry("the reference drops a front end without a call descriptor")
        self.serve()
        disk = self.disk()
        queue, front = disk.queues[0], disk.connection
        self.works(disk)
        front.tell_u64(Msg.SET_VRING_CALL, NO_FD)
        queue.ring.arm()
        self.look(disk, [disk.submit(IN, room=512)])
        new = os.eventfd(0, os.EFD_NONBLOCK)
        os.close(queue.call)
        queue.call = new
        front.tell_u64(Msg.SET_VRING_CALL, 0, [new])
        for _ in range(100):
            self.works(disk)

    def test_many_kicks_for_nothing_are_harmless(self):
        self.serve()
        disk = self.disk()
        for _ in range(2000):
            os.eventfd_write(disk.queues[0].kick, 1)
        self.works(disk)

    def test_chains_without_a_kick_are_taken_when_the_ring_starts(self):
        require_gantry("the reference waits for a kick")
        self.serve()
        for options in self.kinds():
            with self.subTest(**options):
                disk = self.disk(open=False, **options)
                request = disk.add(disk.chain(OUT, 0, b"x" * 512))
                disk.queues[0].ring.publish()
                disk.open()
                disk.finish(request)
                self.assertEqual(request.status, OK)
                disk.close()

    def test_chains_without_a_kick_are_taken_when_the_ring_is_enabled(self):
        require_gantry("the reference waits for a kick")
        self.serve()
        for options in self.kinds():
            with self.subTest(**options):
                disk = self.disk(open=False, **options)
                disk.enabled = False
                disk.open()
                request = disk.submit(OUT, 0, b"x" * 512)
                disk.queues[0].publish(always=True)
                for _ in range(20):
                    disk.connection.synchronize()
                disk.reap(disk.queues[0])
                self.assertFalse(request.done)
                disk.connection.tell_state(Msg.SET_VRING_ENABLE, 0, 1)
                disk.finish(request)
                disk.connection.tell_state(Msg.SET_VRING_ENABLE, 0, 0)
                later = disk.submit(FLUSH)
                for _ in range(20):
                    disk.connection.synchronize()
                disk.reap(disk.queues[0])
                self.assertFalse(later.done)
                disk.connection.tell_state(Msg.SET_VRING_ENABLE, 0, 1)
                disk.finish(later)
                disk.close()


class Life(VhostCase):
    def test_queues_stop_and_start_again_with_requests_waiting(self):
        require_gantry("the reference drops a front end that enables a ring again")
        self.serve(num_queues=2)
        for packed in (False, True) if IS_GANTRY else (False,):
            with self.subTest(packed=packed):
                disk = self.disk(queues=2, packed=packed)
                for _ in range(20):
                    self.works(disk)
                    disk.stop()
                    request = disk.submit(OUT, 8, b"y" * 512, queue=1)
                    disk.reap(disk.queues[1])
                    self.assertFalse(request.done)
                    for queue in disk.queues:
                        disk.start_queue(queue)
                    disk.finish(request)
                disk.close()

    def test_stopping_waits_for_what_is_in_flight(self):
        self.server = self.daemon(*self.null_option("disk", latency_ns=50_000_000), *self.export_option())
        disk = self.disk()
        requests = [disk.submit(IN, room=512) for _ in range(16)]
        # Those that were taken are answered when the ring is said to be stopped; the others wait.
        base = disk.stop_queue(disk.queues[0])
        disk.reap(disk.queues[0])
        self.assertEqual(sum(request.done for request in requests), base)
        disk.start_queue(disk.queues[0])
        disk.finish(*requests)

    def test_rings_and_buffers_in_regions_of_their_own(self):
        self.serve()
        regions = [Region(0, 64 * KIB), Region(1 << 20, MIB), Region((1 << 20) + MIB, MIB, offset=4096), Region(1 << 40, 2 * MIB)]
        disk = self.disk(regions=regions)
        model = Model(disk, 8 * MIB, 7, most=32 * KIB)
        model.run(150)
        model.verify(self.content())


if __name__ == "__main__":
    gantry_test.main()
