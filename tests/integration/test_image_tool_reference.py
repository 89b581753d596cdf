#!/usr/bin/python3
# One configuration: the tool has loops of its own.
"""gantry image beside qemu-img: equal JSON and exit statuses for the same images, equal images from the same words."""

import json
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import MIB
from image_tool_case import SECRET, ToolCase

FACTS = gt.ROOT / "tests/unit/schema/reference_names.txt"
# Members that the reference has had since those facts were written down.
LATER = {"BlockDeviceMapEntry": {"present", "compressed", "filename"}, "ImageInfo": set(), "ImageCheck": set(), "SnapshotInfo": {"icount"}}

# name: (creation options, what qemu-io does to it)
IMAGES = {
    "plain": ("", ["write -P 1 0 1M", "write -P 2 2M 64k", "discard 0 64k"]),
    "old": ("compat=0.10", ["write -P 1 64k 200k"]),
    "small clusters": ("cluster_size=512,refcount_bits=64", ["write -P 1 0 100k", "write -z 50k 10k"]),
    "subclusters": ("extended_l2=on", ["write -P 1 512k 7k", "write -z 2M 4k", "write -z -u 1M 130k"]),
    "lazy": ("lazy_refcounts=on", ["write -P 1 0 1M"]),
    "compressed": ("compression_type=zstd", ["write -c -P 1 0 64k", "write -c -P 2 1M 64k", "write -P 3 2M 64k"]),
    "preallocated": ("preallocation=metadata", ["write -P 1 1M 64k"]),
    "data file": ("data_file=DIR/data.raw", ["write -P 1 512k 100k"]),
    "raw data file": ("data_file=DIR/raw.raw,data_file_raw=on", ["write -P 1 512k 100k"]),
    "over": ("backing_file=DIR/plain,backing_fmt=qcow2", ["write -P 3 512k 100k", "write -z 2M 64k", "write -c -P 5 3M 64k"]),
    "over over": ("backing_file=over,backing_fmt=qcow2", ["write -P 4 3M 100k"]),
    "over raw": ("backing_file=DIR/base.raw,backing_fmt=raw", ["write -P 4 3M 100k"]),
}


class Equality(ToolCase):
    def setUp(self):
        super().setUp()
        self.raw_image("base.raw", 4 * MIB, gt.text_block)
        for name, (options, commands) in IMAGES.items():
            self.make(name, options, commands=commands)

    def both(self, command, *words, ours=(), theirs=()):
        """The JSON of both tools and their status, which must be the same."""
        a = self.run_tool(gt.GANTRY, "image", command, "--json", *words, *ours, check=False)
        b = self.run_tool("qemu-img", command, "--output=json", *words, *theirs, check=False)
        self.assertEqual(b.returncode, a.returncode, (command, words, a.stderr, b.stderr))
        return json.loads(a.stdout), json.loads(b.stdout)

    def has_shape(self, kind, value):
        """Required members are there, and no others than the reference's schema has."""
        facts = [line.split()[2] for line in FACTS.read_text().splitlines() if line.startswith(f"member {kind} ")]
        self.assertTrue(facts)
        self.assertLessEqual({name for name in facts if not name.startswith("*")}, set(value), kind)
        self.assertLessEqual(set(value), {name.lstrip("*") for name in facts} | LATER[kind], kind)

    def test_info(self):
        for name in IMAGES:
            with self.subTest(name):
                ours, theirs = self.both("info", self.path(name))
                self.assertEqual(theirs, ours)
                self.has_shape("ImageInfo", ours)
                self.assertEqual(*self.both("info", "--backing-chain", self.path(name)))
        self.assertEqual(*self.both("info", "-f", "raw", self.path("base.raw")))
        self.assertEqual(*self.both("info", self.path("base.raw")))
        described = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": self.path("plain")}})
        ours, theirs = self.both("info", described)
        self.assertEqual({**theirs, "filename": described}, ours)

    def test_info_of_snapshots_and_bitmaps(self):
        path = self.path("plain")
        self.run_tool("qemu-img", "snapshot", "-c", "one", path)
        self.run_tool("qemu-img", "snapshot", "-c", "two", path)
        self.run_tool("qemu-img", "bitmap", "--add", "-g", "4096", path, "map")
        ours, theirs = self.both("info", path)
        self.assertEqual(theirs, ours)
        for snapshot in ours["snapshots"]:
            self.has_shape("SnapshotInfo", snapshot)
        self.assertEqual(ours["snapshots"], json.loads(self.image("snapshot", "--json", path)))
        self.assertEqual(*self.both("check", path))
        self.assertEqual(*self.both("measure", "-O", "qcow2", path))

    def test_map(self):
        for name in [*IMAGES, "base.raw"]:
            for words in ((), ("-s", "1M"), ("-s", "600k", "-l", "1M"), ("-s", "3M", "-l", "100M")):
                with self.subTest(name, words=words):
                    ours, theirs = self.both("map", *words, self.path(name))
                    for entry in ours:
                        self.has_shape("BlockDeviceMapEntry", entry)
                        if "filename" in entry:
                            self.assertIn("offset", entry)
                            self.assertTrue(os.path.exists(entry["filename"]))
                    if name != "preallocated":  # there the reference looks for holes in the file
                        self.assertEqual(self.essence(theirs), self.essence(ours))

    def essence(self, entries):
        """Without what only one of them tells: file names and compression; where there would be room for what is no data."""
        out = []
        for entry in entries:
            entry = {key: value for key, value in entry.items() if key not in ("filename", "compressed")}
            if not entry["data"]:
                entry.pop("offset", None)
            last = out[-1] if out else None
            same = last and all(last.get(k) == entry.get(k) for k in ("present", "data", "zero", "depth")) and "offset" not in last
            if same and "offset" not in entry:
                last["length"] += entry["length"]
            else:
                out.append(entry)
        return out

    def test_check(self):
        for name in IMAGES:
            with self.subTest(name):
                ours, theirs = self.both("check", self.path(name))
                self.assertEqual(theirs, ours)
                self.has_shape("ImageCheck", ours)

    def test_measure(self):
        for name in [*IMAGES, "base.raw"]:
            for words in (("-O", "qcow2"), ("-O", "raw"), ("-O", "qcow2", "-o", "cluster_size=4k,extended_l2=off,refcount_bits=1"),
                          ("-O", "qcow2", "-o", "preallocation=full")):
                with self.subTest(name, words=words):
                    ours, theirs = self.both("measure", *words, self.path(name))
                    if name == "preallocated":  # the reference looks for holes in the file, and needs less
                        self.assertLessEqual(theirs.pop("required"), ours.pop("required"))
                    self.assertEqual(theirs, ours)
        for size in ("0", "512", "1000", "1M", "10G", "1T", "63T"):
            for options in ("cluster_size=64k", "extended_l2=on", "refcount_bits=1", "compat=0.10", "preallocation=metadata", "data_file=x"):
                with self.subTest(size, options=options):
                    self.assertEqual(*self.both("measure", "-O", "qcow2", "-o", options, "--size", size))

    def test_encrypted(self):
        for kind in ("luks", "aes"):
            path = self.make(kind, f"encrypt.format={kind},encrypt.key-secret=s" + (",encrypt.iter-time=10" if kind == "luks" else ""))
            opts = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
            self.run_tool("qemu-io", *SECRET, "--image-opts", opts, "-c", "write -P 1 1M 1M")
            with self.subTest(kind):
                ours, theirs = self.both("info", *SECRET, "--image-opts", opts)
                for one in (ours, theirs):
                    self.assertTrue(one.pop("filename").startswith("json:"))
                self.assertEqual(theirs, ours)
                self.assertEqual(*self.both("check", *SECRET, "--image-opts", opts))
                self.assertEqual(*self.both("measure", "-O", "qcow2", *SECRET, "--image-opts", opts))
                ours, theirs = self.both("map", *SECRET, "--image-opts", opts)
                self.assertEqual(self.essence(theirs), self.essence(ours))
                # What the metadata says needs no passphrase.
                self.assertEqual(ours, json.loads(self.image("map", "--json", path)))
                self.assertTrue(json.loads(self.image("info", "--json", path))["encrypted"])
                self.image("resize", *SECRET, "--image-opts", opts, "8M")
                self.image("snapshot", "-c", "s", *SECRET, "--image-opts", opts)
                self.run_tool("qemu-io", *SECRET, "--image-opts", opts, "-c", "read -P 0 0 1M", "-c", "read -P 1 1M 1M", "-c",
                              "read -P 0 2M 6M")
                self.refused("No secret with id 's'", "resize", "--image-opts", opts, "9M")
                self.refused("encrypt.key-secret", "resize", path, "9M")

    def test_damage(self):
        """The same findings, the same status, and the same image when it has been repaired."""
        def patch(offset, data):
            with open(path, "r+b") as file:
                file.seek(offset)
                file.write(data)

        def block_of(table):
            with open(path, "rb") as file:
                file.seek(table)
                return int.from_bytes(file.read(8), "big")

        for name, damage, status in (
            ("a leak", lambda: patch(block_of(65536) + 2 * 60, b"\0\1"), 3),
            ("a count too low", lambda: patch(block_of(65536) + 2 * 5, b"\0\0"), 2),
            ("marked corrupt", lambda: patch(79, b"\2"), 0),
            ("dirty", lambda: patch(79, b"\1"), 0),
        ):
            for repair in ("leaks", "all"):
                with self.subTest(name, repair=repair):
                    path = self.make("d", commands=["write -P 1 0 1M"])
                    os.truncate(path, 70 * 65536)
                    damage()
                    twin = shutil.copy(path, self.path("twin"))
                    ours, theirs = self.both("check", path)
                    self.assertEqual(theirs, ours)
                    self.assertEqual(status, self.run_tool(gt.GANTRY, "image", "check", path, check=False).returncode)
                    mended = self.run_tool(gt.GANTRY, "image", "check", "-r", repair, path, check=False)
                    other = self.run_tool("qemu-img", "check", "-q", "-r", repair, twin, check=False)
                    # What is left: corruptions that only "all" mends (the reference has no status for that).
                    left = 2 if (name, repair) == ("a count too low", "leaks") else 0
                    self.assertEqual((left, bool(left)), (mended.returncode, bool(other.returncode)), mended.stdout + mended.stderr)
                    a, b = self.both("check", path)
                    self.assertEqual(b, a)
                    self.assertEqual(left, self.run_tool("qemu-img", "check", "-q", twin, check=False).returncode)
                    if not left:
                        self.run_tool("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "write -P 2 0 64k", path)
                        self.run_tool("qemu-img", "check", "-q", path)

    def test_statuses(self):
        raw = self.path("base.raw")
        for words in (("check", "-f", "raw", raw), ("check", self.path("absent")), ("info", self.path("absent")),
                      ("map", self.path("absent")), ("info", "-f", "qcow2", raw), ("check", "-r", "some", self.path("plain"))):
            ours = self.run_tool(gt.GANTRY, "image", *words, check=False)
            theirs = self.run_tool("qemu-img", *words, check=False)
            self.assertEqual(theirs.returncode, ours.returncode, (words, ours.stderr))


class Changes(ToolCase):
    """What the tool makes of an image is what qemu-img makes of its twin."""

    def twins(self, options="", size="4M", commands=("write -P 1 0 1M",)):
        return [self.make(name, options.replace("DATA", name + ".data"), size, commands) for name in ("ours", "theirs")]

    def info(self, path):
        info = json.loads(self.run_tool("qemu-img", "info", "--output=json", path).stdout)
        info["format-specific"]["data"].pop("data-file", None)
        return {key: info.get(key) for key in ("virtual-size", "format-specific", "dirty-flag", "cluster-size")}

    def test_amend(self):
        for options, steps in (
            ("compat=0.10", ["compat=1.1", "lazy_refcounts=on,refcount_bits=64", "lazy_refcounts=off", "refcount_bits=16", "compat=0.10"]),
            ("refcount_bits=1", ["refcount_bits=2", "refcount_bits=32", "size=8M", "size=6M"]),
            ("data_file=DIR/DATA,data_file_raw=on", ["data_file_raw=off", "data_file=DIR/other.data"]),
        ):
            ours, theirs = self.twins(options)
            for step in steps:
                with self.subTest(options, step=step):
                    step = step.replace("DIR", self.dir)
                    if "other.data" in step:
                        shutil.copy(self.path("ours.data"), self.path("other.data"))
                    self.image("amend", "-o", step, ours)
                    self.run_tool("qemu-img", "amend", "-q", "-o", step, theirs)
                    self.run_tool("qemu-img", "check", "-q", ours)
                    self.assertEqual(self.info(theirs), self.info(ours))
                    self.run_tool("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 0 1M 3M", ours)

    def test_key_slots(self):
        path = self.make("e", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10")
        words = [*SECRET, "--object", "secret,id=new,data=another"]

        def opts(secret):
            return f"driver=qcow2,encrypt.key-secret={secret},file.filename={path}"

        def slots():
            data = json.loads(self.image("info", "--json", path))["format-specific"]["data"]["encrypt"]
            return [slot["active"] for slot in data["slots"]]

        self.image("amend", *words, "--image-opts", "-o", "encrypt.state=active,encrypt.new-secret=new", "-o",
                   "encrypt.iter-time=10,encrypt.keyslot=3", opts("s"))
        self.assertEqual([True, False, False, True] + [False] * 4, slots())
        self.run_tool("qemu-io", *words, "--image-opts", "-c", "write -P 1 0 64k", opts("new"))
        self.image("amend", *words, "--image-opts", "-o", "encrypt.state=inactive,encrypt.old-secret=s", opts("new"))
        self.assertEqual([False, False, False, True] + [False] * 4, slots())
        self.refused("refusing operation", "amend", *words, "--image-opts", "-o", "encrypt.state=inactive,encrypt.keyslot=3", opts("new"))
        self.refused("Invalid password", "resize", *words, "--image-opts", opts("s"), "8M")
        self.run_tool("qemu-img", "check", "-q", *words, "--image-opts", opts("new"))

    def test_resize(self):
        for options in ("", "data_file=DIR/DATA,data_file_raw=on", "extended_l2=on", "cluster_size=512"):
            ours, theirs = self.twins(options)
            for words in (["8M"], ["--preallocation", "metadata", "+1M"], ["--preallocation", "falloc", "10M"],
                          ["--preallocation", "full", "12M"], ["--shrink", "-3M"], ["--shrink", "512k"]):
                with self.subTest(options, words=words):
                    if "data_file" in options and "--shrink" in words:
                        continue  # the reference crashes
                    self.image("resize", *words[:-1], ours, words[-1])
                    self.run_tool("qemu-img", "resize", "-q", *words[:-1], theirs, words[-1])
                    self.run_tool("qemu-img", "check", "-q", ours)
                    self.assertEqual(self.info(theirs), self.info(ours))
                    self.run_tool("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", ours, theirs)
                    if words[0] == "--preallocation" and "data_file" not in options:
                        a, b = (json.loads(self.run_tool("qemu-img", "check", "--output=json", path).stdout) for path in (ours, theirs))
                        self.assertEqual(b["allocated-clusters"], a["allocated-clusters"])

    def test_commit_and_rebase(self):
        self.raw_image("base.raw", 2 * MIB, gt.text_block)
        shutil.copy(self.path("base.raw"), self.path("base2.raw"))
        ours = self.make("ours", "backing_file=DIR/base.raw,backing_fmt=raw", commands=["write -P 1 0 100k", "write -z 1M 64k"])
        theirs = self.make("theirs", "backing_file=DIR/base2.raw,backing_fmt=raw", commands=["write -P 1 0 100k", "write -z 1M 64k"])
        self.image("commit", ours)
        self.run_tool("qemu-img", "commit", "-q", theirs)
        self.assertEqual(gt.checksum(self.path("base2.raw")), gt.checksum(self.path("base.raw")))
        self.run_tool("qemu-img", "check", "-q", ours)
        self.run_tool("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", ours, theirs)
        self.image("rebase", "-u", "-b", "base2.raw", "-F", "raw", ours)
        info = json.loads(self.image("info", "--json", ours))
        self.assertEqual(("base2.raw", self.path("base2.raw"), "raw"),
                         tuple(info[key] for key in ("backing-filename", "full-backing-filename", "backing-filename-format")))


if __name__ == "__main__":
    gt.main()
