#!/usr/bin/env python3
"""vhost-user-blk: every type of request and its rules, in any layout of descriptors.

GANTRYD=qemu-storage-daemon runs what the reference has in the same way.
"""

import os
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import IS_GANTRY, KIB, MIB, require_gantry
from vhost_case import SIZE, VhostCase
from vhost_disk import (DISCARD, FLUSH, FLUSH_OUT, GET_ID, IN, IOERR, OK, OUT, UNMAP, UNSUPP, WRITE_ZEROES, cut,
                        segments)
from vhost_front import Region

END = SIZE // 512
DATA = random.Random(5).randbytes(SIZE)


class Requests(VhostCase):
    def setUp(self):
        super().setUp()
        self.serve(data=DATA)
        self.guest = self.disk()

    def status(self, expected, kind, *arguments, length=1, **options):
        """Of one request, which must leave the image alone unless it succeeds."""
        request = self.guest.finish(self.guest.submit(kind, *arguments, **options))
        self.assertEqual(request.status, expected, (kind, arguments, options))
        self.assertEqual(request.length, length)
        return request

    def untouched(self):
        self.assertEqual(self.content(), DATA)


class Data(Requests):
    def test_reads_and_writes_of_all_sizes(self):
        model = bytearray(DATA)
        rng = random.Random(1)
        for sectors in (1, 2, 7, 8, 9, 64, 127, 128, 2048, 4096):
            offset = 512 * rng.randrange(END - sectors + 1)
            data = rng.randbytes(512 * sectors)
            self.guest.write(offset, data)
            model[offset:offset + len(data)] = data
            self.assertEqual(self.guest.read(offset, len(data)), data)
        self.guest.flush()
        self.assertEqual(self.content(), model)

    def test_first_and_last_sectors(self):
        for sector in (0, END - 1):
            self.guest.write(512 * sector, b"e" * 512)
            self.assertEqual(self.guest.read(512 * sector, 512), b"e" * 512)
        self.assertEqual(self.guest.read(0, SIZE), self.content())

    def test_nothing_beyond_the_end(self):
        for sector, sectors in ((END, 1), (END - 1, 2), (END - 8, 9), (END + 1, 1), (1 << 55, 1), ((1 << 55) - 1, 2),
                                ((1 << 64) - 1, 1), ((1 << 64) - 1, 2), ((1 << 63) // 512, 1)):
            with self.subTest(sector=sector, sectors=sectors):
                self.status(IOERR, IN, sector, room=512 * sectors, length=1 if IS_GANTRY else 512 * sectors + 1)
                self.status(IOERR, OUT, sector, b"n" * 512 * sectors)
        self.untouched()

    def test_whole_sectors_only(self):
        for odd in (1, 511, 513, 1000, 4095):
            with self.subTest(bytes=odd):
                self.status(IOERR, IN, 0, room=odd, length=1 if IS_GANTRY else odd + 1)
                self.status(IOERR, OUT, 0, b"n" * odd)
        self.untouched()

    def test_no_data_at_all(self):
        for kind in (IN, OUT):
            request = self.guest.finish(self.guest.submit(kind, 0))
            self.assertIn(request.status, (OK, IOERR), kind)
        self.untouched()

    def test_any_layout_of_descriptors(self):
        rng = random.Random(2)
        model = bytearray(DATA)
        for indirect in (False, True):
            for sectors in (1, 8, 100):
                for pieces in (1, 2, 20, 60):
                    offset = 512 * rng.randrange(END - sectors)
                    data = rng.randbytes(512 * sectors)
                    self.guest.write(offset, data, indirect=indirect, readable=cut(16 + len(data), rng, pieces))
                    model[offset:offset + len(data)] = data
                    got = self.guest.read(offset, len(data), indirect=indirect, readable=cut(16, rng, 8),
                                          writable=cut(len(data) + 1, rng, pieces))
                    self.assertEqual(got, data)
        self.assertEqual(self.content(), model)

    def test_header_and_status_in_single_bytes(self):
        self.guest.write(1024, b"b" * 512, readable=[1] * 16 + [511, 1])
        self.assertEqual(self.guest.read(1024, 512, readable=[1] * 16, writable=[1, 510, 1, 1]), b"b" * 512)

    def test_header_with_data_in_one_descriptor_and_status_with_data(self):
        self.guest.write(0, b"h" * 1024, readable=[16 + 1024])
        self.assertEqual(self.guest.read(0, 1024, writable=[1025]), b"h" * 1024)

    def test_vectors_of_64_and_more_segments(self):
        rng = random.Random(3)
        for count in (64, 126):
            data = rng.randbytes(512 * count)
            self.guest.write(0, data, readable=[16] + [512] * count, indirect=True)
            self.assertEqual(self.guest.read(0, len(data), writable=[512] * count + [1], indirect=True), data)
        data = rng.randbytes(64 * 4096)
        self.guest.write(MIB, data, readable=[16] + [4096] * 64)
        self.assertEqual(self.guest.read(MIB, len(data), writable=[4096] * 64 + [1]), data)

    def test_more_segments_than_a_system_call_takes(self):
        require_gantry("rings of 1024 entries with parts of odd sizes")
        guest = self.disk(queue_size=1024)
        data = random.Random(4).randbytes(512 * 1000)
        guest.write(512, data, readable=[16] + [512] * 1000, indirect=True)
        self.assertEqual(guest.read(512, len(data), writable=[512] * 1000 + [1], indirect=True), data)
        pieces = [100] * 1000
        guest.write(0, data[:102400], readable=[16, *pieces, 2400], indirect=True)
        self.assertEqual(guest.read(0, 102400, writable=[*pieces, 2401], indirect=True), data[:102400])

    def test_ioprio_is_ignored(self):
        self.guest.write(0, b"p" * 512, ioprio=0xFFFFFFFF)
        self.assertEqual(self.content(length=512), b"p" * 512)


class Others(Requests):
    def test_flush(self):
        self.status(OK, FLUSH)
        self.status(OK, FLUSH, 12345)

    def test_identity(self):
        serial = b"disk" if IS_GANTRY else b"vhost_user_blk"
        self.assertEqual(self.guest.get_id()[:len(serial) + (1 if IS_GANTRY else 0)].rstrip(b"\0"), serial)
        if IS_GANTRY:
            request = self.guest.finish(self.guest.submit(GET_ID, room=20))
            self.assertEqual((request.data, request.length), (b"disk".ljust(20, b"\0"), 21))
            for room in (1, 3, 19):
                request = self.guest.finish(self.guest.submit(GET_ID, room=room))
                self.assertEqual((request.status, request.data, request.length), (OK, b"disk".ljust(20, b"\0")[:room], room + 1))
            request = self.guest.finish(self.guest.submit(GET_ID, room=64, writable=[1] * 30 + [35]))
            self.assertEqual((request.status, request.data[:20]), (OK, b"disk".ljust(20, b"\0")))

    def test_types_that_we_do_not_have(self):
        for kind in (2, 3, 6, 7, 9, 10, 12, 14, *range(15, 28), 100, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF):
            with self.subTest(kind=kind):
                if not IS_GANTRY and (kind >> 31 or kind & 1 and kind not in (3, 7)):
                    continue  # the reference looks at some bits only
                request = self.guest.submit(kind, 0, b"u" * 512)
                self.assertEqual(self.guest.finish(request).status, UNSUPP)
                request = self.guest.finish(self.guest.submit(kind, 0, room=512))
                self.assertEqual(request.status, UNSUPP)
                self.assertEqual(request.length, 1 if IS_GANTRY else 513)
        self.untouched()

    def test_legacy_flush(self):
        self.assertIn(self.guest.run(FLUSH_OUT), (OK, UNSUPP))
        self.untouched()


class Ranges(Requests):
    def test_discard_and_write_zeroes(self):
        self.assertEqual(self.guest.write_zeroes((8, 8, 0)), OK)
        self.assertEqual(self.guest.read(0, 16 * 1024), DATA[:4096] + bytes(4096) + DATA[8192:16384])
        if IS_GANTRY:
            self.assertEqual(self.guest.write_zeroes((1024, 512, UNMAP)), OK)
            self.assertEqual(self.content(offset=512 * 1024, length=256 * KIB), bytes(256 * KIB))
        self.assertEqual(self.guest.discard((4096, 2048, 0)), OK)
        got = self.guest.read(2 * MIB, MIB)
        self.assertIn(got, (bytes(MIB), DATA[2 * MIB:3 * MIB]))

    def test_unmapped_ranges_take_no_space(self):
        require_gantry("unmap is not offered by the reference")
        before = os.stat(self.path("disk.raw")).st_blocks
        self.assertEqual(self.guest.discard((0, END // 2, 0)), OK)
        self.assertLess(os.stat(self.path("disk.raw")).st_blocks, before * 6 // 10)
        self.assertEqual(self.guest.write_zeroes((END // 2, END // 2, UNMAP)), OK)
        self.assertLess(os.stat(self.path("disk.raw")).st_blocks, before // 10)
        self.assertEqual(self.content(), bytes(SIZE))

    def test_limits_are_as_the_configuration_says(self):
        sectors, count = self.guest.field(36, "I"), self.guest.field(40, "I")
        zero_sectors, zero_count, may_unmap = self.guest.field(48, "I"), self.guest.field(52, "I"), self.guest.field(56, "B")
        self.assertGreaterEqual(min(sectors, zero_sectors), END)
        self.status(IOERR, DISCARD, out=segments((0, sectors + 1, 0)))
        self.status(IOERR, WRITE_ZEROES, out=segments((0, zero_sectors + 1, 0)))
        require_gantry("the reference takes one segment, always")
        self.assertEqual(may_unmap, 1)
        for kind, most in ((DISCARD, count), (WRITE_ZEROES, zero_count)):
            self.status(OK, kind, out=segments(*((8 * n, 8, 0) for n in range(most))))
            self.assertIn(self.guest.run(kind, out=segments(*((8 * n, 8, 0) for n in range(most + 1)))), (IOERR, UNSUPP))
        self.assertEqual(self.guest.read(0, 4096 * zero_count), bytes(4096 * zero_count))

    def test_flags(self):
        for kind in (DISCARD, WRITE_ZEROES):
            for flags in (2, 4, 3, 0x80000000, 0xFFFFFFFF):
                with self.subTest(kind=kind, flags=flags):
                    self.status(UNSUPP, kind, out=segments((0, 8, flags)))
        self.status(UNSUPP, DISCARD, out=segments((0, 8, UNMAP)))
        if IS_GANTRY:  # flags come first
            self.status(UNSUPP, DISCARD, out=segments((1 << 60, 8, UNMAP)))
        self.untouched()

    def test_ranges_beyond_the_end(self):
        for kind in (DISCARD, WRITE_ZEROES):
            for sector, sectors in ((END, 1), (END - 1, 2), (END + 100, 1), (1 << 60, 1), ((1 << 64) - 1, 1), ((1 << 64) - 1, 8),
                                    ((1 << 55) - 1, 2)):
                with self.subTest(kind=kind, sector=sector):
                    self.status(IOERR, kind, out=segments((sector, sectors, 0)))
        self.untouched()

    def test_payloads_that_are_no_segments(self):
        require_gantry("the reference answers UNSUPP or IOERR as it comes")
        for kind in (DISCARD, WRITE_ZEROES):
            for length in (0, 1, 8, 15, 17, 31, 33):
                with self.subTest(kind=kind, length=length):
                    self.assertIn(self.guest.run(kind, out=bytes(length)), (IOERR, UNSUPP))
        self.untouched()

    def test_nothing_is_done_when_one_segment_is_wrong(self):
        require_gantry("the reference takes one segment, always")
        good = (0, 64, 0)
        for kind in (DISCARD, WRITE_ZEROES):
            for bad, status in (((END, 1, 0), IOERR), ((0, 8, 2), UNSUPP), ((0, 0xFFFFFFFF, 0), IOERR)):
                self.status(status, kind, out=segments(good, good, bad))
                self.status(status, kind, out=segments(bad, good))
        self.untouched()

    def test_no_sectors(self):
        require_gantry()
        self.status(OK, DISCARD, out=segments((0, 0, 0)))
        self.status(OK, WRITE_ZEROES, out=segments((END, 0, 0), (5, 0, UNMAP)))
        self.untouched()

    def test_segments_over_several_descriptors(self):
        request = self.guest.submit(WRITE_ZEROES, out=segments((8, 8, 0)), readable=[5, 15, 3, 9])
        self.assertEqual(self.guest.finish(request).status, OK)
        self.assertEqual(self.guest.read(4096, 4096), bytes(4096))


class Shapes(VhostCase):
    """Exports of other kinds."""

    def test_read_only(self):
        self.serve(data=DATA, writable=False)
        guest = self.disk()
        self.assertTrue(guest.offered & 1 << 5)
        self.assertEqual(guest.read(0, SIZE), DATA)
        self.assertEqual(guest.run(OUT, 0, b"w" * 512), IOERR)
        self.assertEqual(guest.run(OUT, END, b"w" * 512), IOERR)
        self.assertEqual(guest.run(FLUSH), OK)
        self.assertEqual(guest.discard((0, 8, 0)), IOERR)
        self.assertEqual(guest.write_zeroes((0, 8, 0)), IOERR)
        if IS_GANTRY:
            self.assertFalse(guest.offered & (1 << 13 | 1 << 14))
        self.assertEqual(self.content(), DATA)

    def test_logical_blocks_of_4096_bytes(self):
        self.serve(data=DATA, logical_block_size=4096)
        guest = self.disk()
        self.assertEqual(guest.field(20, "I"), 4096)
        self.assertEqual(guest.capacity, END)
        self.assertEqual(guest.read(SIZE - 4096, 4096), DATA[-4096:])
        guest.write(8192, b"4" * 4096)
        for kind, more in ((IN, {"room": 4096}), (OUT, {"out": b"w" * 4096})):
            for sector in (1, 7, 9):
                self.assertEqual(guest.run(kind, sector, **more), IOERR)
        if IS_GANTRY:
            self.assertEqual(guest.run(IN, 0, room=512), IOERR)
            self.assertEqual(guest.run(OUT, 8, b"w" * 2048), IOERR)
            for bad in ((1, 8, 0), (0, 7, 0), (8, 4, 0)):
                self.assertEqual(guest.discard(bad), IOERR)
                self.assertEqual(guest.write_zeroes(bad), IOERR)
        self.assertEqual(guest.write_zeroes((24, 8, 0)), OK)
        self.assertEqual(self.content(length=16384), DATA[:8192] + b"4" * 4096 + bytes(4096))

    def test_half_a_block_at_the_end_is_not_seen(self):
        require_gantry("the reference says so, but serves it")
        self.serve(data=DATA[:MIB], size=MIB + 2560, logical_block_size=4096)
        guest = self.disk()
        self.assertEqual(guest.capacity, 2048)
        self.assertEqual(guest.run(IN, 2048, room=512), IOERR)
        self.assertEqual(guest.read(0, MIB), DATA[:MIB])

    def test_errors_of_the_image_are_errors_of_the_request(self):
        self.server = self.daemon(
            "--blockdev", f"driver=file,node-name=short,filename={self.image('short', 1 * MIB)}",
            *self.export_option("short"))
        guest = self.disk("short")
        os.truncate(self.path("short.raw"), 0)
        request = guest.finish(guest.submit(IN, 0, room=4096))
        self.assertIn(request.status, (OK, IOERR))
        self.works(guest)

    def test_serial_number(self):
        require_gantry("the reference has one for all")
        self.serve(x_serial="0123456789abcdefghij")
        guest = self.disk()
        self.assertEqual(guest.get_id(), b"0123456789abcdefghij")
        kind, text = self.server.qmp.error("block-export-add", {
            "type": "vhost-user-blk", "id": "other", "node-name": "disk",
            "addr": {"type": "unix", "path": self.path("other.sock")}, "x-serial": "0123456789abcdefghijk"})
        self.assertEqual(kind, "GenericError")
        self.assertIn("20", text)

    def test_requests_that_are_too_large_are_answered(self):
        require_gantry("a limit of ours")
        self.serve(size=64 * MIB)
        guest = self.disk(regions=[Region(0, 40 * MIB)])
        request = guest.finish(guest.submit(IN, 0, room=33 * MIB))
        self.assertEqual((request.status, request.length), (IOERR, 1))
        self.assertEqual(len(guest.read(0, 31 * MIB)), 31 * MIB)


if __name__ == "__main__":
    gantry_test.main()
