#!/usr/bin/env python3
"""qcow2 images made by qemu-img, read through the daemon's NBD server: contents, facts, refusals, damage."""

import json
import os
import pathlib
import random
import struct
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, IS_GANTRY, checksum, missing, require, require_gantry

SIZE = 2148864  # not a whole number of clusters


def busy_commands(zeroes=True, seed=7):
    """qemu-io commands that leave a bit of everything."""
    rng = random.Random(seed)
    commands = []
    for i in range(24):
        at, length = rng.randrange(3900) * 512, rng.randrange(1, 160) * 512
        commands += ["-c", f"write -P {rng.randrange(1, 255)} {at} {length}"]
        if zeroes and i % 6 == 3:
            commands += ["-c", f"write -z {rng.randrange(3800) * 512} 65536"]
        if zeroes and i % 6 == 5:
            commands += ["-c", f"write -z -u {rng.randrange(3800) * 512} 131072"]
    return commands


class Qcow2Read(Case):
    def setUp(self):
        super().setUp()
        require("qemu-img", "qemu-io")

    # -- making images

    def create(self, name, options="", size=SIZE, backing=None, busy=True):
        command = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if options:
            command += ["-o", options]
        if backing:
            command += ["-F", "qcow2", "-b", backing]
        self.run_tool(*command, name, size)
        if busy:
            self.run_tool("qemu-io", "-f", "qcow2", *busy_commands(zeroes="0.10" not in options), name)
        return self.path(name)

    def patched(self, source, name, *patches):
        """A copy with the bytes of `patches` (offset, bytes) changed."""
        with open(source, "rb") as file:
            data = bytearray(file.read())
        for offset, replacement in patches:
            data[offset : offset + len(replacement)] = replacement
        with open(self.path(name), "wb") as file:
            file.write(data)
        return self.path(name)

    # -- serving them

    @staticmethod
    def node(name, path, **more):
        return {"driver": "qcow2", "node-name": name, "read-only": True, "file": {"driver": "file", "filename": path}, **more}

    def serve(self, nodes):
        """A daemon that exports each node by its name; (daemon, socket)."""
        sock = self.path("nbd.sock")
        arguments = ["--nbd-server", f"addr.type=unix,addr.path={sock}"]
        for node in nodes:
            name = node["node-name"]
            arguments += ["--blockdev", json.dumps(node)]
            arguments += ["--export", f"type=nbd,id=e-{name},node-name={name},name={name}"]
        return self.daemon(*arguments), sock

    def contents(self, sock, name):
        target = self.path(f"{name}.read")
        self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(sock, name), target)
        return target

    def expected(self, path, name, *more):
        target = self.path(f"{name}.expected")
        self.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *more, path, target)
        return target

    def assert_same(self, images):
        """`images`: node name -> path of a qcow2 image."""
        _, sock = self.serve([self.node(name, path) for name, path in images.items()])
        for name, path in images.items():
            with self.subTest(name):
                read, wanted = self.contents(sock, name), self.expected(path, name)
                self.assertEqual(os.path.getsize(read), os.path.getsize(wanted))
                self.assertEqual(checksum(read), checksum(wanted))

    # -- contents

    def test_shapes(self):
        shapes = {
            "plain": "", "c512": "cluster_size=512", "c1k": "cluster_size=1k", "c4k": "cluster_size=4k", "c16k": "cluster_size=16k",
            "c256k": "cluster_size=256k", "c2m": "cluster_size=2M", "v2": "compat=0.10", "r1": "refcount_bits=1", "r8": "refcount_bits=8",
            "r64": "refcount_bits=64", "lazy": "lazy_refcounts=on", "sub16k": "extended_l2=on,cluster_size=16k",
            "sub64k": "extended_l2=on", "sub2m": "extended_l2=on,cluster_size=2M", "meta": "preallocation=metadata",
        }
        self.assert_same({name: self.create(f"{name}.qcow2", options) for name, options in shapes.items()})

    def test_compressed(self):
        source = self.create("source.qcow2")
        shapes = {
            "z64k": "", "z512": "cluster_size=512", "z2m": "cluster_size=2M", "zv2": "compat=0.10", "zs64k": "compression_type=zstd",
            "zs4k": "compression_type=zstd,cluster_size=4k", "zs2m": "compression_type=zstd,cluster_size=2M", "zsub": "extended_l2=on",
        }
        images = {}
        for name, options in shapes.items():
            images[name] = self.path(f"{name}.qcow2")
            extra = ["-o", options] if options else []
            self.run_tool("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", *extra, source, images[name])
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 100k 300k", images["z64k"])
        self.assert_same(images)

    def test_backing_chains(self):
        self.create("base.qcow2", "cluster_size=4k")
        images = {}
        for name, size in (("shorter", MIB), ("same", SIZE), ("longer", 3 * MIB)):
            self.create(f"mid-{name}.qcow2", size=size, backing="base.qcow2", busy=False)
            self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 9000", "-c", "write -z 300k 128k", f"mid-{name}.qcow2")
            images[name] = self.create(f"{name}.qcow2", "extended_l2=on", size=size + 64 * KIB, backing=f"mid-{name}.qcow2", busy=False)
            self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 8 200k 2k", "-c", "discard 500k 200k", images[name])
        self.assert_same(images)

    def test_data_file(self):
        images = {}
        for raw in ("off", "on"):
            images[f"raw-{raw}"] = self.create(f"raw-{raw}.qcow2", f"data_file=data-{raw}.bin,data_file_raw={raw}")
        if not IS_GANTRY:  # it looks for them in its current directory
            images = {}
            for raw in ("off", "on"):
                images[f"raw-{raw}"] = self.create(f"abs-{raw}.qcow2", f"data_file={self.path('abs')}-{raw},data_file_raw={raw}")
        self.assert_same(images)

    def test_data_file_that_describes_a_node_is_a_file_name(self):
        image = self.create("i.qcow2", f"data_file={self.path('data.bin')}", busy=False)
        secret = json.dumps({"driver": "file", "filename": "/etc/passwd"})
        with open(image, "rb") as file:
            at = file.read(4096).index(b"\x44\x41\x54\x41")
        name = f"json:{secret}".encode()
        patch = struct.pack(">II", 0x44415441, len(name)) + name + bytes(-len(name) % 8)
        bad = self.patched(image, "bad.qcow2", (at, patch + bytes(8)))
        done = self.run_daemon("--blockdev", json.dumps(self.node("q", bad)))
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("json:", done.stderr)
        self.assertIn("No such file or directory", done.stderr)

    def test_snapshots(self):
        require_gantry("the option 'snapshot' is gantryd's own")
        image = self.create("i.qcow2")
        before = self.expected(image, "before")
        self.run_tool("qemu-img", "snapshot", "-c", "first", image)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", image)
        daemon, sock = self.serve([self.node("now", image), self.node("by-name", image, snapshot="first"),
                                   self.node("by-id", image, snapshot="1")])
        self.assertEqual(checksum(self.contents(sock, "by-name")), checksum(before))
        self.assertEqual(checksum(self.contents(sock, "by-id")), checksum(before))
        self.assertEqual(checksum(self.contents(sock, "now")), checksum(self.expected(image, "now")))
        _, text = daemon.qmp.error("blockdev-add", self.node("none", image, snapshot="second"))
        self.assertTrue(text.startswith("Can't find snapshot 'second'"), text)

    def test_many_readers(self):
        """Several connections at once, each all of a fragmented image, with a tiny L2 cache."""
        require("nbdcopy")
        image = self.create("i.qcow2", "cluster_size=512")
        _, sock = self.serve([{**self.node("q", image), "l2-cache-entry-size": 512, "l2-cache-size": 1024}])
        wanted = checksum(self.expected(image, "q"))
        copies = [subprocess.Popen(["nbdcopy", "--request-size=4096", self.uri(sock, "q"), self.path(f"copy{i}")], cwd=self.dir)
                  for i in range(4)]
        for i, copy in enumerate(copies):
            self.assertEqual(copy.wait(gantry_test.DEADLINE), 0)
            self.assertEqual(checksum(self.path(f"copy{i}")), wanted)

    # -- facts

    def test_image_info(self):
        images = {
            "plain": self.create("plain.qcow2", busy=False),
            "v2": self.create("v2.qcow2", "compat=0.10", busy=False),
            "rich": self.create("rich.qcow2", "extended_l2=on,compression_type=zstd,refcount_bits=32,lazy_refcounts=on", busy=False),
        }
        self.run_tool("qemu-img", "snapshot", "-c", "first", images["plain"])
        over = self.create("over.qcow2", backing="plain.qcow2", busy=False)
        daemon, _ = self.serve([self.node(name, path) for name, path in {**images, "over": over}.items()])
        nodes = {node["node-name"]: node for node in daemon.qmp.cmd("query-named-block-nodes")}
        for name, path in {**images, "over": over}.items():
            with self.subTest(name):
                told = nodes[name]["image"]
                wanted = json.loads(self.run_tool("qemu-img", "info", "--output=json", path).stdout)
                for key in ("virtual-size", "cluster-size", "dirty-flag", "format-specific", "snapshots", "actual-size",
                            "backing-filename", "full-backing-filename", "backing-filename-format"):
                    if key == "full-backing-filename" and key in wanted:
                        wanted[key] = os.path.join(self.dir, wanted[key])  # qemu-img was given a relative name
                    self.assertEqual(told.get(key), wanted.get(key), key)

    # -- refusals and damage

    def test_refusals(self):
        good = self.create("good.qcow2", busy=False)
        be32, be64 = (lambda v: struct.pack(">I", v)), (lambda v: struct.pack(">Q", v))
        header_end = 112
        rows = [
            ("magic", [(0, b"x")], "Image is not in qcow2 format"),
            ("version", [(4, be32(4))], "Unsupported qcow2 version 4"),
            ("small cluster", [(20, be32(8))], "Unsupported cluster size: 2^8"),
            ("large cluster", [(20, be32(22))], "Unsupported cluster size: 2^22"),
            ("short header", [(100, be32(96))], "qcow2 header too short"),
            ("long header", [(100, be32(1 << 20))], "qcow2 header exceeds cluster size"),
            ("feature", [(72, be64(1 << 40))], "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000"),
            ("refcount width", [(96, be32(7))], "Reference count entry width too large; may not exceed 64 bits"),
            ("encryption", [(32, be32(3))], "Unsupported encryption method 3"),
            ("LUKS", [(32, be32(2))], "Missing CRYPTO header for crypt method 2"),
            ("compression bit", [(72, be64(8))], "qcow2: Compression type incompatible feature bit must not be set"),
            ("compression type", [(104, b"\1")], "qcow2: Compression type incompatible feature bit must be set"),
            ("raw data file", [(88, be64(2))], "data-file-raw requires a data file"),
            ("no data file", [(72, be64(4))], "'data-file' is required for this image"),
            ("no refcounts", [(56, be32(0))], "Image does not contain a reference count table"),
            ("large refcounts", [(56, be32(1000))], "Reference count table too large"),
            ("refcount offset", [(48, be64(0x10001))], "Reference count table offset invalid"),
            ("large L1", [(36, be32(0x7FFFFFFF))], "Active L1 table too large"),
            ("small L1", [(36, be32(0))], "L1 table is too small"),
            ("L1 offset", [(40, be64(0x30001))], "Active L1 table offset invalid"),
            ("disk size", [(24, be64(1 << 62))], "Image is too big"),
            ("snapshots", [(60, be32(65537))], "Snapshot table too large"),
            ("snapshot offset", [(60, be32(1) + be64(0x10001))], "Snapshot table offset invalid"),
            ("backing name", [(8, be64(0xFFF0) + be32(100))], "Backing file name too long"),
            ("backing offset", [(8, be64(0x7FFFFFFFFFFFFFF0) + be32(100))], "Invalid backing file offset"),
            ("extension", [(header_end, be32(0x12345678) + be32(0xFFFFFFF9))], "Header extension too large"),
            ("backing format", [(header_end, be32(0xE2792ACA) + be32(16))], "ERROR: ext_backing_format: len=16 too large (>=16)"),
            ("bitmaps", [(88, be64(1)), (header_end, be32(0x23852875) + be32(24) + bytes(24))],
             "found bitmaps extension with zero bitmaps"),
        ]
        daemon = self.daemon()
        for name, patches, text in rows:
            with self.subTest(name):
                bad = self.patched(good, "bad.qcow2", *patches)
                _, desc = daemon.qmp.error("blockdev-add", self.node("q", bad))
                self.assertTrue(desc.startswith(text), desc)
                if IS_GANTRY:
                    self.assertIn("'q'", desc)
        self.assertEqual(daemon.qmp.cmd("query-named-block-nodes"), [])

    def test_damage_is_an_event(self):
        image = self.create("i.qcow2", size=MIB, busy=False)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 128k", image)
        with open(image, "rb") as file:
            data = file.read()
        l1 = struct.unpack(">Q", data[40:48])[0]
        l2 = struct.unpack(">Q", data[l1 : l1 + 8])[0] & ~(1 << 63)
        bad = self.patched(image, "bad.qcow2", (l2, struct.pack(">Q", 1 << 63 | 0x50200)))
        daemon, sock = self.serve([self.node("q", bad)])
        read = ["qemu-io", "-r", "-f", "raw", self.uri(sock, "q"), "-c"]
        done = self.run_tool(*read, "read 0 512", check=False)
        self.assertIn("Input/output error", done.stdout + done.stderr)
        self.assertNotEqual(done.returncode, 0)
        done = self.run_tool(*read, "read -P 1 65536 65536")  # the cluster beside it is unharmed
        self.assertIn("read 65536/65536 bytes", done.stdout)
        self.assertNotIn("verification failed", done.stdout)
        event = daemon.qmp.event("BLOCK_IMAGE_CORRUPTED")
        self.assertEqual(event["data"]["node-name"], "q")
        self.assertFalse(event["data"]["fatal"])
        self.assertIn("0x50200", event["data"]["msg"])

    def test_image_naming_itself(self):
        image = self.create("i.qcow2", busy=False)
        self.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "i.qcow2", image)
        if not IS_GANTRY:
            missing("the reference does not notice it for a long time", installable=False)
        _, desc = self.daemon().qmp.error("blockdev-add", self.node("q", image))
        self.assertIn("does one name itself as its backing file?", desc)


if __name__ == "__main__":
    gantry_test.main()
