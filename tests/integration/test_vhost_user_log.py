#!/usr/bin/env python3
"""vhost-user: the log of written pages, for live migration."""

import pathlib
import struct
import os
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, require_gantry
from vhost_case import SIZE, VhostCase
from vhost_disk import FLUSH, GET_ID, IN, OK, OUT
from vhost_front import F_LOG_ALL, Closed, Msg, Refused, Region

PAGE = 4096


def pages(*pieces):
    """Of (address, length)."""
    return {page for address, length in pieces for page in range(address // PAGE, (address + length - 1) // PAGE + 1)}


class Log(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("the reference logs whole rings")
        self.serve(data=bytes(range(256)) * (SIZE // 256))

    def marked(self, disk, request):
        """Pages marked by one request: those of data and status, those of the ring."""
        ring = disk.queues[0].ring
        disk.log_pages()
        disk.keep = True
        disk.add(request)
        disk.queues[0].publish()
        disk.finish(request)
        self.assertEqual(request.status, OK)
        marks = disk.log_pages()
        area = ring.areas[0] if ring.packed else ring.areas[2]
        length = 16 * ring.size if ring.packed else 6 + 8 * ring.size
        return marks, pages((area, length))

    def kinds(self):
        for packed in (False, True):
            yield self.disk(open=False, packed=packed, regions=[Region(0, 8 * MIB)], queue_size=64)

    def apart(self, disk):
        """Pages of their own for what is allocated next."""
        memory = disk.memory
        memory.free_ranges = [(-(-start // PAGE) * PAGE, end) for start, end in memory.free_ranges if end - start > 2 * PAGE]

    def test_every_page_that_is_written(self):
        for disk in self.kinds():
            disk.make_log()
            disk.log_all = True
            disk.open()
            for kind, room, out in ((IN, 64 * KIB, b""), (IN, 512, b""), (GET_ID, 20, b""), (OUT, 0, b"w" * 8192), (FLUSH, 0, b"")):
                self.apart(disk)
                header = disk.chain(kind, 0, out, room, writable=[])
                self.apart(disk)
                data = disk.memory.alloc(room, 1) if room else None
                self.apart(disk)
                status = disk.memory.alloc(1)
                header.writable = ([(data, room)] if room else []) + [(status, 1)]
                marks, ring = self.marked(disk, header)
                expected = pages(*header.writable)
                self.assertEqual(marks - ring, expected, kind)
                self.assertTrue(marks & ring, kind)

    def test_scattered_reads(self):
        for disk in self.kinds():
            disk.make_log()
            disk.log_all = True
            disk.open()
            for n in range(10):
                self.apart(disk)
                request = disk.chain(IN, 0, room=16384, writable=[5000, 1000 + n, 10384 - n, 1])
                marks, ring = self.marked(disk, request)
                self.assertEqual(marks - ring, pages(*request.writable))

    def test_only_when_it_is_on(self):
        for disk in self.kinds():
            disk.open()
            disk.make_log()
            disk.send_log()
            disk.read(0, 4096)
            self.assertEqual(disk.log_pages(), set())
            disk.switch_log(True)
            disk.read(0, 4096)
            self.assertNotEqual(disk.log_pages(), set())
            disk.switch_log(False)
            disk.log_pages()
            disk.read(0, 4096)
            self.assertEqual(disk.log_pages(), set())

    def test_switched_while_rings_run(self):
        """Every page that differs from a copy made when the log was switched on has been marked."""
        for disk in self.kinds():
            disk.open()
            region = disk.memory.regions[0]
            for n in range(10):
                requests = [disk.submit(IN, 8 * i, room=4096) for i in range(12)]
                disk.switch_log(True)
                before = bytes(region.view)
                more = [disk.submit(IN, 8 * (20 + (i + n) % 30), room=8192) for i in range(8)]
                disk.finish(*requests, *more)
                marks = disk.log_pages()
                for page in range(0, region.size, PAGE):
                    number = (region.guest + page) // PAGE
                    if number in marks or region.view[page:page + PAGE] == before[page:page + PAGE]:
                        continue
                    # What the driver itself writes is its own business: headers, tables, available ring, statuses.
                    self.assertTrue(number in self.drivers(disk, more), f"page {number} changed, and is not marked")
                disk.switch_log(False)

    def drivers(self, disk, requests):
        ring = disk.queues[0].ring
        own = pages(*(piece for r in requests for piece in r.readable), (ring.areas[0], 16 * ring.size), (ring.areas[1], 6 + 2 * ring.size))
        return own | pages(*(piece for r in requests for piece in r.writable[-1:])) - pages(
            *(piece for r in requests for piece in r.writable[:-1]))

    def test_a_log_that_is_replaced(self):
        for disk in self.kinds():
            disk.open()
            disk.switch_log(True)
            for offset in (0, 4096):
                old = disk.log
                disk.make_log(offset)
                disk.send_log()
                new, disk.log = disk.log, old
                disk.log_pages()  # until now a ring may have written that it listens
                disk.log = new
                disk.read(0, 4096)
                self.assertNotEqual(disk.log_pages(), set())
                disk.log = old
                self.assertEqual(disk.log_pages(), set())
                disk.log = new

    def test_a_log_that_is_too_small(self):
        for disk in self.kinds():
            disk.make_log()
            fd, offset, _, view = disk.log
            disk.log = fd, offset, 8, view  # 64 pages
            disk.log_all = True
            disk.open()
            far = disk.memory.take(4 * MIB, 4096)
            request = disk.chain(IN, 0, writable=[])
            request.writable = [(far, 4096), (disk.memory.alloc(1), 1)]
            disk.add(request)
            disk.queues[0].publish()
            disk.wait_broken()

    def test_logs_that_make_no_sense(self):
        for size, offset in ((0, 0), (1 << 63, 1 << 63), (8192, 0), (4096, 4096), ((1 << 64) - 1, 0)):
            disk = self.disk(open=False).connect()
            fd = os.memfd_create("log")
            os.ftruncate(fd, 4096)
            try:
                data, _ = disk.connection.ask(Msg.SET_LOG_BASE, struct.pack("=QQ", size, offset), [fd])
                self.assertNotEqual(data, bytes(8), (size, offset))
            except (Refused, Closed):
                pass
            os.close(fd)
            disk.close()
        self.works(self.disk())

    def test_the_feature_alone(self):
        """F_LOG_ALL without a log marks nothing and harms nothing."""
        disk = self.disk(open=False)
        disk.log_all = True
        try:
            disk.open()
            self.assertTrue(disk.chosen & F_LOG_ALL)
            self.works(disk)
        except (Refused, Closed):
            pass


if __name__ == "__main__":
    gantry_test.main()
