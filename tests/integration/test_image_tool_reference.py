#!/usr/bin/python3
"""gantry image beside qemu-img on the same images: equal JSON, equal exit statuses; one sentence for what cannot be done; the
progress bar of long work on a terminal."""

import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import MIB

SECRET = ["--object", "secret,id=s,data=open sesame"]
NOBODY = 65534
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


class ToolCase(gt.Case):
    def setUp(self):
        super().setUp()
        gt.require("qemu-img", "qemu-io")
        gt.require_gantry("the tool is ours")

    def image(self, *words, status=0, **options):
        done = self.run_tool(gt.GANTRY, "image", *words, check=False, **options)
        self.assertEqual(status, done.returncode, f"gantry image {words}: {done.stdout}{done.stderr}")
        return done.stdout

    def refused(self, text, *words, status=1, **options):
        """One sentence on stderr, nothing else; the status is that of a failure."""
        done = self.run_tool(gt.GANTRY, "image", *words, check=False, **options)
        self.assertEqual((status, ""), (done.returncode, done.stdout), done.stderr)
        self.assertRegex(done.stderr, rf"\Agantry image {words[0]}: [^\n]*{text}[^\n]*\n\Z")
        self.assertNotRegex(done.stderr, r"(?i)assert|check failed|std::|\(null\)")

    def make(self, name, options="", size="4M", commands=()):
        path = self.path(name)
        words = ["-o", options.replace("DIR", self.dir)] if options else []
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *(SECRET if "encrypt" in options else []), *words, path,
                      *([size] if "backing" not in options else []))
        if commands:
            self.run_tool("qemu-io", "-f", "qcow2", *[w for c in commands for w in ("-c", c)], path)
        return path


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


class Refusals(ToolCase):
    def test_words(self):
        path = self.make("i")
        self.raw_image("r", MIB)
        for command in ("create", "info", "check", "map", "resize", "snapshot", "amend", "measure", "compact", "commit", "rebase"):
            help_text = self.image(command, "--help")
            self.assertIn(f"Usage: gantry image {command} ", help_text)
            for option in ("--format", "--image-opts", "--object", "--json", "--progress", "--help"):
                self.assertIn(option, help_text)
        self.assertIn("encrypt.new-secret", self.image("amend", "-o", "help"))
        self.assertIn("compression_type", self.image("create", "-o", "help"))
        before = gt.checksum(path)
        for text, *words in (
            ("Invalid image size '12q'", "create", "x", "12q"), ("Invalid image size '\\+1M'", "create", "x", "+1M"),
            ("Invalid image size '8E'", "create", "x", "8E"), ("The image size is too large", "create", "x", "7E"),
            ("File too large", "create", "-f", "raw", "x", "7E"), ("Image creation needs a size", "create", "x"),
            ("name the image", "create"), ("too many arguments", "create", "x", "1M", "2M"), ("Unknown file format 'vmdk'", "create", "-f", "vmdk", "x", "1M"),
            ("Invalid parameter 'foo'", "create", "-o", "foo=1", "x", "1M"), ("Expected '=' after parameter 'foo'", "create", "-o", "foo", "x", "1M"),
            ("'cluster_size' expects a size", "create", "-o", "cluster_size=many", "x", "1M"),
            ("Cluster size must be a power of two", "create", "-o", "cluster_size=3000", "x", "1M"),
            ("No such file or directory", "create", "no/such/place", "1M"), ("Is a directory", "create", "/tmp", "1M"),
            ("without backing format", "create", "-b", "i", "x"), ("Could not open backing file", "create", "-b", "gone", "-F", "raw", "x"),
            ("is the image itself", "create", "-o", "data_file=x", "x", "1M"), ("key-secret", "create", "-o", "encrypt.format=luks", "x", "1M"),
            ("No secret with id 'zz'", "create", "-o", "encrypt.format=luks,encrypt.key-secret=zz", "x", "1M"),
            ("Either 'file' or 'data'", "create", "--object", "secret,id=s", "x", "1M"),
            ("too few arguments", "resize", path), ("Use the --shrink option", "resize", path, "1M"), ("File too large", "resize", path, "7E"),
            ("is more than the image's", "resize", path, "-9M"), ("multiple of 512", "resize", "--shrink", path, "1000"),
            ("Invalid preallocation mode 'x'", "resize", "--preallocation", "x", path, "8M"), ("say --format raw", "resize", "r", "2M"),
            ("exclude each other", "snapshot", "-c", "a", "-d", "b", path), ("Name is empty", "snapshot", "-c", "", path),
            ("'none'", "snapshot", "-a", "none", path), ("'none'", "snapshot", "-d", "none", path),
            ("does not support internal snapshots", "snapshot", "-f", "raw", "-c", "a", "r"),
            ("-o says what", "amend", path), ("name the image", "amend", "-o", "compat=1.1"), ("Invalid parameter 'foo'", "amend", "-o", "foo=1", path),
            ("only supported for image creation", "amend", "-o", "cluster_size=4k", path), ("power of two", "amend", "-o", "refcount_bits=3", path),
            ("is not encrypted", "amend", "-o", "encrypt.state=inactive", path), ("does not support option amendment", "amend", "-f", "raw", "-o", "size=2M", "r"),
            ("either an image or --size", "measure"), ("either an image or --size", "measure", "--size", "1M", path),
            ("Unknown file format", "measure", "-O", "vmdk", "--size", "1M"), ("Invalid parameter 'foo'", "measure", "-o", "foo=1", "--size", "1M"),
            ("does not support", "compact", "-f", "raw", "r"), ("does not have a backing file", "commit", path),
            ("-b names", "rebase", path), ("backing format must be specified", "rebase", "-b", "r", path),
            ("neither 'leaks' nor 'all'", "check", "-r", "some", path), ("--force-share", "check", "-U", "-r", "all", path),
            ("does not accept value 'foo'", "info", "--image-opts", "driver=foo"), ("JSON", "info", "json:{"), ("'file' is missing", "info", 'json:{"driver":"qcow2"}'),
            ("Image is not in qcow2 format", "info", "-f", "qcow2", "r"), ("unrecognized option", "info", "--wrong", path),
        ):
            with self.subTest(words=words):
                self.refused(text, *words)
        self.assertEqual(before, gt.checksum(path))
        self.assertEqual({"i", "r"}, set(os.listdir(self.dir)))
        self.refused("does not support checks", "check", "-f", "raw", "r", status=63)

    def test_files_that_may_not_be_written(self):
        if os.geteuid() != 0:
            gt.missing("needs root to become somebody else", installable=False)
        path = self.make("i", commands=["write -P 1 0 64k"])
        os.chmod(path, 0o444)
        os.chmod(self.dir, 0o755)
        before = gt.checksum(path)
        self.image("info", path, user=NOBODY)
        self.image("check", path, user=NOBODY)
        for words in (("resize", path, "8M"), ("snapshot", "-c", "a", path), ("amend", "-o", "lazy_refcounts=on", path),
                      ("compact", path), ("check", "-r", "all", path), ("create", path, "1M"), ("create", "new", "1M")):
            self.refused("Permission denied", *words, user=NOBODY)
        self.assertEqual(before, gt.checksum(path))

    def test_images_that_are_in_use(self):
        path = self.make("i")
        holder = subprocess.Popen(["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.stdout.close)
        self.addCleanup(holder.stdin.close)
        holder.stdout.read(1)  # its prompt: the image is open
        for words in (("resize", path, "8M"), ("snapshot", "-c", "a", path), ("check", path), ("check", "-r", "all", path), ("info", path)):
            self.refused('"write" lock', *words)
        for words in (("info", "-U", path), ("map", "-U", path), ("check", "-U", path)):
            self.image(*words)


class Progress(ToolCase):
    def on_terminal(self, *words, interrupt_at=None):
        """Runs the tool on a terminal: (its status, everything it wrote)."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen([gt.GANTRY, "image", *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=self.dir,
                                   start_new_session=True)
        os.close(theirs)
        self.addCleanup(process.wait)
        text = b""
        try:
            while select.select([ours], [], [], gt.DEADLINE)[0]:
                try:
                    data = os.read(ours, 65536)
                except OSError:  # the other side is closed
                    break
                if not data:
                    break
                text += data
                if interrupt_at and interrupt_at in text:
                    process.send_signal(signal.SIGINT)
                    interrupt_at = None
            return process.wait(gt.DEADLINE), text.decode()
        finally:
            process.kill()
            os.close(ours)

    def assert_bar(self, what, text):
        """A line that is written over: from some number up to 100%, then its end, then the rest."""
        bar, _, rest = text.partition("\n")
        shown = [int(n) for n in re.findall(rf"\r{what} \[[# ]{{40}}\] +(\d+)%", bar)]
        self.assertEqual(sorted(shown), shown)
        self.assertTrue(shown and shown[-1] == 100, text)
        return rest, shown

    def test_long_work_on_a_terminal(self):
        path = self.path("i")
        status, text = self.on_terminal("create", "-o", "preallocation=full", path, "64M")
        self.assertEqual(0, status, text)
        rest, shown = self.assert_bar("Creating", text)
        self.assertGreater(len(shown), 10)
        self.assertIn("Made", rest)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64M", "-c", "discard 0 32M", path)
        for what, words in (("Checking", ("check", path)), ("Compacting", ("compact", path)), ("Amending", ("amend", "-o", "refcount_bits=32", path))):
            status, text = self.on_terminal(*words)
            self.assertEqual(0, status, text)
            if "\r" + what in text:
                self.assertRegex(text, r"100%\r?\n")
            elif what != "Amending":
                self.fail(f"no bar: {text!r}")
        self.make("top", f"backing_file={path},backing_fmt=qcow2", commands=["write -P 2 0 40M"])
        status, text = self.on_terminal("commit", self.path("top"))
        self.assertEqual(0, status, text)
        self.assert_bar("Committing", text)
        self.run_tool("qemu-img", "check", "-q", path)
        # Where nobody looks there is none, unless it is asked for.
        done = self.run_tool(gt.GANTRY, "image", "check", path)
        self.assertEqual("", done.stderr)
        done = self.run_tool(gt.GANTRY, "image", "check", "--progress", "--json", path)
        self.assertIn("100%", done.stderr)
        json.loads(done.stdout)

    def test_interrupted(self):
        path = self.path("i")
        status, text = self.on_terminal("create", "-o", "preallocation=full", path, "2G", interrupt_at=b"  1%")
        self.assertEqual(1, status, text)
        self.assertRegex(text, r"\d%\r?\ngantry image create: [^\n]*cancelled\r?\n\Z")
        self.assertFalse(os.path.exists(path))


if __name__ == "__main__":
    gt.main()
