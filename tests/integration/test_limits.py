#!/usr/bin/python3
"""How small and how quick: idle memory below 15 MiB, and less than 50 ms from the start to the first served request."""

import pathlib
import re
import socket
import statistics
import struct
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

ROUNDS = 15


class Limits(gt.Case):
    def setUp(self):
        super().setUp()
        gt.require_gantry()
        if gt.BUILD.name != "release":
            gt.missing(f"limits hold for the release build, this is {gt.BUILD.name}", installable=False)
        self.image = self.raw_image("disk.raw", 64 * gt.MIB, gt.text_block)
        self.nbd = self.path("nbd")
        self.options = ["--blockdev", f"file,node-name=f,filename={self.image}", "--blockdev", "raw,node-name=r,file=f",
                        "--nbd-server", f"addr.type=unix,addr.path={self.nbd}", "--export", "nbd,id=e,node-name=r,writable=on"]

    def memory(self, pid):
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def test_idle_memory(self):
        daemon = self.daemon(*self.options, "--blockdev", "null-co,node-name=n", "--export", "nbd,id=n,node-name=n")
        before = self.memory(daemon.process.pid)
        print(f"idle: {before:.1f} MiB", file=sys.stderr)
        self.assertLess(before, 15)
        # After clients and commands have come and gone it is idle again.
        for _ in range(3):
            clients = [gt.libnbd().NBD() for _ in range(8)]
            for client in clients:
                client.connect_uri(self.uri(self.nbd, "r"))
                client.pread(32 * gt.MIB, 0)
                client.pwrite(bytes(gt.MIB), 0)
            del clients
            daemon.qmp.cmd("query-qmp-schema")
        after = self.memory(daemon.process.pid)
        print(f"after 24 clients: {after:.1f} MiB", file=sys.stderr)
        self.assertLess(after, 32)

    def first_request(self):
        """Milliseconds from the start of the process to the first 4 KiB read, by a client that is quick itself."""
        begin = time.monotonic()
        process = subprocess.Popen([gt.GANTRYD, *gt.gantryd_options(), *self.options], stdin=subprocess.DEVNULL)
        try:
            while True:
                client = socket.socket(socket.AF_UNIX)
                if client.connect_ex(self.nbd) == 0:
                    break
                client.close()
                if time.monotonic() - begin > gt.DEADLINE or process.poll() is not None:
                    self.fail("the daemon does not listen")
            client.settimeout(gt.DEADLINE)
            self.take(client, 18)
            name = b"r"
            client.sendall(struct.pack(">I8sIII", 3, b"IHAVEOPT", 7, 4 + len(name) + 2, len(name)) + name + struct.pack(">H", 0))
            while True:  # replies to NBD_OPT_GO; without a structured-replies option the reads are simple
                kind, length = struct.unpack(">II", self.take(client, 20)[12:])
                self.take(client, length)
                if kind == 1:
                    break
                self.assertEqual(kind, 3)
            client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 65536, 4096))
            magic, error, cookie = struct.unpack(">IIQ", self.take(client, 16))
            self.assertEqual((magic, error, cookie), (0x67446698, 0, 7))
            self.assertEqual(self.take(client, 4096), gt.text_block(1)[:4096])
            return (time.monotonic() - begin) * 1000
        finally:
            process.terminate()
            self.assertEqual(process.wait(gt.DEADLINE), 0)

    def take(self, client, size):
        data = b""
        while len(data) < size:
            piece = client.recv(size - len(data))
            self.assertTrue(piece, "the connection ended")
            data += piece
        return data

    def test_start_to_first_request(self):
        self.first_request()  # the program comes into the page cache
        times = [self.first_request() for _ in range(ROUNDS)]
        median = statistics.median(times)
        print(f"start to first request: median {median:.1f} ms of {ROUNDS}, worst {max(times):.1f} ms", file=sys.stderr)
        self.assertLess(median, 50)


if __name__ == "__main__":
    gt.main()
