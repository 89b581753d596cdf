#!/usr/bin/env python3
"""vhost-user: the memory of the guest: regions of any place, slots that come and go, tables replaced, files cut short."""

import os
import pathlib
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, require_gantry, wait_for
from vhost_case import SIZE, VhostCase
from vhost_disk import IN, OK, Model
from vhost_front import Broken, Closed, Msg, Refused, Region

DATA = bytes(range(256)) * (SIZE // 256)


def adjacent(count, size=64 * KIB, start=1 << 32, offset=0):
    return [Region(start + n * size, size, offset=offset * n) for n in range(count)]


class Memory(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("the reference has fewer slots and trusts them")
        self.serve(data=DATA)


class Layout(Memory):
    def test_buffers_across_borders(self):
        regions = [Region(0, MIB), *adjacent(6, offset=4096)]
        for packed in (False, True):
            disk = self.disk(regions=regions, packed=packed)
            for at in range(-1000, 1001, 125):
                memory = disk.memory
                address = memory.take(regions[2].guest - 1000 + at, 3000 + 64 * KIB)
                request = disk.chain(IN, 3, room=0, writable=[])
                request.writable = [(address, 512 * 100), (memory.alloc(1), 1)]
                disk.add(request)
                disk.queues[0].publish()
                disk.keep = True
                disk.finish(request)
                self.assertEqual((request.status, request.data), (OK, DATA[3 * 512:103 * 512]))
                disk.keep = False
                memory.release(address, 3000 + 64 * KIB)
            disk.close()

    def test_header_and_table_across_borders(self):
        regions = [Region(0, MIB), *adjacent(2)]
        disk = self.disk(regions=regions)
        memory, border = disk.memory, regions[2].guest
        for before in range(0, 17):
            request = disk.chain(IN, 1, room=512, readable=[])
            address = memory.take(border - before, 16)
            memory.write(address, struct.pack("=IIQ", IN, 0, 1))
            request.readable = [(address, 16)]
            self.assertEqual(disk.finish(self.now(disk, request)).data, DATA[512:1024])
        for before in range(0, 65, 4):
            ring = disk.queues[0].ring
            request = disk.chain(IN, 2, room=1024, writable=[512, 512, 1])
            table = memory.take(border - before, 64)
            memory.write(table, ring.table([(a, n, False) for a, n in request.readable] + [(a, n, True) for a, n in request.writable]))
            slot = ring.free_slots.pop()
            ring.set_descriptor(slot, table, 64, 4)
            ring.offer(slot)
            ring.pending[slot] = (table, 64), [slot]
            disk.requests[0][slot] = request
            disk.queues[0].publish()
            self.assertEqual(disk.finish(request).data, DATA[1024:2048])

    def now(self, disk, request):
        disk.add(request)
        disk.queues[0].publish()
        return request

    def test_many_regions_in_slots(self):
        regions = [Region(0, 256 * KIB)] + [Region((n << 33) + n * 4096, 8 * KIB, offset=n % 3 * 4096) for n in range(1, 200)]
        disk = self.disk(regions=regions, slots=True)
        for region in regions[1:]:
            self.assertEqual(disk.read(512, 4096, within=region), DATA[512:4608])

    def test_as_many_slots_as_are_promised(self):
        file = Region(0, MIB)
        front_regions = [file] + [Region(MIB + n * 4096, 4096, fd=os.dup(file.fd)) for n in range(508)]
        disk = self.disk(regions=front_regions, slots=True)
        self.works(disk)
        extra = Region(1 << 40, 4096)
        with self.assertRaises(Refused):
            disk.add_region(extra)
        self.works(disk)
        disk.remove_region(front_regions[-1])
        disk.add_region(extra)
        self.works(disk)

    def test_regions_with_odd_offsets(self):
        for offset in (512, 4096, 4608, 1 * MIB, 2 * MIB + 1024):
            with self.subTest(offset=offset):
                disk = self.disk(regions=[Region(0, MIB), Region(1 << 32, MIB, offset=offset)])
                self.assertEqual(disk.read(0, 4096, within=disk.memory.regions[1]), DATA[:4096])
                disk.close()

    def test_tables_that_make_no_sense(self):
        fd = os.memfd_create("memory")
        self.addCleanup(os.close, fd)
        os.ftruncate(fd, MIB)
        good = (0, MIB, 1 << 40, 0)
        for regions in ([(0, 0, 0, 0)], [(0, MIB + 4096, 0, 0)], [(0, MIB, 0, 4096)], [((1 << 64) - 4096, 8192, 0, 0)],
                        [(0, 8192, (1 << 64) - 4096, 0)], [(0, 8192, 0, (1 << 64) - 4096)], [(0, 1 << 63, 0, 1 << 63)],
                        [(0, (1 << 64) - 1, 0, 1)], [good, good], [good, (MIB - 4096, MIB, 1 << 41, 0)],
                        [good, (1 << 32, MIB, (1 << 40) + 4096, 0)]):
            with self.subTest(regions=regions):
                disk = self.disk(open=False)
                disk.connect()
                with self.assertRaises((Refused, Closed)):
                    disk.connection.tell(Msg.SET_MEM_TABLE, struct.pack("=II", len(regions), 0) + b"".join(
                        struct.pack("=QQQQ", *r) for r in regions), [fd] * len(regions))
                disk.close()
                if len(regions) == 1:
                    disk = self.disk(open=False)
                    disk.connect()
                    with self.assertRaises((Refused, Closed)):
                        disk.connection.tell(Msg.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", *regions[0]), [fd])
                    disk.close()
        self.works(self.disk())


class Changes(Memory):
    def test_slots_added_and_removed_while_rings_run(self):
        for packed in (False, True):
            disk = self.disk(regions=[Region(0, 2 * MIB)], slots=True, packed=packed)
            base = disk.memory.regions[0]
            for n in range(30):
                requests = [disk.submit(IN, 8 * i, room=4096, within=base) for i in range(30)]
                region = Region(1 << 32, MIB, user=0x1000_0000_0000 + n * MIB)
                disk.add_region(region)
                self.assertEqual(disk.read(0, 512 * KIB, within=region), DATA[:512 * KIB])
                requests += [disk.submit(IN, 0, room=4096, within=base)]
                disk.remove_region(region)
                disk.finish(*requests)
                for i, request in enumerate(requests[:30]):
                    self.assertEqual((request.status, request.data), (OK, DATA[4096 * i:4096 * i + 4096]))
            disk.close()

    def test_removal_ignores_the_offset_and_takes_exact_slots_only(self):
        disk = self.disk(regions=[Region(0, 2 * MIB)], slots=True)
        region = Region(1 << 32, MIB)
        disk.add_region(region)
        front = disk.connection
        for guest, size, user in ((1 << 32, MIB - 4096, region.user), (1 << 33, MIB, region.user), (1 << 32, MIB, region.user + 4096)):
            with self.assertRaises(Refused):
                front.tell(Msg.REM_MEM_REG, bytes(8) + struct.pack("=QQQQ", guest, size, user, 0))
        front.tell(Msg.REM_MEM_REG, bytes(8) + struct.pack("=QQQQ", 1 << 32, MIB, region.user, 12345))
        with self.assertRaises(Refused):
            front.tell(Msg.REM_MEM_REG, bytes(8) + region.wire())
        self.works(disk)

    def test_overlapping_slots_are_refused(self):
        disk = self.disk(regions=[Region(0, 2 * MIB)], slots=True)
        for region in (Region(MIB, 2 * MIB), Region(0, 4096), Region(1 << 32, MIB, user=disk.memory.regions[0].user + 4096)):
            with self.assertRaises(Refused):
                disk.connection.tell(Msg.ADD_MEM_REG, bytes(8) + region.wire(), [region.fd])
        self.works(disk)

    def test_the_table_is_replaced_while_rings_run(self):
        """The same guest memory at other user addresses, and one region more or less."""
        for packed in (False, True):
            disk = self.disk(regions=[Region(0, 2 * MIB)], packed=packed)
            base, more = disk.memory.regions[0], Region(1 << 32, MIB)
            for n in range(30):
                requests = [disk.submit(IN, 8 * i, room=4096, within=base) for i in range(30)]
                disk.memory.add(more) if n % 2 == 0 else disk.memory.remove(more)
                disk.send_memory()
                disk.finish(*requests)
                for i, request in enumerate(requests):
                    self.assertEqual((request.status, request.data), (OK, DATA[4096 * i:4096 * i + 4096]))
            disk.close()

    def test_model_while_memory_changes(self):
        disk = self.disk(regions=[Region(0, 8 * MIB)], slots=True, packed=True)
        model = Model(disk, SIZE, 3, most=32 * KIB)
        model.content[:] = DATA
        extra = Region(1 << 40, MIB)
        for _ in range(40):
            model.fill()
            disk.connection.tell(Msg.ADD_MEM_REG, bytes(8) + extra.wire(), [extra.fd])
            model.step()
            disk.connection.tell(Msg.REM_MEM_REG, bytes(8) + extra.wire())
        model.drain()
        model.verify(self.content())

    def test_ring_memory_taken_away(self):
        for packed in (False, True):
            disk = self.disk(regions=[Region(0, MIB), Region(1 << 32, MIB)], slots=True, packed=packed)
            self.works(disk)
            disk.connection.tell(Msg.REM_MEM_REG, bytes(8) + disk.memory.regions[0].wire())
            disk.wait_broken()
            disk.close()
            self.works(self.disk())

    def test_buffers_taken_away_under_requests(self):
        """What was taken still finishes, into memory that nobody sees any more."""
        self.server.stop()
        self.server = self.daemon(*self.null_option("disk", latency_ns=20_000_000), *self.export_option())
        disk = self.disk(regions=[Region(0, MIB), Region(1 << 32, MIB)], slots=True)
        for _ in range(5):
            requests = [disk.submit(IN, 0, room=4096, within=disk.memory.regions[1]) for _ in range(8)]
            wait_for(lambda: disk.taken() == len(requests) or disk.reap(disk.queues[0]), "the requests to be taken")
            region = disk.memory.regions[1]
            disk.connection.tell(Msg.REM_MEM_REG, bytes(8) + region.wire())
            disk.connection.tell(Msg.ADD_MEM_REG, bytes(8) + region.wire(), [region.fd])
            disk.finish(*requests)


class Cut(Memory):
    """Files of guest memory that are cut short under the device: its export breaks, others go on."""

    def both(self):
        self.server.qmp.cmd("block-export-add", {"type": "vhost-user-blk", "id": "other", "node-name": "disk",
                                                 "addr": {"type": "unix", "path": self.path("other.sock")}})
        return self.disk("other")

    def test_buffers(self):
        other = self.both()
        for packed in (False, True):
            disk = self.disk(regions=[Region(0, MIB), Region(1 << 32, MIB)], packed=packed)
            self.works(disk)
            bad = disk.memory.regions[1]
            request = disk.chain(IN, 0, room=0, writable=[])
            request.writable = [(bad.guest + 512 * KIB, 4096), (disk.memory.alloc(1), 1)]
            os.ftruncate(bad.fd, 4096)
            disk.keep = True
            disk.memory.read = lambda address, length: b"?" * length
            disk.add(request)
            disk.queues[0].publish()
            self.either(disk, request)
            disk.close()
            self.assertEqual(other.read(0, 4096), self.content(length=4096))
            self.works(self.disk())

    def either(self, disk, request):
        """The request fails, or the ring is given up."""
        try:
            disk.finish(request)
        except (Broken, Closed):
            pass

    def test_headers(self):
        other = self.both()
        disk = self.disk(regions=[Region(0, MIB), Region(1 << 32, MIB)])
        bad = disk.memory.regions[1]
        os.ftruncate(bad.fd, 0)
        request = disk.chain(IN, 0, room=512, readable=[])
        request.readable = [(bad.guest + 4096, 16)]
        disk.add(request)
        disk.queues[0].publish()
        disk.wait_broken()
        self.assertEqual(other.read(0, 4096), self.content(length=4096))
        disk.close()
        self.works(self.disk())

    def test_rings(self):
        other = self.both()
        for packed in (False, True):
            disk = self.disk(regions=[Region(0, MIB), Region(1 << 32, MIB)], packed=packed)
            self.works(disk)
            os.ftruncate(disk.memory.regions[0].fd, 0)
            os.eventfd_write(disk.queues[0].kick, 1)
            disk.wait_broken()
            self.assertEqual(other.read(0, 4096), self.content(length=4096))
            disk.close()
            self.works(self.disk())

    def test_inflight_region(self):
        other = self.both()
        disk = self.disk()
        self.works(disk)
        disk.inflight = disk.inflight[0], os.memfd_create("cut")
        disk.disconnect()
        os.ftruncate(disk.inflight[1], MIB)
        disk.open()
        self.works(disk)
        os.ftruncate(disk.inflight[1], 0)
        request = disk.submit(IN, room=512)
        self.either(disk, request)
        self.assertEqual(other.read(0, 4096), self.content(length=4096))
        disk.close()
        self.works(self.disk())


if __name__ == "__main__":
    gantry_test.main()
