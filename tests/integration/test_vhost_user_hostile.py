#!/usr/bin/env python3
"""vhost-user-blk: a guest that lies. Its device ends with a signal on the error eventfd; the daemon, other exports and the next
front end of the same export go on.
"""

import contextlib
import os
import pathlib
import random
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import require_gantry, wait_for
from vhost_case import VhostCase
from vhost_disk import GET_ID, IN, IOERR, OK
from vhost_front import Broken, Closed, Msg, Refused, readable
from vhost_rings import INDIRECT, NEXT, WRITE

NOWHERE = 0x7777_0000_0000


class Hostile(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("the reference stops as a whole")
        self.serve(*self.null_option("slow", latency_ns=100_000_000), *self.export_option("slow", writable=False),
                   *self.export_option("other", node="disk", writable=False))
        self.bystander = self.disk("other")

    def attack(self, what, packed=False, name="disk", **options):
        """`what(disk, ring)` prepares the ring; then the device looks at it."""
        disk = self.disk(name, packed=packed, **options)
        disk.finish(disk.submit(GET_ID, room=20))
        what(disk, disk.queues[0].ring)
        disk.queues[0].publish(always=True)
        disk.wait_broken()
        self.assertEqual(self.bystander.finish(self.bystander.submit(IN, room=4096)).status, OK)
        disk.close()

    def next_works(self):
        self.works(self.disk())

    def chains(self, cases):
        """Functions that make chains of (address, length, write), direct and in tables, in both kinds of rings."""
        for packed in (False, True):
            for indirect in (False, True):
                for name, chain in cases.items():
                    with self.subTest(name, packed=packed, indirect=indirect):
                        self.attack(lambda disk, ring: ring.add(chain(disk), indirect=indirect), packed)
        self.next_works()


def pieces(disk, **more):
    """A good chain."""
    request = disk.chain(IN, 0, room=512, **more)
    return [(a, n, False) for a, n in request.readable] + [(a, n, True) for a, n in request.writable]


class Chains(Hostile):
    def test_addresses(self):
        def end(disk):
            return disk.memory.regions[1].end
        self.chains({
            "nowhere": lambda disk: [*pieces(disk)[:1], (NOWHERE, 512, True), *pieces(disk)[2:]],
            "header nowhere": lambda disk: [(NOWHERE, 16, False), *pieces(disk)[1:]],
            "status nowhere": lambda disk: [*pieces(disk)[:2], (NOWHERE, 1, True)],
            "across the end": lambda disk: [*pieces(disk)[:1], (end(disk) - 511, 512, True), *pieces(disk)[2:]],
            "at the end": lambda disk: [*pieces(disk)[:1], (end(disk), 512, True), *pieces(disk)[2:]],
            "round": lambda disk: [*pieces(disk)[:1], ((1 << 64) - 256, 512, True), *pieces(disk)[2:]],
            "huge": lambda disk: [*pieces(disk)[:1], (disk.memory.regions[1].guest, 0xFFFFFFFF, True), *pieces(disk)[2:]],
        })

    def test_forms(self):
        self.chains({
            "readable after writable": lambda disk: [*pieces(disk)[:2], (disk.memory.regions[1].guest, 512, False), *pieces(disk)[2:]],
            "empty descriptor": lambda disk: [*pieces(disk)[:1], (disk.memory.regions[1].guest, 0, True), *pieces(disk)[2:]],
            "empty header": lambda disk: [(disk.memory.regions[1].guest, 0, False), *pieces(disk)],
            "no place for a status": lambda disk: pieces(disk)[:1],
        })

    def test_headers_that_are_short(self):
        """They have a place for an answer: an error is as good as the end."""
        for packed in (False, True):
            for length in (1, 8, 15):
                disk = self.disk(packed=packed)
                request = disk.chain(IN, 0, room=512, readable=[length])
                disk.add(request)
                disk.queues[0].publish()
                try:
                    disk.finish(request)
                    self.assertEqual(request.status, IOERR)
                except Broken:
                    pass
                disk.close()
        self.next_works()


def table(disk, *entries):
    """Descriptors (address, length, flags, next) in guest memory: address and bytes."""
    data = b"".join(struct.pack("=QIHH", *entry) for entry in entries)
    address = disk.memory.alloc(max(len(data), 16), 16)
    disk.memory.write(address, data)
    return address, len(data)


class Split(Hostile):
    def test_available_index(self):
        for jump in (129, 1000, 0x7FFF, 0x8000, 0xFFFF):
            with self.subTest(jump=jump):
                def what(disk, ring, jump=jump):
                    ring.avail_idx = (ring.avail_idx + jump) & 0xFFFF
                self.attack(what)
        self.next_works()

    def test_heads(self):
        for head in (128, 129, 0x7FFF, 0xFFFF):
            with self.subTest(head=head):
                self.attack(lambda disk, ring, head=head: ring.offer(head))
        self.next_works()

    def test_a_head_that_is_in_flight(self):
        def what(disk, ring):
            ring.offer(ring.add(pieces(disk)))
        self.attack(what, name="slow")

        def later(disk, ring):
            head = ring.add(pieces(disk))
            disk.queues[0].publish(always=True)
            disk.connection.synchronize()
            ring.offer(head)
        self.attack(later, name="slow")

    def test_links(self):
        def linked(*entries):
            def what(disk, ring):
                good = pieces(disk)
                for slot, (flags, following) in enumerate(entries):
                    ring.set_descriptor(slot + 10, *good[min(slot, 2)][:2], flags | (WRITE if slot else 0), following)
                ring.offer(10)
            return what
        for name, entries in {"out": [(NEXT, 128)], "far out": [(NEXT, 0xFFFF)], "to itself": [(NEXT, 10)],
                              "in a circle": [(NEXT, 11), (NEXT, 12), (NEXT, 11)], "back to the head": [(NEXT, 11), (NEXT, 10)]}.items():
            with self.subTest(name):
                self.attack(linked(*entries))
        self.next_works()

    def indirect(self, make, flags=INDIRECT, following=0):
        """The head refers to a table that make(disk) builds: address and bytes."""
        def what(disk, ring):
            address, length = make(disk)
            ring.set_descriptor(5, address, length, flags, following)
            ring.set_descriptor(6, disk.memory.regions[1].guest, 512, WRITE)
            ring.offer(5)
        return what

    def good_table(self, disk):
        good = pieces(disk)
        return table(disk, (*good[0][:2], NEXT, 1), (*good[1][:2], NEXT | WRITE, 2), (*good[2][:2], WRITE, 0))

    def test_indirect_tables(self):
        cases = {
            "empty": lambda disk: (self.good_table(disk)[0], 0),
            "half a descriptor": lambda disk: (self.good_table(disk)[0], 8),
            "odd": lambda disk: (self.good_table(disk)[0], 47),
            "too long": lambda disk: (disk.memory.alloc(16 * 129, 16), 16 * 129),
            "much too long": lambda disk: (disk.memory.regions[1].guest, 0xFFFFFFF0),
            "nowhere": lambda disk: (NOWHERE, 48),
            "across the end": lambda disk: (disk.memory.regions[1].end - 16, 48),
            "round": lambda disk: ((1 << 64) - 16, 48),
            "link out": lambda disk: table(disk, (*pieces(disk)[0][:2], NEXT, 3), (0, 512, WRITE, 0), (0, 1, WRITE, 0)),
            "circle": lambda disk: table(disk, (*pieces(disk)[0][:2], NEXT, 0)),
            "nested": lambda disk: table(disk, (*self.good_table(disk), INDIRECT, 0)),
        }
        for name, make in cases.items():
            with self.subTest(name):
                self.attack(self.indirect(make))
        self.attack(self.indirect(self.good_table, INDIRECT | NEXT, 6))
        self.next_works()

    def test_indirect_tables_that_were_not_agreed_on(self):
        self.attack(self.indirect(self.good_table), indirect=False)
        self.next_works()

    def test_what_was_in_flight_is_still_answered(self):
        disk = self.disk("slow")
        requests = [disk.submit(IN, room=4096) for _ in range(8)]
        disk.queues[0].ring.offer(999)
        disk.queues[0].publish(always=True)
        disk.wait_broken()

        def answered():
            disk.reap(disk.queues[0])
            return all(request.done for request in requests)
        wait_for(answered, "requests that were taken before")
        self.assertEqual({request.status for request in requests}, {OK})
        # Nothing is taken any more, however often it is kicked.
        disk.queues[0].publish(always=True)
        # The front end can still talk, and begin again.
        disk.stop_queue(disk.queues[0])
        self.assertGreater(disk.connection.synchronize(), 0)

    def test_other_queues_of_the_device_can_be_stopped(self):
        self.server.stop()
        self.serve(num_queues=2)
        disk = self.disk(queues=2)
        disk.queues[0].ring.offer(999)
        disk.queues[0].publish(always=True)
        disk.wait_broken()
        disk.stop()


class Packed(Hostile):
    def put(self, *entries, number=0):
        """Descriptors (address, length, flags)."""
        def what(disk, ring):
            ring.put([entry(disk) if callable(entry) else entry for entry in entries], number)
        return what

    def good_table(self, disk):
        return table(disk, *((a, n, 0, WRITE if w else 0) for a, n, w in pieces(disk)))

    def test_an_id_that_is_in_flight(self):
        def what(disk, ring):
            for _ in range(2):
                ring.put([(a, n, WRITE if w else 0) for a, n, w in pieces(disk)], 7)
        self.attack(what, True, "slow")

    def test_ids_beyond_the_ring(self):
        """The format allows any: they are served or refused, never written through."""
        disk = self.disk(packed=True)
        disk.queues[0].ring.put([(a, n, WRITE if w else 0) for a, n, w in pieces(disk)], 0xFFFF)
        disk.queues[0].publish(always=True)
        ring = disk.queues[0].ring
        wait_for(lambda: ring.used_now() or readable([disk.queues[0].err]), "an answer or the end")
        disk.close()
        self.next_works()

    def test_chains_without_an_end(self):
        def what(disk, ring):
            good = pieces(disk)
            ring.put([(good[0][0], 16, NEXT)] * 128, 1)
        self.attack(what, True)
        self.next_works()

    def test_indirect_tables(self):
        for name, entry in {
                "empty": lambda disk: (self.good_table(disk)[0], 0, INDIRECT),
                "odd": lambda disk: (self.good_table(disk)[0], 47, INDIRECT),
                "too long": lambda disk: (disk.memory.alloc(16 * 129, 16), 16 * 129, INDIRECT),
                "much too long": lambda disk: (disk.memory.regions[1].guest, 0xFFFFFFF0, INDIRECT),
                "nowhere": lambda disk: (NOWHERE, 48, INDIRECT),
                "nested": lambda disk: (*table(disk, (*self.good_table(disk), 0, INDIRECT)), INDIRECT)}.items():
            with self.subTest(name):
                self.attack(self.put(entry), True)
        with self.subTest("with more descriptors"):
            self.attack(self.put(lambda disk: (*self.good_table(disk), INDIRECT | NEXT), lambda disk: (disk.memory.alloc(8), 8, WRITE)),
                        True)
        with self.subTest("not agreed on"):
            self.attack(self.put(lambda disk: (*self.good_table(disk), INDIRECT)), True, indirect=False)
        self.next_works()


class Eventfds(Hostile):
    """Both ends have the flags of a shared eventfd: without O_NONBLOCK a read or a write of the daemon's would wait for the front end."""

    def setUp(self):
        VhostCase.setUp(self)
        require_gantry("the reference waits")
        # One thread for all of them.
        self.server = self.daemon("--object", "iothread,id=one", *self.node_option(), *self.export_option(iothread="one"),
                                  *self.export_option("other", node="disk", writable=False, iothread="one"))
        self.bystander = self.disk("other")

    def others_go_on(self):
        self.bystander.finish(self.bystander.submit(IN, room=4096), deadline=5)
        self.server.qmp.cmd("query-vhost-user-exports")

    def fill(self, fd):
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        os.eventfd_write(fd, (1 << 64) - 2)
        os.set_blocking(fd, True)

    def test_a_call_that_is_full(self):
        disk = self.disk()
        for _ in range(3):
            self.fill(disk.queues[0].call)
            request = disk.submit(IN, room=4096)
            self.others_go_on()
            disk.finish(request)
        self.next_works()

    def test_an_error_eventfd_that_is_full(self):
        disk = self.disk()
        self.fill(disk.queues[0].err)
        disk.queues[0].ring.offer(999)
        disk.queues[0].publish(always=True)
        wait_for(lambda: self.server.qmp.cmd("query-vhost-user-exports")[-1]["front-end"]["queues"][0].get("broken"), "the queue to break")
        self.others_go_on()

    def test_a_kick_that_is_taken_back(self):
        disk = self.disk()
        kick, count = disk.queues[0].kick, bytearray(8)
        os.set_blocking(kick, True)
        rng = random.Random(41)
        for turn in range(2000):
            os.eventfd_write(kick, 1)
            for _ in range(rng.randrange(60)):
                pass
            with contextlib.suppress(BlockingIOError):
                os.preadv(kick, [count], -1, os.RWF_NOWAIT)
            if turn % 20 == 0:
                self.others_go_on()
        disk.close()
        self.next_works()


class Noise(Hostile):
    def test_random_rings(self):
        """Rings full of anything, changed while the device looks."""
        rng = random.Random(21)
        for n in range(60):
            packed = n % 2 == 1
            disk = self.disk(packed=packed, queue_size=64, event_idx=rng.random() < 0.5)
            ring = disk.queues[0].ring
            memory = disk.memory.regions[1]
            for _ in range(20):
                for slot in range(64):
                    address = rng.choice((memory.guest + rng.randrange(64) * 512, rng.getrandbits(64), memory.end - 100))
                    length = rng.choice((16, 512, 1, 4096, rng.getrandbits(32)))
                    flags = rng.choice((0, NEXT, NEXT | WRITE, WRITE, INDIRECT, rng.getrandbits(16)))
                    if packed:
                        struct.pack_into("=QIHH", ring.desc, 16 * slot, address, length, rng.randrange(70), flags)
                    else:
                        ring.set_descriptor(slot, address, length, flags & 7, rng.randrange(66))
                        ring.avail[2 + slot] = rng.randrange(65)
                disk.memory.write(memory.guest + rng.randrange(64) * 512, struct.pack("=IIQ", rng.randrange(16), 0, rng.randrange(20000)))
                if not packed:
                    ring.avail[1] = (ring.used[1] + rng.randrange(66)) & 0xFFFF
                os.eventfd_write(disk.queues[0].kick, 1)
            disk.connection.synchronize()
            disk.close()
        self.next_works()

    def test_ring_addresses(self):
        disk = self.disk(open=False)
        disk.connect()
        disk.connection.tell_u64(Msg.SET_FEATURES, disk.features())
        disk.send_memory()
        desc, driver, device = (disk.memory.user(a) for a in disk.queues[0].ring.areas)
        end = disk.memory.regions[0].user + disk.memory.regions[0].size
        disk.close()
        for name, addresses in {"nowhere": (NOWHERE, driver, device), "odd": (desc + 1, driver, device),
                                "used odd": (desc, driver, device + 2),
                                "avail odd": (desc, driver + 1, device), "across the end": (end - 64, driver, device),
                                "used across the end": (desc, driver, end - 16), "guest addresses": (0, 4096, 8192),
                                "round": ((1 << 64) - 64, driver, device)}.items():
            with self.subTest(name):
                disk = self.disk(open=False)
                disk.connect()
                disk.addresses = lambda queue, log=False, a=addresses: struct.pack("=IIQQQQ", 0, 0, a[0], a[2], a[1], 0)
                try:
                    disk.start()
                    disk.wait_broken(deadline=5)
                except (Refused, Closed):
                    pass
                disk.close()
        self.next_works()

    def test_inflight_regions(self):
        """What comes back as an inflight region is anything."""
        rng = random.Random(31)
        good = self.disk()
        size = struct.unpack_from("=Q", good.inflight[0])[0]
        good.close()
        for n in range(60):
            packed = n % 2 == 1
            disk = self.disk(open=False, packed=packed)
            fd = os.memfd_create("inflight")
            os.ftruncate(fd, 65536)
            numbers = (rng.choice((0, 5, 127, 128, rng.getrandbits(16))) for _ in range(4))
            header = struct.pack("=QHHHHHH", rng.choice((0, rng.getrandbits(64))), rng.choice((0, 1, 1, 1, 2, 999)),
                                 rng.choice((128, 128, 64, 129, 0, 65535)), *numbers)
            os.pwrite(fd, rng.randbytes(16384), 0)
            os.pwrite(fd, header, 0)
            if n % 3 == 0:  # mostly sensible: entries that point in circles
                for slot in range(128):
                    os.pwrite(fd, struct.pack("=B5xHQ", rng.randrange(2), rng.randrange(130), rng.randrange(5)), 16 + 16 * slot)
            disk.inflight = struct.pack("=QQHH4x", size, 0, 1, 128), fd
            try:
                disk.open()
                disk.queues[0].publish(always=True)
                disk.connection.synchronize()
            except (Refused, Closed):
                pass
            disk.close()
        self.next_works()


if __name__ == "__main__":
    gantry_test.main()
