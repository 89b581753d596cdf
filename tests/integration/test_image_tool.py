#!/usr/bin/python3
# One configuration: the tool has loops of its own.
"""gantry image: every subcommand on images of ours and of qemu-img; what it says is compared with what qemu-img says."""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, require, require_gantry

GANTRY = os.path.join(os.path.dirname(gantry_test.GANTRYD), "gantry")


class ImageTool(Case):
    def setUp(self):
        super().setUp()
        require("qemu-img", "qemu-io")
        require_gantry("the tool is ours")

    def image(self, *words, status=0):
        done = self.run_tool(GANTRY, "image", *words, check=False)
        self.assertEqual(status, done.returncode, f"gantry image {words}: {done.stdout}{done.stderr}")
        return done.stdout if status == 0 else done.stdout + done.stderr

    def json(self, *words, status=0):
        return json.loads(self.image(*words, "--json", status=status))

    def qemu_json(self, *words):
        return json.loads(self.run_tool("qemu-img", *words, "--output=json", check=False).stdout)

    def io(self, path, *commands):
        self.run_tool("qemu-io", "-f", "qcow2", *[w for c in commands for w in ("-c", c)], path)

    def assert_clean(self, path):
        self.run_tool("qemu-img", "check", path)

    def test_create_matches_qemu_img(self):
        for options in ("", "cluster_size=4k,refcount_bits=64", "compat=0.10", "extended_l2=on,cluster_size=16k", "lazy_refcounts=on",
                        "preallocation=metadata", "preallocation=falloc", "compression_type=zstd", "refcount_bits=1,cluster_size=2M"):
            with self.subTest(options):
                words = ["-o", options] if options else []
                ours, theirs = self.path("ours.qcow2"), self.path("theirs.qcow2")
                self.image("create", *words, ours, "5M")
                self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *words, theirs, "5M")
                self.assert_clean(ours)
                a, b = self.qemu_json("info", ours), self.qemu_json("info", theirs)
                for key in ("virtual-size", "cluster-size", "format", "format-specific", "dirty-flag"):
                    self.assertEqual(a[key], b[key], key)
                os.unlink(ours)
                os.unlink(theirs)

    def test_create_with_a_backing_file_takes_its_size(self):
        self.image("create", self.path("base.qcow2"), "3M")
        self.io(self.path("base.qcow2"), "write -P 7 0 1M")
        self.image("create", "-b", "base.qcow2", "-F", "qcow2", self.path("top.qcow2"))
        self.assertEqual(3 * MIB, self.qemu_json("info", self.path("top.qcow2"))["virtual-size"])
        self.io(self.path("top.qcow2"), "read -P 7 0 1M")
        self.assertIn("backing format", self.image("create", "-b", "base.qcow2", self.path("x.qcow2"), status=1))
        self.assertIn("Could not open backing file", self.image("create", "-b", "absent", "-F", "raw", self.path("x.qcow2"), status=1))
        self.assertFalse(os.path.exists(self.path("x.qcow2")))

    def test_create_raw_and_help(self):
        self.image("create", "-f", "raw", self.path("a.raw"), "64k")
        self.assertEqual(65536, os.path.getsize(self.path("a.raw")))
        self.assertIn("cluster_size", self.image("create", "-o", "help"))
        self.assertIn("Invalid image size", self.image("create", self.path("a"), "12q", status=1))

    def test_info_map_check(self):
        base, top = self.path("base.qcow2"), self.path("top.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
        self.io(base, "write -P 1 0 1M", "write -P 2 2M 64k")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top, "4M")
        self.io(top, "write -P 3 512k 128k", "write -z 2M 64k", "write -c -P 4 3M 64k")
        info, theirs = self.json("info", top), self.qemu_json("info", top)
        for key in ("filename", "format", "virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "format-specific", "dirty-flag"):
            self.assertEqual(theirs[key], info[key], key)
        self.assertEqual([top, base], [image["filename"] for image in self.json("info", "--backing-chain", top)])
        self.assertNotIn("backing-image", info)
        self.assertIn("virtual", self.image("info", top))
        self.assertEqual([{k: v for k, v in e.items() if k != "filename"} for e in self.qemu_json("map", top)],
                         [{k: v for k, v in e.items() if k not in ("filename", "compressed")} for e in self.json("map", top)])
        self.assertIn("compressed", self.image("map", top))
        mine, other = self.json("check", top), self.qemu_json("check", top)
        for key in ("image-end-offset", "total-clusters", "allocated-clusters", "compressed-clusters", "check-errors", "format"):
            self.assertEqual(other.get(key), mine.get(key), key)
        os.unlink(base)
        self.json("info", top)  # does not need what it names

    def test_check_finds_and_mends(self):
        path = self.path("bad.qcow2")
        self.image("create", "-o", "cluster_size=4k", path, "1M")
        self.io(path, "write -P 5 0 256k")
        header = self.read(path, 0, 104)
        table = int.from_bytes(header[48:56], "big")
        block = int.from_bytes(self.read(path, table, 8), "big")
        self.patch(path, block + 2 * 200, b"\0\1")  # of a cluster that nobody uses: a leak
        self.assertEqual(1, self.json("check", path, status=3)["leaks"])
        self.image("check", "-r", "leaks", path)
        self.assert_clean(path)
        self.patch(path, block + 2 * 8, b"\0\0")  # of one in use
        found = self.json("check", path, status=2)
        self.assertGreaterEqual(found["corruptions"], 1)
        self.image("check", "-r", "all", path)
        self.assert_clean(path)
        self.io(path, "read -P 5 0 256k")
        self.raw_image("a.raw", 65536)
        self.image("check", "-f", "raw", self.path("a.raw"), status=63)

    def read(self, path, offset, length):
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def patch(self, path, offset, data):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def test_resize(self):
        path = self.path("r.qcow2")
        self.image("create", "-o", "cluster_size=512", path, "1M")
        self.io(path, "write -P 6 0 1M")
        self.image("resize", path, "+31M")
        self.assertEqual(32 * MIB, self.qemu_json("info", path)["virtual-size"])
        self.io(path, "read -P 6 0 1M", "read -P 0 1M 31M")
        self.assertIn("--shrink", self.image("resize", path, "512k", status=1))
        self.image("resize", "--shrink", path, "512k")
        self.assert_clean(path)
        self.io(path, "read -P 6 0 512k")
        self.image("resize", "--preallocation", "full", path, "2M")
        self.assert_clean(path)
        self.raw_image("a.raw", 65536)
        self.assertIn("say --format raw", self.image("resize", self.path("a.raw"), "128k", status=1))
        self.image("resize", "-f", "raw", self.path("a.raw"), "128k")
        self.assertEqual(131072, os.path.getsize(self.path("a.raw")))

    def test_snapshots(self):
        path = self.path("s.qcow2")
        self.image("create", path, "2M")
        self.assertIn("No snapshots", self.image("snapshot", path))
        self.io(path, "write -P 1 0 1M")
        self.image("snapshot", "-c", "one", path)
        self.io(path, "write -P 2 0 1M")
        self.image("snapshot", "-c", "two", path)
        self.assertEqual(["one", "two"], [s["name"] for s in self.json("snapshot", path)])
        self.assertIn("two", self.run_tool("qemu-img", "snapshot", "-l", path).stdout)
        self.image("snapshot", "-a", "one", path)
        self.assert_clean(path)
        self.io(path, "read -P 1 0 1M")
        self.image("snapshot", "-d", "two", path)
        self.image("snapshot", "-d", "1", path)  # by id
        self.assert_clean(path)
        self.assertEqual([], self.json("snapshot", path))
        self.image("snapshot", "-d", "one", path, status=1)

    def test_amend(self):
        path = self.path("a.qcow2")
        self.image("create", "-o", "compat=0.10", path, "2M")
        self.io(path, "write -P 1 0 1M")
        self.image("amend", "-o", "compat=1.1,lazy_refcounts=on", path)
        data = self.qemu_json("info", path)["format-specific"]["data"]
        self.assertEqual(("1.1", True), (data["compat"], data["lazy-refcounts"]))
        self.image("amend", "-o", "lazy_refcounts=off,refcount_bits=8", path)
        self.assertEqual(8, self.qemu_json("info", path)["format-specific"]["data"]["refcount-bits"])
        self.io(path, "write -z 0 64k")
        self.image("amend", "-o", "refcount_bits=16", path)
        self.image("amend", "-o", "compat=0.10", path)
        self.assert_clean(path)
        self.io(path, "read -P 0 0 64k", "read -P 1 64k 960k")
        self.image("amend", "-o", "cluster_size=4k", path, status=1)

    def test_measure(self):
        for options in ("", "cluster_size=4k", "cluster_size=2M,extended_l2=on", "refcount_bits=64"):
            words = ["-o", options] if options else []
            self.assertEqual(self.qemu_json("measure", "-O", "qcow2", *words, "--size", "10G"),
                             self.json("measure", *words, "--size", "10G"), options)
        path = self.path("m.qcow2")
        self.image("create", path, "64M")
        self.io(path, "write 0 1M", "write 32M 100k")
        self.assertEqual(self.qemu_json("measure", "-O", "qcow2", path), self.json("measure", path))
        self.assertEqual(self.qemu_json("measure", "-O", "raw", path), self.json("measure", "-O", "raw", path))

    def test_compact(self):
        path = self.path("c.qcow2")
        self.image("create", path, "64M")
        self.io(path, "write -P 1 0 32M", "discard 0 24M")
        before = os.path.getsize(path)
        self.image("compact", path)
        self.assertLess(os.path.getsize(path), before // 2)
        self.assert_clean(path)
        self.io(path, "read -P 0 0 24M", "read -P 1 24M 8M")

    def test_commit_and_rebase(self):
        base, top = self.path("base.qcow2"), self.path("top.qcow2")
        self.image("create", base, "2M")
        self.io(base, "write -P 1 0 2M")
        self.image("create", "-b", base, "-F", "qcow2", top)
        self.io(top, "write -P 2 64k 128k", "write -z 1M 64k")
        self.image("commit", top)
        for path in (base, top):
            self.assert_clean(path)
            self.io(path, "read -P 1 0 64k", "read -P 2 64k 128k", "read -P 0 1M 64k")
        self.assertEqual(0, self.qemu_json("check", top)["allocated-clusters"] if "allocated-clusters" in self.qemu_json("check", top) else 0)
        self.run_tool("cp", base, self.path("other.qcow2"))
        self.image("rebase", "-b", "other.qcow2", "-F", "qcow2", top)
        self.assertEqual("other.qcow2", self.qemu_json("info", top)["backing-filename"])
        self.image("rebase", "-b", "", top)
        self.assertNotIn("backing-filename", self.qemu_json("info", top))

    def test_encrypted(self):
        secret = ["--object", "secret,id=s,data=open sesame"]
        path = self.path("e.qcow2")
        self.image("create", *secret, "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", path, "1M")
        opts = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename={path}"
        theirs = f"driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename={path}"
        self.run_tool("qemu-io", *secret, "--image-opts", theirs, "-c", "write -P 9 0 1M")
        self.assertIn("luks", self.image("info", *secret, "--image-opts", opts))
        self.image("check", *secret, "--image-opts", opts)
        self.image("resize", *secret, "--image-opts", opts, "2M")
        self.run_tool("qemu-io", *secret, "--image-opts", theirs, "-c", "read -P 9 0 1M", "-c", "read -P 0 1M 1M")

    def test_words(self):
        self.assertIn("resize", self.image("--help"))
        for command in ("create", "info", "check", "map", "resize", "snapshot", "amend", "measure", "compact", "commit", "rebase"):
            self.assertIn(f"Usage: gantry image {command}", self.image(command, "--help"))
        self.assertIn("there is no command 'x'", self.image("x", status=1))
        self.assertIn("too few", self.image("info", status=1))
        self.assertIn("unrecognized option", self.image("info", "--wrong", "a", status=1))
        self.assertIn("No such file", self.image("info", self.path("absent"), status=1))


if __name__ == "__main__":
    gantry_test.main()
