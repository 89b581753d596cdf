#!/usr/bin/python3
"""The NBD server and the clients people use: nbdinfo, nbdcopy, nbdsh, libnbd, qemu-img, qemu-io, fio."""

import json
import os
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, checksum, require, require_gantry, text_block

SIZE = 24 * MIB + 512


class Clients(Case):
    def serve(self, writable=True):
        self.image = self.raw_image("disk.raw", SIZE, text_block)
        self.socket = self.path("nbd.sock")
        self.server = self.daemon(
            "--blockdev", f"driver=file,node-name=disk,filename={self.image},discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket}",
            "--export", f"type=nbd,id=e,node-name=disk,name=disk,writable={'on' if writable else 'off'},description=for tests")
        return self.uri(self.socket, "disk")

    def test_nbdinfo(self):
        require("nbdinfo")
        uri = self.serve()
        about = json.loads(self.run_tool("nbdinfo", "--json", uri).stdout)
        self.assertEqual((about["protocol"], about["structured"], about["TLS"]), ("newstyle-fixed", True, False))
        (export,) = about["exports"]
        self.assertEqual(export["export-size"], SIZE)
        self.assertEqual(export["description"], "for tests")
        for what in ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"):
            self.assertTrue(export[what], what)
        self.assertFalse(export["is_read_only"])
        self.assertEqual([export[f"block_size_{k}"] for k in ("minimum", "preferred", "maximum")], [1, 4096, 32 * MIB])
        listing = json.loads(self.run_tool("nbdinfo", "--list", "--json", self.uri(self.socket)).stdout)
        self.assertEqual([e["export-name"] for e in listing["exports"]], ["disk"])

    def test_maps_agree_with_the_file(self):
        require("nbdinfo", "qemu-img")
        uri = self.serve()
        entries = json.loads(self.run_tool("nbdinfo", "--map", "--json", uri).stdout)
        self.assertEqual(sum(e["length"] for e in entries), SIZE)
        fd = os.open(self.image, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        for e in entries:
            begin, end = e["offset"], e["offset"] + e["length"]
            if e["type"] == 3:
                data = os.pread(fd, e["length"], begin)
                self.assertEqual(data.count(0), len(data))
            else:
                self.assertEqual(os.lseek(fd, begin, os.SEEK_DATA), begin)
                self.assertGreaterEqual(os.lseek(fd, begin, os.SEEK_HOLE), end)
        kinds = [e["type"] for e in entries]
        self.assertTrue(all(a != b for a, b in zip(kinds, kinds[1:])), "neighbours differ")
        theirs = json.loads(self.run_tool("qemu-img", "map", "-f", "raw", "--output=json", uri).stdout)
        self.assertEqual([(e["start"], e["zero"]) for e in theirs], [(e["offset"], e["type"] == 3) for e in entries])

    def test_nbdcopy_out_and_in(self):
        require("nbdcopy")
        uri = self.serve()
        out = self.path("out.raw")
        self.run_tool("nbdcopy", uri, out)
        self.assertEqual(checksum(out), checksum(self.image))
        data = self.raw_image("in.raw", SIZE, lambda n: random.Random(n).randbytes(65536) if n % 3 else None)
        for options in ((), ("--connections=4", "--requests=64"), ("--allocated",), ("--flush", "--synchronous")):
            self.run_tool("nbdcopy", *options, data, uri)
            self.run_tool("nbdcopy", uri, out)
            self.assertEqual(checksum(out), checksum(data), options)
        self.server.stop()
        self.assertEqual(checksum(self.image), checksum(data))

    def test_qemu_img(self):
        require("qemu-img")
        uri = self.serve()
        self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", self.image, uri)
        self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, self.path("out.qcow2"))
        self.run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", self.path("out.qcow2"), uri)
        other = self.raw_image("other.raw", SIZE, lambda n: bytes([n % 250 + 1]) * 65536 if n % 5 else None)
        self.run_tool("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", other, uri)
        self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", other, uri)
        about = json.loads(self.run_tool("qemu-img", "info", "-f", "raw", "--output=json", uri).stdout)
        self.assertEqual(about["virtual-size"], SIZE)

    def test_qemu_io(self):
        require("qemu-io")
        uri = self.serve()
        done = self.run_tool("qemu-io", "-f", "raw", "-c", "write -P 7 3M 4M", "-c", "read -P 7 3M 4M", "-c", "write -f -P 8 100 50",
                             "-c", "read -P 8 100 50", "-c", "write -z 4M 1M", "-c", "read -P 0 4M 1M", "-c", "write -z -u 5M 1M",
                             "-c", "discard 6M 1M", "-c", "flush", "-c", "read -P 7 3M 1M",
                             "-c", "aio_write -P 9 8M 2M", "-c", "aio_write -P 10 10M 2M", "-c", "aio_flush",
                             "-c", "read -P 9 8M 2M", "-c", "read -P 10 10M 2M", uri)
        self.assertNotIn("failed", done.stdout)
        self.assertNotIn("rror", done.stdout)

    def test_read_only_exports(self):
        require("qemu-io", "nbdinfo")
        uri = self.serve(writable=False)
        before = checksum(self.image)
        self.assertNotEqual(self.run_tool("qemu-io", "-f", "raw", "-c", "write 0 512", uri, check=False).returncode, 0)
        self.run_tool("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", uri)
        self.assertTrue(json.loads(self.run_tool("nbdinfo", "--json", uri).stdout)["exports"][0]["is_read_only"])
        self.assertEqual(checksum(self.image), before)

    def test_libnbd_random_mix(self):
        libnbd = gantry_test.libnbd()
        uri = self.serve()
        handles = []
        for i in range(3):
            h = libnbd.NBD()
            h.set_request_structured_replies(i != 1)
            if i != 1:
                h.add_meta_context("base:allocation")
            h.connect_uri(uri)
            handles.append(h)
        with open(self.image, "rb") as file:
            model = bytearray(file.read())
        rng = random.Random(5)
        for _ in range(600):
            h = rng.choice(handles)
            length = rng.choice((1, 512, 4096, 65536, 262144, MIB)) + rng.randrange(3)
            at = rng.randrange(SIZE - length)
            action = rng.randrange(8)
            if action < 3:
                self.assertEqual(h.pread(length, at), model[at : at + length])
            elif action < 5:
                data = rng.randbytes(length)
                h.pwrite(data, at, libnbd.CMD_FLAG_FUA if rng.randrange(40) == 0 else 0)
                model[at : at + length] = data
            elif action == 5:
                h.zero(length, at, rng.choice((0, libnbd.CMD_FLAG_NO_HOLE)))
                model[at : at + length] = bytes(length)
            elif action == 6:
                h.cache(length, at)
            elif h.get_structured_replies_negotiated():
                extents = []
                h.block_status(length, at, lambda name, offset, entries, error: extents.extend(entries))
                offset = at
                for size, flags in zip(extents[::2], extents[1::2]):
                    size = min(size, at + length - offset)
                    if flags & 2:
                        self.assertEqual(model[offset : offset + size].count(0), size)
                    offset += size
            if rng.randrange(50) == 0:
                h.flush()
        for h in handles:
            h.shutdown()
        self.server.stop()
        with open(self.image, "rb") as file:
            self.assertEqual(file.read(), bytes(model))

    def test_libnbd_many_in_flight(self):
        libnbd = gantry_test.libnbd()
        h = libnbd.NBD()
        h.connect_uri(self.serve())
        size = 128 * KIB
        buffers = [libnbd.Buffer.from_bytearray(bytearray(bytes([i + 1]) * size)) for i in range(180)]
        h.set_strict_mode(0)
        pending = [h.aio_pwrite(b, i * size) for i, b in enumerate(buffers)]
        while pending:
            pending = [cookie for cookie in pending if not h.aio_command_completed(cookie)]
            if pending:
                h.poll(-1)
        h.flush()
        for i in range(0, 180, 17):
            self.assertEqual(h.pread(size, i * size), bytes([i + 1]) * size)
        h.shutdown()

    def test_nbdsh_and_errors(self):
        require("nbdsh")
        uri = self.serve()
        script = f"""
import nbd
h.connect_uri("{uri}")
h.set_strict_mode(0)
def fails(error, f, *args):
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errnum == error, (e.errnum, error, str(e))
        return
    raise AssertionError("no error")
import errno
size = h.get_size()
fails(errno.EINVAL, h.pread, 1, size)
fails(errno.EINVAL, h.pread, 512, 0, 1 << 9)
fails(errno.EINVAL, h.trim, 512, size)
h.pwrite(b"x" * 100, size - 100)
assert h.pread(100, size - 100) == b"x" * 100
h.shutdown()
"""
        # nbdsh belongs to the system's Python, whichever comes first here.
        self.run_tool("nbdsh", "-c", script, env={**os.environ, "PATH": "/usr/bin:/bin"})

    def test_fio(self):
        require("fio")
        if "nbd" not in self.run_tool("fio", "--enghelp").stdout:
            gantry_test.missing("fio has no nbd engine")
        uri = self.serve()
        for mode, size in (("randwrite", "4k"), ("write", "256k"), ("randwrite", "512")):
            self.run_tool("fio", "--name=t", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", f"--bs={size}", "--iodepth=32",
                          "--size=8m", "--verify=crc32c", "--verify_fatal=1", "--randseed=3")

    def test_raw_window_and_odd_sizes(self):
        require_gantry("the reference wants multiples of 512")
        require("qemu-img", "nbdinfo")
        image = self.raw_image("odd.raw", 1000003, text_block)
        self.socket = self.path("nbd.sock")
        self.daemon("--blockdev", f"driver=file,node-name=disk,filename={image}",
                    "--blockdev", "driver=raw,node-name=part,file=disk,offset=512,size=99999,read-only=on",
                    "--nbd-server", f"addr.type=unix,addr.path={self.socket}",
                    "--export", "type=nbd,id=e,node-name=part,name=part")
        self.assertEqual(self.run_tool("nbdinfo", "--size", self.uri(self.socket, "part")).stdout.strip(), "99999")
        self.run_tool("nbdcopy", self.uri(self.socket, "part"), self.path("out"))
        with open(image, "rb") as file, open(self.path("out"), "rb") as out:
            self.assertEqual(out.read(), file.read()[512 : 512 + 99999])


if __name__ == "__main__":
    gantry_test.main()
