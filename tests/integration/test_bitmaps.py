#!/usr/bin/python3
"""Dirty bitmaps: the commands with their exact texts, what is recorded, and bitmaps stored in qcow2 images, where the
reference's tools must find what we stored and we what they stored."""

import hashlib
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import KIB, MIB

B = "block-dirty-bitmap-"


class BitmapCase(gt.Case):
    def bitmaps(self, q, node):
        """The bitmaps of a node, by name."""
        for info in q.cmd("query-named-block-nodes"):
            if info["node-name"] == node:
                return {bitmap["name"]: bitmap for bitmap in info.get("dirty-bitmaps", [])}
        self.fail(f"no node {node}")

    def refused(self, q, text, command, /, **arguments):
        """The command fails with `text`, or a hint follows it after a semicolon."""
        kind, found = q.error(B + command, **arguments)
        self.assertEqual(kind, "GenericError")
        if found != text and not (gt.IS_GANTRY and found.startswith(text + "; ")):
            self.assertEqual(found, text)

    def write(self, socket_path, export, *commands):
        """Runs qemu-io commands on an export."""
        words = [word for command in commands for word in ("-c", command)]
        self.run_tool("qemu-io", "-f", "raw", *words, self.uri(socket_path, export))


class Commands(BitmapCase):
    def setUp(self):
        super().setUp()
        self.q = self.daemon().qmp
        self.null("n", MIB)
        self.null("m", 2 * MIB)

    def null(self, name, size):
        self.q.cmd("blockdev-add", {"driver": "null-co", "node-name": name, "read-zeroes": True, "size": size})

    def cmd(self, command, /, **arguments):
        self.assertEqual(self.q.cmd(B + command, arguments), {})

    def test_add_checks_its_arguments(self):
        q = self.q
        self.refused(q, "Cannot find device='zz' nor node-name='zz'", "add", node="zz", name="b")
        self.refused(q, "Bitmap name cannot be empty", "add", node="n", name="")
        for granularity in (0, 1, 256, 1000, 3 * MIB):
            self.refused(q, "Granularity must be power of 2 and at least 512", "add", node="n", name="b",
                         granularity=granularity)
        self.refused(q, "Parameter 'granularity' expects uint32_t", "add", node="n", name="b", granularity=-1)
        self.refused(q, "Parameter 'granularity' expects uint32_t", "add", node="n", name="b", granularity=1 << 32)
        self.refused(q, "Parameter 'autoload' is unexpected", "add", node="n", name="b", autoload=True)
        self.refused(q, "Can't store persistent bitmaps to n: Operation not supported", "add", node="n", name="b",
                     persistent=True)
        self.refused(q, "Bitmap name too long: " + "x" * 1024, "add", node="n", name="x" * 1024)
        self.assertEqual(self.bitmaps(q, "n"), {})
        self.cmd("add", node="n", name="b")
        self.refused(q, "Bitmap already exists: b", "add", node="n", name="b")
        self.cmd("add", node="n", name="x" * 1023)
        self.cmd("add", node="m", name="b", granularity=1 << 31)

    def test_bitmaps_are_listed_newest_first_with_all_members(self):
        self.cmd("add", node="n", name="a")
        self.cmd("add", node="n", name="b", granularity=4096, disabled=True)
        for info in self.q.cmd("query-named-block-nodes"):
            if info["node-name"] == "n":
                self.assertEqual(info["dirty-bitmaps"], [
                    {"name": "b", "count": 0, "granularity": 4096, "recording": False, "busy": False, "persistent": False},
                    {"name": "a", "count": 0, "granularity": 65536, "recording": True, "busy": False, "persistent": False}])
            else:
                self.assertNotIn("dirty-bitmaps", info)

    def test_names_that_are_not_there(self):
        for command in ("remove", "clear", "enable", "disable"):
            self.refused(self.q, "Node 'zz' not found", command, node="zz", name="b")
            self.refused(self.q, "Dirty bitmap 'b' not found", command, node="n", name="b")
        self.cmd("add", node="n", name="b")
        self.refused(self.q, "Node 'zz' not found", "merge", node="zz", target="b", bitmaps=["b"])
        self.refused(self.q, "Dirty bitmap 'zz' not found", "merge", node="n", target="zz", bitmaps=["b"])
        self.refused(self.q, "Dirty bitmap 'zz' not found", "merge", node="n", target="b", bitmaps=["zz"])
        self.refused(self.q, "Node 'zz' not found", "merge", node="n", target="b", bitmaps=[{"node": "zz", "name": "b"}])
        self.refused(self.q, "Dirty bitmap 'b' not found", "merge", node="n", target="b",
                     bitmaps=[{"node": "m", "name": "b"}])
        self.refused(self.q, "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr", "merge", node="n",
                     target="b", bitmaps=[1])
        self.refused(self.q, "Parameter 'bitmaps[0].name' is missing", "merge", node="n", target="b", bitmaps=[{"node": "m"}])
        self.cmd("remove", node="n", name="b")
        self.refused(self.q, "Dirty bitmap 'b' not found", "remove", node="n", name="b")

    def test_writes_are_recorded_while_enabled(self):
        gt.require("qemu-io")
        path = self.start_nbd(self.q)
        self.q.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True})
        self.cmd("add", node="n", name="b", granularity=4096)
        self.cmd("add", node="n", name="off", granularity=4096, disabled=True)
        self.write(path, "n", "write 0 100", "write -z 64k 8k")
        found = self.bitmaps(self.q, "n")
        self.assertEqual((found["b"]["count"], found["off"]["count"]), (4096 + 8192, 0))
        self.cmd("disable", node="n", name="b")
        self.cmd("disable", node="n", name="b")
        self.cmd("enable", node="n", name="off")
        self.write(path, "n", "write 512k 4k")
        found = self.bitmaps(self.q, "n")
        self.assertEqual((found["b"]["count"], found["off"]["count"]), (4096 + 8192, 4096))
        self.assertEqual((found["b"]["recording"], found["off"]["recording"]), (False, True))
        self.cmd("clear", node="n", name="b")
        self.assertEqual(self.bitmaps(self.q, "n")["b"]["count"], 0)

    def test_merge(self):
        gt.require("qemu-io")
        path = self.start_nbd(self.q)
        self.q.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True})
        for name, granularity in (("a", 512), ("b", 65536), ("c", 4096)):
            self.cmd("add", node="n", name=name, granularity=granularity)
            self.write(path, "n", f"write {len(self.bitmaps(self.q, 'n')) * 128}k 512")
            self.cmd("disable", node="n", name=name)
        self.cmd("add", node="n", name="all", granularity=512)
        self.cmd("add", node="m", name="other")
        text = "Bitmaps are of different sizes (destination size is 1048576, source size is 2097152) and can't be merged"
        self.refused(self.q, text, "merge", node="n", target="all", bitmaps=["a", {"node": "m", "name": "other"}])
        self.assertEqual(self.bitmaps(self.q, "n")["all"]["count"], 0)
        self.cmd("merge", node="n", target="all", bitmaps=["a", "all", {"node": "n", "name": "b"}, "c"])
        self.assertEqual(self.bitmaps(self.q, "n")["all"]["count"], 512 + 65536 + 4096)

    def test_an_empty_merge_does_nothing(self):
        gt.require_gantry("the reference crashes")
        self.cmd("add", node="n", name="b")
        self.cmd("merge", node="n", target="b", bitmaps=[])
        self.assertEqual(self.bitmaps(self.q, "n")["b"]["count"], 0)

    def test_digests(self):
        gt.require("qemu-io")
        digest = lambda: self.q.cmd("x-debug-block-dirty-bitmap-sha256", {"node": "n", "name": "b"})["sha256"]
        path = self.start_nbd(self.q)
        self.q.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True})
        self.cmd("add", node="n", name="b")
        self.assertEqual(digest(), hashlib.sha256(bytes(8)).hexdigest())
        self.write(path, "n", "write 0 512", "write 960k 512")
        self.assertEqual(digest(), hashlib.sha256(b"\x01\x80" + bytes(6)).hexdigest())

    def test_bitmaps_follow_the_size(self):
        raw = self.raw_image("a.raw", MIB)
        self.q.cmd("blockdev-add", {"driver": "file", "node-name": "f", "filename": raw})
        self.q.cmd("blockdev-add", {"driver": "raw", "node-name": "r", "file": "f"})
        self.cmd("add", node="r", name="b")
        self.q.cmd("block_resize", {"node-name": "r", "size": 2 * MIB})
        if gt.IS_GANTRY:  # the reference calls the growth clean
            self.assertEqual(self.bitmaps(self.q, "r")["b"]["count"], MIB)
        self.q.cmd("block_resize", {"node-name": "r", "size": 0})
        self.assertEqual(self.bitmaps(self.q, "r")["b"]["count"], 0)


class Stored(BitmapCase):
    """Persistent bitmaps in qcow2 images."""

    def setUp(self):
        super().setUp()
        gt.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")

    # --- helpers

    def image(self, name="a.qcow2", size="8M", options="", bitmaps=()):
        """A new image; `bitmaps`: (name, options of qemu-img bitmap...)."""
        path = self.path(name)
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, size)
        for bitmap, *more in bitmaps:
            self.run_tool("qemu-img", "bitmap", "--add", *more, path, bitmap)
        return path

    def add(self, q, path, node="q", **more):
        q.cmd("blockdev-add", {"driver": "qcow2", "node-name": node, "file": {"driver": "file", "filename": path}, **more})

    def reopen(self, q, path, **more):
        q.cmd("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "q",
                                               "file": {"driver": "file", "filename": path}, **more}]})

    def export(self, q, node="q"):
        path = self.start_nbd(q)
        q.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": node, "writable": True})
        return path

    def stored(self, path):
        """What the image says about its bitmaps: {name: (granularity, flags)}."""
        info = json.loads(self.run_tool("qemu-img", "info", "-U", "--output=json", path).stdout)
        return {b["name"]: (b["granularity"], sorted(b["flags"]))
                for b in info["format-specific"]["data"].get("bitmaps", [])}

    def check(self, path):
        """The image is whole, without leaks."""
        done = self.run_tool("qemu-img", "check", path, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def dirty(self, path, name):
        """The dirty ranges of a stored bitmap, as the reference reads them: [(offset, end)]."""
        done = self.run_tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", "--", "[", "qemu-nbd", "-r", "-f",
                             "qcow2", "-B", name, path, "]")
        ranges = []
        for extent in json.loads(done.stdout):
            if extent["type"] & 1:
                begin, end = extent["offset"], extent["offset"] + extent["length"]
                if ranges and ranges[-1][1] == begin:
                    begin = ranges.pop()[0]
                ranges.append((begin, end))
        return ranges

    def round_trip(self, path):
        """We open the image for writing and close it."""
        daemon = self.daemon()
        self.add(daemon.qmp, path)
        found = self.bitmaps(daemon.qmp, "q")
        daemon.stop()
        return found

    # --- tests

    def test_what_we_store_the_reference_reads(self):
        path = self.image()
        daemon = self.daemon()
        q = daemon.qmp
        self.add(q, path)
        for name, more in (("b", {}), ("fine", {"granularity": 512}), ("off", {"disabled": True}), ("empty", {})):
            q.cmd(B + "add", {"node": "q", "name": name, "persistent": True, **more})
        q.cmd(B + "add", {"node": "q", "name": "memory"})
        sock = self.export(q)
        q.cmd(B + "disable", {"node": "q", "name": "empty"})
        self.write(sock, "q", "write 0 64k", "write 1M 700", "write -z 3M 128k", "write 7M 1M")
        self.assertEqual(self.stored(path), {})  # stored when the image is closed
        daemon.stop()
        self.assertEqual(self.stored(path), {"b": (65536, ["auto"]), "fine": (512, ["auto"]), "off": (65536, []),
                                             "empty": (65536, [])})
        self.check(path)
        self.assertEqual(self.dirty(path, "b"), [(0, 64 * KIB), (MIB, MIB + 64 * KIB), (3 * MIB, 3 * MIB + 128 * KIB),
                                                 (7 * MIB, 8 * MIB)])
        self.assertEqual(self.dirty(path, "fine"), [(0, 64 * KIB), (MIB, MIB + 1024), (3 * MIB, 3 * MIB + 128 * KIB),
                                                    (7 * MIB, 8 * MIB)])
        self.assertEqual(self.dirty(path, "off"), [])
        self.run_tool("qemu-img", "bitmap", "--merge", "fine", path, "off")
        self.run_tool("qemu-img", "bitmap", "--remove", path, "empty")
        self.check(path)
        self.assertEqual(self.dirty(path, "off")[1], (MIB, MIB + 64 * KIB))

    def test_what_the_reference_stores_we_read(self):
        for options in ("", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "refcount_bits=1", "refcount_bits=64",
                        "lazy_refcounts=on,cluster_size=4k", "preallocation=metadata", f"data_file={self.path('data')}",
                        f"data_file={self.path('data')},data_file_raw=on,extended_l2=on,cluster_size=16k"):
            with self.subTest(options):
                path = self.image("r.qcow2", "40M", options,
                                  [("on",), ("fine", "-g", "512"), ("off", "--disable"), ("coarse", "-g", "1M")])
                self.run_tool("qemu-io", "-c", "write 5M 64k", "-c", "write 39M 1M", "-c", "write 123k 700", path)
                names = ("on", "fine", "off", "coarse")
                before = {name: self.dirty(path, name) for name in names}
                self.assertEqual(before["off"], [])
                found = self.round_trip(path)
                for name in names:
                    self.assertEqual(found[name]["count"], sum(end - begin for begin, end in before[name]), name)
                    self.assertEqual(found[name]["recording"], name != "off")
                    self.assertTrue(found[name]["persistent"])
                self.check(path)
                self.assertEqual({name: self.dirty(path, name) for name in names}, before)
                self.assertEqual(self.stored(path)["off"][1], [])
                self.assertEqual(self.stored(path)["fine"], (512, ["auto"]))
                os.unlink(path)

    def test_writes_join_what_was_stored(self):
        path = self.image(bitmaps=[("b",), ("off", "--disable")])
        self.run_tool("qemu-io", "-c", "write 0 64k", path)
        daemon = self.daemon()
        self.add(daemon.qmp, path)
        self.assertEqual(self.stored(path), {"b": (65536, ["auto", "in-use"]), "off": (65536, ["in-use"])})
        sock = self.export(daemon.qmp)
        self.write(sock, "q", "write 2M 64k")
        daemon.stop()
        self.assertEqual(self.stored(path), {"b": (65536, ["auto"]), "off": (65536, [])})
        self.check(path)
        self.assertEqual(self.dirty(path, "b"), [(0, 64 * KIB), (2 * MIB, 2 * MIB + 64 * KIB)])
        self.assertEqual(self.dirty(path, "off"), [])

    def test_a_read_only_open_changes_nothing(self):
        path = self.image(bitmaps=[("b",), ("off", "--disable")])
        self.run_tool("qemu-io", "-c", "write 0 64k", path)
        before = gt.checksum(path)
        daemon = self.daemon()
        q = daemon.qmp
        self.add(q, path, **{"read-only": True})
        found = self.bitmaps(q, "q")
        self.assertEqual((found["b"]["count"], found["b"]["recording"], found["b"]["persistent"]), (65536, True, True))
        for command in ("remove", "clear"):
            self.refused(q, "Bitmap 'b' is readonly and cannot be modified", command, node="q", name="b")
        self.refused(q, "Bitmap 'b' is readonly and cannot be modified", "merge", node="q", target="b", bitmaps=["off"])
        if gt.IS_GANTRY:  # the reference takes it and loses it
            kind, text = q.error(B + "add", {"node": "q", "name": "new", "persistent": True})
            self.assertRegex(text, "^Can't make bitmap 'new' persistent in 'q': Image is read-only")
        q.cmd(B + "add", {"node": "q", "name": "memory"})
        q.cmd(B + "merge", {"node": "q", "target": "memory", "bitmaps": ["b"]})
        self.assertEqual(self.bitmaps(q, "q")["memory"]["count"], 65536)
        daemon.stop()
        self.assertEqual(gt.checksum(path), before)

    def test_reopening_keeps_contents_and_what_the_user_wants(self):
        path = self.image(bitmaps=[("b",), ("other",)])
        daemon = self.daemon()
        q = daemon.qmp
        self.add(q, path)
        q.cmd(B + "add", {"node": "q", "name": "new", "persistent": True})
        q.cmd(B + "disable", {"node": "q", "name": "other"})
        sock = self.export(q)
        self.write(sock, "q", "write 0 64k")
        q.cmd("block-export-del", {"id": "e", "mode": "hard"})
        q.event("BLOCK_EXPORT_DELETED", id="e")

        self.reopen(q, path, **{"read-only": True})
        self.assertEqual(self.stored(path), {"b": (65536, ["auto"]), "other": (65536, []), "new": (65536, ["auto"])})
        found = self.bitmaps(q, "q")
        self.assertEqual({name: (b["count"], b["recording"]) for name, b in found.items()},
                         {"b": (65536, True), "other": (0, False), "new": (65536, True)})
        self.assertEqual(self.dirty(path, "b"), [(0, 64 * KIB)])

        self.reopen(q, path, **{"read-only": False})
        self.assertEqual(self.stored(path), {"b": (65536, ["auto", "in-use"]), "other": (65536, ["in-use"]),
                                             "new": (65536, ["auto", "in-use"])})
        found = self.bitmaps(q, "q")
        self.assertEqual({name: b["recording"] for name, b in found.items()}, {"b": True, "other": False, "new": True})
        q.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "q", "writable": True})
        self.write(sock, "q", "write 4M 64k")
        daemon.stop()
        self.check(path)
        for name in ("b", "new"):
            self.assertEqual(self.dirty(path, name), [(0, 64 * KIB), (4 * MIB, 4 * MIB + 64 * KIB)])
        self.assertEqual(self.dirty(path, "other"), [])

    def test_blockdev_del_stores_too(self):
        path = self.image()
        q = self.daemon().qmp
        self.add(q, path)
        q.cmd(B + "add", {"node": "q", "name": "b", "persistent": True})
        q.cmd("blockdev-del", {"node-name": "q"})
        self.assertEqual(self.stored(path), {"b": (65536, ["auto"])})
        self.check(path)

    def test_removed_bitmaps_leave_the_image_at_once(self):
        path = self.image(bitmaps=[("a",), ("b",), ("c",)])
        self.run_tool("qemu-io", "-c", "write 0 64k", path)
        daemon = self.daemon()
        q = daemon.qmp
        self.add(q, path)
        q.cmd(B + "remove", {"node": "q", "name": "b"})
        self.assertEqual(sorted(self.stored(path)), ["a", "c"])
        q.cmd(B + "add", {"node": "q", "name": "b", "persistent": True})  # another one
        q.cmd(B + "remove", {"node": "q", "name": "b"})
        for name in ("a", "c"):
            q.cmd(B + "remove", {"node": "q", "name": name})
        self.assertEqual(self.stored(path), {})
        self.assertEqual(self.bitmaps(q, "q"), {})
        daemon.stop()
        self.check(path)

    def test_kill_leaves_them_inconsistent_and_only_removable(self):
        path = self.image(bitmaps=[("b",), ("c", "--disable")])
        daemon = self.daemon()
        self.add(daemon.qmp, path)
        sock = self.export(daemon.qmp)
        daemon.qmp.cmd(B + "add", {"node": "q", "name": "never", "persistent": True})
        self.write(sock, "q", "write 0 64k", "flush")
        daemon.kill()
        self.assertEqual(self.stored(path), {"b": (65536, ["auto", "in-use"]), "c": (65536, ["in-use"])})

        daemon = self.daemon()
        q = daemon.qmp
        self.add(q, path)
        found = self.bitmaps(q, "q")
        self.assertEqual(sorted(found), ["b", "c"])
        for bitmap in found.values():
            self.assertEqual((bitmap.get("inconsistent"), bitmap["recording"], bitmap["persistent"], bitmap["count"]),
                             (True, False, True, 0))
        text = "Bitmap 'b' is inconsistent and cannot be used"
        if not gt.IS_GANTRY:
            return
        q.cmd(B + "add", {"node": "q", "name": "fine"})
        for command in ("clear", "enable", "disable"):
            self.refused(q, text, command, node="q", name="b")
        self.refused(q, text, "merge", node="q", target="b", bitmaps=["fine"])
        self.refused(q, text, "merge", node="q", target="fine", bitmaps=["b"])
        self.refused(q, "Bitmap already exists: b", "add", node="q", name="b")
        q.cmd(B + "remove", {"node": "q", "name": "b"})
        self.assertEqual(self.stored(path), {"c": (65536, ["in-use"])})
        daemon.stop()
        self.assertEqual(self.stored(path), {"c": (65536, ["in-use"])})
        self.check(path)

    def test_the_reference_crashes_and_we_do_not_believe_it(self):
        path = self.image(bitmaps=[("b",)])
        self.run_tool("qemu-io", "-c", "write 0 64k", "-c", "flush", "-c", "abort", path, check=False)
        self.assertEqual(self.stored(path), {"b": (65536, ["auto", "in-use"])})
        found = self.round_trip(path)
        self.assertTrue(found["b"]["inconsistent"])
        self.assertEqual(self.stored(path), {"b": (65536, ["auto", "in-use"])})
        self.check(path)

    def test_what_cannot_be_stored_is_refused(self):
        q = self.daemon().qmp
        self.add(q, self.image("v2.qcow2", options="compat=0.10"), "v2")
        self.refused(q, "Can't make bitmap 'b' persistent in 'v2': Cannot store dirty bitmaps in qcow2 v2 files", "add",
                     node="v2", name="b", persistent=True)
        self.add(q, self.image())
        name = "x" * 1024
        self.refused(q, f"Can't make bitmap '{name}' persistent in 'q': Name length exceeds maximum (1023 characters)",
                     "add", node="q", name=name, persistent=True)
        q.cmd(B + "add", {"node": "q", "name": "x" * 1023, "persistent": True})
        self.refused(q, "Bitmap already exists: " + "x" * 1023, "add", node="q", name="x" * 1023, persistent=True)
        self.add(q, self.image("huge.qcow2", "4T", "cluster_size=2M"), "huge")
        self.refused(q, "Can't make bitmap 'b' persistent in 'huge': Too much space will be occupied by the bitmap. "
                     "Use larger granularity", "add", node="huge", name="b", persistent=True, granularity=512)

    def test_default_granularity_is_the_cluster_size_within_limits(self):
        q = self.daemon().qmp
        for size, granularity in (("512", 4096), ("16k", 16384), ("2M", 65536)):
            self.add(q, self.image(f"{size}.qcow2", options=f"cluster_size={size}"), f"n{size}")
            q.cmd(B + "add", {"node": f"n{size}", "name": "b"})
            self.assertEqual(self.bitmaps(q, f"n{size}")["b"]["granularity"], granularity)

    def test_many_bitmaps_and_large_ones(self):
        path = self.image(size="300M", options="cluster_size=512")
        daemon = self.daemon()
        q = daemon.qmp
        self.add(q, path)
        sock = self.export(q)
        for i in range(100):
            q.cmd(B + "add", {"node": "q", "name": f"bitmap {i} " + "x" * (i * 10), "persistent": True, "granularity": 512 << i % 8})
        self.write(sock, "q", "write 0 1M", *(f"write {i * 3000}k 700" for i in range(90)))
        q.cmd(B + "add", {"node": "q", "name": "late", "persistent": True})
        daemon.stop()
        self.check(path)
        counts = {name: b["count"] for name, b in self.round_trip(path).items()}
        self.check(path)
        self.assertEqual(len(counts), 101)
        self.assertEqual(counts["late"], 0)
        self.assertEqual(self.round_trip(path).keys(), counts.keys())
        name = "bitmap 0 "
        self.assertEqual(sum(end - begin for begin, end in self.dirty(path, name)), counts[name])

    def test_resizing_keeps_them(self):
        path = self.image(bitmaps=[("b",)])
        daemon = self.daemon()
        q = daemon.qmp
        self.add(q, path)
        sock = self.export(q)
        self.write(sock, "q", "write 0 64k", "write 7M 64k")
        q.cmd("block-export-del", {"id": "e", "mode": "hard"})
        q.event("BLOCK_EXPORT_DELETED", id="e")
        q.cmd("block_resize", {"node-name": "q", "size": 4096 * MIB})
        self.assertEqual(self.bitmaps(q, "q")["b"]["count"], 128 * KIB)
        daemon.stop()
        self.check(path)
        self.assertEqual(self.dirty(path, "b"), [(0, 64 * KIB), (7 * MIB, 7 * MIB + 64 * KIB)])
        daemon = self.daemon()
        self.add(daemon.qmp, path)
        daemon.qmp.cmd("block_resize", {"node-name": "q", "size": 4 * MIB})
        daemon.stop()
        self.check(path)
        self.assertEqual(self.dirty(path, "b"), [(0, 64 * KIB)])


if __name__ == "__main__":
    gt.main()
