#!/usr/bin/env python3
"""The vhost-user load generator of bench/ against qemu-storage-daemon and against servers that lie: what it reports, what it
refuses, when it ends."""
# One configuration: no program of ours but the generator takes part.

import os
import pathlib
import struct
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
from gantry_test import listening, wait_for
from generator_case import MIB, GeneratorCase, Liar, main

VERSION_1, PROTOCOL = 1 << 32, 1 << 30


class BackEnd(Liar):
    """Answers each message by what `answers` says: {request: payload}; the others are ignored."""

    def __init__(self, path, answers):
        self.answers = answers
        super().__init__(path)

    def talk(self, client, stream):
        while len(header := stream.read(12)) == 12:
            request, _, size = struct.unpack("=III", header)
            stream.read(size)
            if (payload := self.answers.get(request)) is not None:
                client.sendall(struct.pack("=III", request, 5, len(payload)) + payload)


def config(sectors, block=512):
    """The answer to GET_CONFIG."""
    return struct.pack("=III", 0, 60, 0) + struct.pack("=QIIIIQQIIII", sectors, 0, 126, 0, block, 0, 0, 0, 0, 0, 0)[:60].ljust(60, b"\0")


class VhostGenerator(GeneratorCase):
    PROGRAM, SOCKET, RUNTIME = "gantry-bench-vhost", "socket", "100ms"

    def setUp(self):
        super().setUp()
        self.honest = {1: struct.pack("=Q", VERSION_1 | PROTOCOL), 15: struct.pack("=Q", 1 << 9), 24: config(MIB // 512),
                       11: struct.pack("=II", 0, 0)}

    def serve(self, *blockdev, export="writable=on,num-queues=4"):
        process = subprocess.Popen(
            ["qemu-storage-daemon", "--blockdev", *blockdev, "--export",
             "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=%s,%s" % (self.socket, export)])
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)

        def ready():
            self.assertIsNone(process.poll(), "the server has ended")
            return listening(self.socket)
        wait_for(ready, "the server's socket")

    def test_numbers_agree_with_each_other(self):
        self.serve("driver=null-co,node-name=disk,size=16777216,read-zeroes=on")
        ways = [["--qd=1"], ["--qd=32"], ["--qd=32", "--event-idx"], ["--qd=32", "--event-idx", "--indirect"], ["--qd=32", "--spin"],
                ["--qd=8", "--queues=3", "--threads=2"], ["--qd=4", "--bs=256k", "--segments=64"], ["--rw=write", "--qd=4"],
                ["--rw=randwrite", "--qd=4", "--indirect"], ["--rw=read", "--queues=2", "--qd=64", "--ring-size=64", "--indirect"]]
        for way in ways:
            with self.subTest(way=way):
                got = self.measure(*way)
                self.assertEqual(got["bytes"], got["ios"] * got["bs"])
                self.assertEqual(got["capacity"], 16 * MIB)
                self.assertGreater(got["ios"], 10)
                self.assertAlmostEqual(got["iops"], got["ios"] / got["seconds"], delta=got["iops"] * 0.01)
                self.assertGreaterEqual(got["seconds"], 0.08)
                self.assertLess(got["seconds"], 5)
                self.assertLessEqual(got["lat_p50_us"], got["lat_p99_us"])
                self.assertGreater(got["kicks"], 0)
                self.assertGreater(got["client_cpu_s"], 0)
                if "--spin" in way:
                    self.assertEqual(got["sleeps"], 0)
                else:
                    self.assertGreaterEqual(got["signals"], got["sleeps"] // 2)

    def test_what_is_written_lies_where_it_should(self):
        image = os.path.join(self.directory.name, "image")
        with open(image, "wb") as file:
            file.truncate(MIB)
        self.serve("driver=file,node-name=disk,filename=" + image)
        self.measure("--rw=write", "--bs=64k", "--qd=4", "--segments=16", "--offset=256k", "--size=512k")
        with open(image, "rb") as file:
            data = file.read()
        self.assertFalse(any(data[:256 << 10]))
        self.assertFalse(any(data[768 << 10:]))
        for block in range(256 << 10, 768 << 10, 64 << 10):
            self.assertIn(data[block], (1, 2, 3, 4))  # the slot that wrote it
            self.assertEqual(data[block:block + 65536], data[block:block + 1] * 65536)

    def test_what_the_server_lacks_is_named(self):
        self.serve("driver=null-co,node-name=disk,size=1048576,read-zeroes=on", export="num-queues=2")
        self.refuse(1, "the disk is read-only", "--rw=randwrite")
        self.refuse(1, "feature bit 34", "--packed")
        self.refuse(1, "the server has 2 queues at most", "--queues=3")
        self.refuse(1, "--offset and --size reach beyond the disk", "--offset=512k", "--size=1M")
        self.refuse(1, "the disk is too small", "--bs=2M")

    def test_errors_of_the_server_are_named(self):
        error = "driver=blkdebug,node-name=disk,image.driver=null-co,image.size=1048576,inject-error.0.event=none,inject-error.0.errno=5"
        self.serve(error)
        self.refuse(1, "was answered with status 1", "--qd=4")

    def test_silent_server_ends_the_run(self):
        begun = time.monotonic()
        for way in ([], ["--spin"]):
            self.socket = os.path.join(self.directory.name, "silent%d" % len(way))
            with BackEnd(self.socket, self.honest):
                self.refuse(1, "the server has not answered for 200 ms; 4 requests are outstanding", "--qd=4", "--stall=200ms", *way)
        self.assertLess(time.monotonic() - begun, 10)

    def test_broken_replies_are_refused(self):
        lies = {"the server does not answer": {},
                "was answered with message 15 of 4 bytes, expected 8": {**self.honest, 15: b"1234"},
                "does not offer feature bit 32": {**self.honest, 1: struct.pack("=Q", PROTOCOL)},
                "no configuration space": {**self.honest, 15: bytes(8)},
                "--bs must be a multiple of the disk's block size, 8192": {**self.honest, 24: config(MIB // 512, 8192)},
                "the disk has 18446744073709551615 sectors": {**self.honest, 24: config((1 << 64) - 1)}}
        for number, (sentence, answers) in enumerate(lies.items()):
            with self.subTest(sentence=sentence):
                self.socket = os.path.join(self.directory.name, "liar.%d" % number)
                with BackEnd(self.socket, answers):
                    self.refuse(1, sentence, "--stall=200ms")

    def test_wrong_usage_is_refused(self):
        self.refuse(2, "--bs must be a multiple of 512", "--bs=1000")
        self.refuse(2, "--rw=sideways: expected randread", "--rw=sideways")
        self.refuse(2, "needs 96 descriptors", "--qd=32", "--ring-size=64")
        self.refuse(2, "must be a power of two", "--ring-size=100")
        self.refuse(2, "--segments must divide --bs", "--segments=3")
        self.refuse(1, "connecting to " + self.socket + ": No such file or directory")


if __name__ == "__main__":
    main(VhostGenerator.PROGRAM, "qemu-storage-daemon")
