#!/usr/bin/env python3
"""The load generator of bench/ against nbdkit and against servers that lie: what it reports, what it refuses, when it ends."""

import os
import pathlib
import socket
import struct
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
from generator_case import MIB, GeneratorCase, Liar, main


class Nbdkit:
    """nbdkit on a socket that already listens, so that nobody has to wait for it."""

    def __init__(self, path, *arguments):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        script = 'LISTEN_PID=$$ LISTEN_FDS=1 exec nbdkit -f "$@" 3<&%d' % self.listener.fileno()
        self.process = subprocess.Popen(["sh", "-c", script, "sh", *arguments], pass_fds=[self.listener.fileno()],
                                        stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.listener.close()


class Nbd(Liar):
    """Negotiates properly (1 MiB, simple replies) and then answers each request with `answer(request)`."""

    def __init__(self, path, answer):
        self.answer = answer
        super().__init__(path)

    def talk(self, client, stream):
        client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        stream.read(4)
        _, option, length = struct.unpack(">8sII", stream.read(16))
        stream.read(length)
        reply = struct.pack(">QI", 0x3E889045565A9, option)
        client.sendall(reply + struct.pack(">IIHQH", 3, 12, 0, MIB, 1) + reply + struct.pack(">II", 1, 0))
        while request := stream.read(28):
            client.sendall(self.answer(request))


class LoadGenerator(GeneratorCase):
    PROGRAM, SOCKET, RUNTIME = "gantry-bench-load", "unix", "200ms"

    def test_numbers_agree_with_each_other(self):
        with Nbdkit(self.socket, "memory", "16M"):
            got = self.measure("--rw=randread", "--bs=4k", "--qd=32")
        self.assertEqual(got["bytes"], got["ios"] * 4096)
        self.assertEqual(got["export_size"], 16 * MIB)
        self.assertGreater(got["ios"], 100)
        self.assertAlmostEqual(got["iops"], got["ios"] / got["seconds"], delta=got["iops"] * 0.01)
        self.assertGreaterEqual(got["seconds"], 0.15)
        self.assertLess(got["seconds"], 5)
        self.assertLessEqual(got["lat_p50_us"], got["lat_p99_us"])
        self.assertGreater(got["client_cpu_s"], 0)

    def test_every_byte_is_verified_in_every_way_to_connect(self):
        ways = [["--qd=1"], ["--qd=32"], ["--qd=16", "--structured"], ["--qd=8", "--connections=5", "--threads=2"],
                ["--qd=8", "--bs=64k", "--structured", "--connections=2"]]
        for rw in ("randrw", "write", "randread"):
            for number, way in enumerate(ways):
                with self.subTest(rw=rw, way=way):
                    self.socket = os.path.join(self.directory.name, "%s.%d" % (rw, number))
                    with Nbdkit(self.socket, "memory", "8M"):
                        got = self.measure("--rw=" + rw, "--fill", "--verify", *way)
                        if rw == "randread":
                            self.assertEqual(got["verified_bytes"], got["bytes"])
                        else:
                            self.assertGreaterEqual(got["verified_bytes"], 8 * MIB)

    def test_filled_data_is_found_again_by_another_run(self):
        with Nbdkit(self.socket, "memory", "8M"):
            self.measure("--rw=read", "--fill", "--bs=64k", "--qd=4")
            got = self.measure("--rw=randread", "--verify", "--qd=4", "--structured")
            self.assertGreater(got["verified_bytes"], 0)

    def test_wrong_data_is_found(self):
        with Nbdkit(self.socket, "memory", "8M"):
            self.refuse(1, "wrong data: byte ", "--rw=read", "--verify")

    def test_one_changed_byte_is_found(self):
        image = os.path.join(self.directory.name, "image")
        with open(image, "wb") as file:
            file.truncate(8 * MIB)
        with Nbdkit(self.socket, "file", image):
            self.measure("--rw=read", "--fill", "--bs=64k", "--qd=4")
            with open(image, "r+b") as file:
                file.seek(5000001)
                byte = file.read(1)
                file.seek(5000001)
                file.write(bytes([byte[0] ^ 1]))
            self.refuse(1, "wrong data: byte 5000001 of the export", "--rw=read", "--verify", "--bs=64k", "--qd=4")

    def test_connect_mode_counts_connections(self):
        with Nbdkit(self.socket, "memory", "8M"):
            got = self.measure("--rw=connect")
        self.assertGreater(got["ios"], 1)
        self.assertEqual(got["bytes"], 0)

    def test_error_of_the_server_is_named(self):
        for number, way in enumerate((["--qd=8"], ["--qd=8", "--structured"])):
            with self.subTest(way=way):
                self.socket = os.path.join(self.directory.name, "error.%d" % number)
                with Nbdkit(self.socket, "--filter=error", "memory", "8M", "error-pread=ENOSPC", "error-pread-rate=100%"):
                    self.refuse(1, "was answered with ENOSPC (28)", *way)

    def test_read_only_export_is_not_written(self):
        with Nbdkit(self.socket, "-r", "memory", "8M"):
            self.refuse(1, "the export is read-only", "--rw=randwrite")

    def test_silent_server_ends_the_run(self):
        begun = time.monotonic()
        with Nbd(self.socket, lambda request: b""):
            self.refuse(1, "the server has not answered for 300 ms; 4 requests are outstanding", "--qd=4", "--stall=300ms")
        self.assertLess(time.monotonic() - begun, 10)

    def test_broken_replies_are_refused(self):
        stranger = struct.pack(">IIQ", 0x67446698, 0, 0x1234567812345678)
        lies = {"a reply with a cookie that is not outstanding": lambda request: stranger + bytes(4096),
                "a reply begins with 0x2a": lambda request: struct.pack(">I", 42) + request[4:],
                "the server closed the connection": lambda request: (_ for _ in ()).throw(OSError())}
        for number, (sentence, answer) in enumerate(lies.items()):
            with self.subTest(sentence=sentence):
                self.socket = os.path.join(self.directory.name, "liar.%d" % number)
                with Nbd(self.socket, answer):
                    self.refuse(1, sentence, "--qd=1")

    def test_wrong_usage_is_refused(self):
        self.refuse(2, "--bs must be a multiple of 512", "--bs=1000")
        self.refuse(2, "--rw=sideways: expected randread", "--rw=sideways")
        self.refuse(2, "--qd=0: expected a number from 1", "--qd=0")
        self.refuse(1, "connecting to " + self.socket + ": No such file or directory")


if __name__ == "__main__":
    main(LoadGenerator.PROGRAM, "nbdkit")
