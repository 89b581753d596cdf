#!/usr/bin/env python3
"""vhost-user-blk: the configuration, its changes, the write cache, status and reset."""

import os
import pathlib
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import MIB, require_gantry
from vhost_case import SIZE, VhostCase
from vhost_disk import F_CONFIG_WCE, IN, IOERR, OK, OUT
from vhost_front import Msg, Refused

ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK = 1, 2, 8, 4


class Config(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("the reference knows less")

    def test_fields(self):
        self.serve(num_queues=3, logical_block_size=4096, x_queue_size=64)
        disk = self.disk(queues=3)
        data = disk.config()
        self.assertEqual(len(data), 96)
        self.assertEqual(struct.unpack_from("=Q", data, 0)[0], SIZE // 512)
        self.assertEqual(struct.unpack_from("=I", data, 8)[0], 0)  # size_max
        self.assertLessEqual(1, struct.unpack_from("=I", data, 12)[0])
        self.assertEqual(struct.unpack_from("=I", data, 20)[0], 4096)
        self.assertEqual(data[32], 1)
        self.assertEqual(struct.unpack_from("=H", data, 34)[0], 3)
        discard, count, alignment = struct.unpack_from("=III", data, 36)
        self.assertGreaterEqual(discard, 32768)
        self.assertGreaterEqual(count, 1)
        self.assertEqual(alignment % 8, 0)
        zeroes, count, unmap = struct.unpack_from("=IIB", data, 48)
        self.assertGreaterEqual(zeroes, 32768)
        self.assertGreaterEqual(count, 1)
        self.assertEqual(unmap, 1)
        self.assertEqual(data[57:], bytes(39))
        # As many segments as the configuration promises.
        segments = struct.unpack_from("=I", data, 12)[0]
        disk.write(0, b"s" * 4096 * segments, readable=[16] + [4096] * segments, indirect=True)

    def test_any_part_of_it(self):
        self.serve()
        disk = self.disk()
        whole = disk.config() + bytes(256)
        for offset in (0, 1, 8, 20, 32, 59, 60, 95, 96, 100, 255):
            for size in (1, 2, 4, 8, 60, 96, 256):
                if offset + size <= 256:
                    self.assertEqual(disk.config(offset, size), whole[offset:offset + size], (offset, size))
        for offset, size in ((256, 1), (1, 256), (200, 100), (0xFFFFFFFF, 1), (0xFFFFFFFF, 4)):
            self.assertIsNone(disk.config(offset, size), (offset, size))
        self.works(disk)

    def test_write_cache(self):
        self.serve()
        disk = self.disk()
        for on in (0, 1, 0, 0, 1):
            disk.set_wce(on)
            self.assertEqual(disk.field(32, "B"), on)
            self.works(disk)

    def test_nothing_else_can_be_written(self):
        self.serve()
        disk = self.disk()
        before = disk.config()
        for offset, data, flags in ((0, bytes(8), 0), (31, b"\0\0", 0), (32, b"\0\0", 0), (33, b"\0", 0), (32, b"\2", 0), (32, b"\xff", 0),
                                    (34, b"\5\0", 0), (32, b"", 0), (96, b"\0", 0), (255, b"\0", 0), (0xFFFFFFFF, b"\0", 0)):
            with self.subTest(offset=offset, data=data), self.assertRaises(Refused):
                disk.connection.tell(Msg.SET_CONFIG, struct.pack("=III", offset, len(data), flags) + data)
        self.assertEqual(disk.config(), before)
        self.works(disk)

    def test_write_cache_of_a_driver_without_the_feature(self):
        self.serve()
        disk = self.disk(features=~F_CONFIG_WCE)
        with self.assertRaises(Refused):
            disk.set_wce(0)
        self.assertEqual(disk.field(32, "B"), 1)

    def test_the_next_front_end_finds_it_as_at_first(self):
        self.serve()
        disk = self.disk()
        disk.set_wce(0)
        disk.close()
        self.assertEqual(self.disk().field(32, "B"), 1)


class Resize(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("the reference tells the size at other times")
        self.serve()

    def resize(self, size):
        self.server.qmp.cmd("block_resize", node_name="disk", size=size)

    def test_larger_and_smaller(self):
        disk = self.disk()
        for size in (2 * SIZE, SIZE // 2, SIZE):
            self.resize(size)
            disk.config_changed()
            self.assertEqual(disk.capacity, size // 512)
            self.assertEqual(disk.run(IN, size // 512, room=512), IOERR)
            self.assertEqual(disk.run(OUT, size // 512 - 1, b"l" * 512), OK)
            self.works(disk)

    def test_under_load(self):
        disk = self.disk()
        for size in range(9, 25):
            requests = [disk.submit(OUT, 64 * n, b"l" * 4096) for n in range(32)]
            self.resize(size * MIB)
            disk.finish(*requests)
            self.assertEqual({r.status for r in requests}, {OK})
            disk.config_changed()
            self.assertEqual(disk.capacity, size * MIB // 512)
            self.works(disk, (size - 1) * MIB)

    def test_a_front_end_without_the_channel(self):
        disk = self.disk(protocol=1 << 9 | 1 << 3)  # CONFIG, REPLY_ACK
        self.assertIsNone(disk.channel)
        self.resize(2 * SIZE)
        self.assertEqual(disk.capacity, 2 * SIZE // 512)
        self.works(disk, SIZE)

    def test_a_channel_that_nobody_reads_or_that_has_ended(self):
        disk = self.disk()
        for n in range(100):
            self.resize(SIZE + n * 4096)
        disk.channel.close()
        for n in range(100):
            self.resize(2 * SIZE + n * 4096)
        self.works(disk, SIZE)
        self.assertEqual(disk.capacity, (2 * SIZE + 99 * 4096) // 512)

    def test_while_nobody_is_connected(self):
        self.resize(2 * SIZE)
        self.assertEqual(self.disk().capacity, 2 * SIZE // 512)


class Status(VhostCase):
    def setUp(self):
        super().setUp()
        require_gantry("the reference has no status")
        self.serve(num_queues=2)

    def test_status_is_kept(self):
        disk = self.disk(open=False, queues=2).connect()
        front = disk.connection
        self.assertEqual(front.ask_u64(Msg.GET_STATUS), 0)
        for value in (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            front.tell_u64(Msg.SET_STATUS, value)
            self.assertEqual(front.ask_u64(Msg.GET_STATUS), value)
        front.tell_u64(Msg.SET_FEATURES, disk.features())
        front.tell_u64(Msg.SET_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self.assertEqual(front.ask_u64(Msg.GET_STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK)
        disk.start()
        front.tell_u64(Msg.SET_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        self.works(disk)

    def reset(self, how):
        """Reset with requests waiting, then everything from the start, on the same connection and memory."""
        disk = self.disk(queues=2)
        for _ in range(10):
            self.works(disk)
            how(disk.connection)
            request = disk.submit(OUT, 0, b"r" * 512)
            disk.queues[0].publish(always=True)
            disk.connection.synchronize()
            disk.reap(disk.queues[0])
            self.assertFalse(request.done)
            disk.requests = [{} for _ in disk.queues]
            for queue in disk.queues:
                queue.ring.pending.clear()
                for length, address in zip([n for n, _ in queue.ring.needs()], queue.ring.areas):
                    disk.memory.write(address, bytes(length))
                queue.ring.place()
            disk.connection.tell_u64(Msg.SET_FEATURES, disk.features())
            for queue in disk.queues:
                disk.start_queue(queue)
            disk.finish(disk.submit(IN, room=4096, queue=1))
        disk.connection.tell_u64(Msg.SET_STATUS, 0)
        self.assertEqual(disk.connection.ask_u64(Msg.GET_STATUS), 0)

    def test_reset_by_status(self):
        self.reset(lambda front: front.tell_u64(Msg.SET_STATUS, 0))

    def test_reset_by_message(self):
        self.reset(lambda front: front.tell(Msg.RESET_DEVICE))

    def test_reset_waits_for_what_is_in_flight(self):
        self.server.stop()
        self.server = self.daemon(*self.null_option("disk", latency_ns=30_000_000), *self.export_option())
        disk = self.disk()
        disk.finish(disk.submit(IN, room=512))
        requests = [disk.submit(IN, room=512) for _ in range(8)]
        disk.connection.tell(Msg.RESET_DEVICE)
        # What was taken has been answered by now, what was not never will be: nothing is written later.
        used = disk.queues[0].ring.used[1]
        for _ in range(100):
            disk.connection.synchronize()
        self.assertEqual(disk.queues[0].ring.used[1], used)
        disk.reap(disk.queues[0])
        self.assertLessEqual(sum(request.done for request in requests), len(requests))


if __name__ == "__main__":
    gantry_test.main()
