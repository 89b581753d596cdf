#!/usr/bin/python3
# One configuration: the tool has loops of its own.
"""gantry image: one sentence for what cannot be done, and the progress bar of long work on a terminal."""

import json
import os
import pathlib
import pty
import re
import select
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import MIB
from image_tool_case import ToolCase

NOBODY = 65534


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
