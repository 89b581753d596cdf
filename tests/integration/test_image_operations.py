#!/usr/bin/python3
"""change-backing-file and block_resize of open images, on our daemon and on the reference's; qemu-img judges what is left in
the files."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import MIB
from image_case import Images

SNAPSHOT = "blockdev-snapshot-internal-sync"


class ChangeBackingFile(Images):
    def setUp(self):
        super().setUp()
        self.base, self.other = self.make("base"), self.make("other")
        self.io(self.base, "write -P 1 0 4M")
        self.io(self.other, "write -P 1 0 2M", "write -P 2 2M 2M")
        self.top = self.make("top", "-b", self.base, "-F", "qcow2", size=None)
        self.open("n", self.top)

    def test_then_reopen(self):
        self.assertEqual({}, self.q.cmd("change-backing-file", device="n", image_node_name="n", backing_file=self.other))
        # The graph stays as it is; the image names the new file, with the driver of the node below as its format.
        seen = self.image("n")
        self.assertEqual((self.other, "qcow2"), (seen["backing-filename"], seen["backing-filename-format"]))
        self.assertEqual(self.base, self.node("n")["backing_file"])
        self.assertEqual(self.base, seen["backing-image"]["filename"])
        self.assertIn('"backing"', self.node("n")["file"])  # the path alone does not lead to this disk any more
        server = self.start_nbd(self.q)
        uri = self.uri(server, "n")
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="n")
        self.run_tool("qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 4M", uri)
        self.q.cmd("block-export-del", id="e", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.close("n")
        self.assert_clean(self.top)
        self.open("n", self.top)
        self.assertEqual(self.other, self.node("n")["backing_file"])
        self.assertEqual(self.top, self.node("n")["file"])
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="n")
        self.run_tool("qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 2M", "-c", "read -P 2 2M 2M", uri)

    def test_names_of_all_kinds(self):
        def change(name):
            self.q.cmd("change-backing-file", device="n", image_node_name="n", backing_file=name)
            image = self.image("n")
            return image.get("backing-filename"), image.get("full-backing-filename")

        self.assertEqual(("other", self.other), change("other"))  # relative to the image
        self.assertEqual(("x" * 1023, self.path("x" * 1023)), change("x" * 1023))
        self.refused("Could not change backing file to '%s': Invalid argument" % ("x" * 1024), "change-backing-file", device="n",
                     image_node_name="n", backing_file="x" * 1024)
        self.assertEqual("x" * 1023, self.image("n")["backing-filename"])
        self.assertEqual((None, None), change(""))
        self.close("n")
        self.assertNotIn("backing-filename", self.qemu_info(self.top))
        self.io(self.top, "read -P 0 0 4M")

    def test_in_the_middle_of_a_chain(self):
        self.close("n")
        upper = self.make("upper", "-b", self.top, "-F", "qcow2", size=None)
        self.open("mid", self.top)
        self.open("n", upper, backing="mid")
        self.q.cmd("change-backing-file", device="n", image_node_name="mid", backing_file=self.other)
        self.close("n")
        self.close("mid")
        self.assertEqual(self.other, self.qemu_info(self.top)["backing-filename"])
        self.assertEqual(self.top, self.qemu_info(upper)["backing-filename"])
        self.io(upper, "read -P 1 0 2M", "read -P 2 2M 2M")

    def test_what_is_refused(self):
        command = "change-backing-file"
        self.open("alone", self.make("alone"))
        self.refused("Cannot find device='zz' nor node-name='zz'", command, device="zz", image_node_name="n", backing_file="x")
        self.refused("Cannot find device='' nor node-name='zz'", command, device="n", image_node_name="zz", backing_file="x")
        self.refused("not allowing backing file change on an image without a backing file", command, device="alone",
                     image_node_name="alone", backing_file="x")
        self.refused("'alone' and image file are not in the same chain", command, device="alone", image_node_name="n",
                     backing_file="x")
        self.close("n")
        self.open_for_reading("n", self.top)
        if gt.IS_GANTRY:  # the reference opens it for writing meanwhile
            self.assertIn("read-only", self.q.error(command, device="n", image_node_name="n", backing_file="x")[1])
            self.assertEqual(self.base, self.qemu_info(self.top)["backing-filename"])


class Resize(Images):
    def size(self):
        return self.image("n")["virtual-size"]

    def resize(self, size):
        self.assertEqual({}, self.q.cmd("block_resize", node_name="n", size=size))
        self.assertEqual(size, self.size())

    def up_and_down(self, path, snapshots):
        self.io(path, "write -P 1 0 4M")
        self.open("n", path)
        if snapshots:
            self.q.cmd(SNAPSHOT, device="n", name="four")
        server = self.start_nbd(self.q)
        for size in (8 * MIB, 2 * MIB + 512, 64 * MIB, 0, 4 * MIB):
            self.resize(size)
            # A client that comes now sees the new size, and zeroes where nothing was before.
            self.q.cmd("block-export-add", type="nbd", id="e", node_name="n", writable=True)
            client = gt.libnbd().NBD()
            client.connect_uri(self.uri(server, "n"))
            self.assertEqual(size, client.get_size())
            if size == 8 * MIB:
                self.assertEqual(b"\1" * 4096 + bytes(4096), client.pread(8192, 4 * MIB - 4096))
            if size == 64 * MIB:
                # The reference leaves the rest of the last cluster as it was.
                shown = 5120 if gt.IS_GANTRY else 512
                self.assertEqual((b"\1" * 512 + bytes(4608))[:shown], client.pread(shown, 2 * MIB))
                client.pwrite(b"\2" * 65536, 63 * MIB)
            if size == 4 * MIB:
                self.assertEqual(bytes(4 * MIB), client.pread(4 * MIB, 0))
            # The size of what a client uses does not change.
            error = self.q.error("block_resize", node_name="n", size=MIB)[1]
            self.assertIn("Permission conflict on node 'n': permissions 'resize' are both required by", error)
            self.assertEqual(size, self.size())
            client.shutdown()
            self.q.cmd("block-export-del", id="e", mode="hard")
            self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.close("n")
        self.assert_clean(path)
        if snapshots:
            self.run_tool("qemu-img", "snapshot", "-a", "four", path)
            self.assert_clean(path)
            self.io(path, "read -P 1 0 4M")

    def test_up_and_down(self):
        for options in ("cluster_size=512", "cluster_size=64k", "extended_l2=on", "compat=0.10", "refcount_bits=1", "lazy_refcounts=on"):
            with self.subTest(options):
                self.up_and_down(self.make("a", options=options), False)
                self.q.cmd("nbd-server-stop")

    def test_up_and_down_with_a_snapshot(self):
        for options in ("cluster_size=4k", "extended_l2=on", "refcount_bits=64"):
            with self.subTest(options):
                self.up_and_down(self.make("a", options=options), True)
                self.q.cmd("nbd-server-stop")

    def test_with_a_data_file(self):
        for options in ("data_file=" + self.path("d"), "data_file_raw=on,data_file=" + self.path("d")):
            path = self.make("a", options=options)
            self.io(path, "write -P 1 0 4M")
            self.open("n", path)
            self.resize(8 * MIB)
            if gt.IS_GANTRY:  # the reference crashes
                self.resize(2 * MIB)
                self.assertEqual(2 * MIB, os.path.getsize(self.path("d")))
            self.close("n")
            self.assert_clean(path)
            self.io(path, "read -P 1 0 2M")

    def test_what_is_shown_is_zero_and_not_the_backing_file(self):
        base = self.make("base", size="8M")
        self.io(base, "write -P 9 0 8M")
        path = self.make("top", "-b", base, "-F", "qcow2", size="2M")
        self.open("n", path)
        self.resize(6 * MIB)
        self.close("n")
        self.io(path, "read -P 9 0 2M", "read -P 0 2M 4M")
        self.assert_clean(path)

    def test_what_is_refused(self):
        path = self.make("a", options="compat=0.10")
        self.open("n", path)
        self.refused("The new size must be a multiple of 512", "block_resize", node_name="n", size=1000)
        self.refused("Parameter 'size' expects a >0 size", "block_resize", node_name="n", size=-1)
        self.refused("Failed to grow the L1 table: File too large", "block_resize", node_name="n", size=1 << 62)
        self.q.cmd(SNAPSHOT, device="n", name="s")
        before = self.image("n")
        self.refused("Can't resize a v2 image which has snapshots", "block_resize", node_name="n", size=8 * MIB)
        self.refused("Can't resize a v2 image which has snapshots", "block_resize", node_name="n", size=MIB)
        self.assertEqual(before, self.image("n"))
        self.close("n")
        self.assert_clean(path)


if __name__ == "__main__":
    gt.main()
