#!/usr/bin/python3
"""Internal snapshots over QMP, on our daemon and on the reference's; qemu-img judges what is left in the files."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import MIB
from image_case import SECRETS, Images, Writer

SNAPSHOT, DELETE = "blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync"


class Snapshots(Images):
    def snapshots(self, node="n"):
        return self.image(node).get("snapshots", [])

    def test_what_is_refused(self):
        self.open("n", self.make("a"))
        self.open_for_reading("ro", self.make("b"))
        raw = {"driver": "file", "node-name": "leaf", "filename": self.raw_image("r", MIB)}
        self.q.cmd("blockdev-add", {"driver": "raw", "node-name": "raw", "file": raw})
        self.refused("Cannot find device='zz' nor node-name='zz'", SNAPSHOT, device="zz", name="x")
        self.refused("Name is empty", SNAPSHOT, device="n", name="")
        self.refused("Block format 'raw' used by device 'raw' does not support internal snapshots", SNAPSHOT, device="raw",
                     name="x")
        self.refused("Device 'ro' is read only", SNAPSHOT, device="ro", name="x")
        self.refused("Need a root block node", SNAPSHOT, device="leaf", name="x")
        self.assertEqual({}, self.q.cmd(SNAPSHOT, device="n", name="x"))
        self.refused("Snapshot with name 'x' already exists on device 'n'", SNAPSHOT, device="n", name="x")

        self.refused("Cannot find device='zz' nor node-name='zz'", DELETE, device="zz", name="x")
        self.refused("Name or id must be provided", DELETE, device="n")
        self.refused("Failed to get a snapshot list: Operation not supported", DELETE, device="raw", name="x")
        self.refused("Need a root block node", DELETE, device="leaf", name="x")
        for arguments, shown in (({"id": "9"}, ("9", "null")), ({"name": "no"}, ("null", "no")), ({"id": "1", "name": "no"}, ("1", "no")),
                                 ({"id": "2", "name": "x"}, ("2", "x")), ({"id": "", "name": "x"}, ("", "x")),
                                 ({"id": "1", "name": ""}, ("1", "")), ({"id": "x"}, ("x", "null"))):
            self.refused("Snapshot with id '%s' and name '%s' does not exist on device 'n'" % shown, DELETE, device="n", **arguments)
        self.refused("Snapshot with id '1' and name 'null' does not exist on device 'ro'", DELETE, device="ro", id="1")
        self.assertEqual(["x"], [s["name"] for s in self.snapshots()])

    def test_they_are_listed_and_deleted_by_id_and_name(self):
        path = self.make("a")
        self.io(path, "write -P 1 0 1M")
        self.open("n", path)
        names = ["one", "2", "with spaces, 'quotes' and \u00e4", "y" * 255]
        for name in names:
            self.q.cmd(SNAPSHOT, device="n", name=name)
        listed = self.snapshots()
        self.assertEqual([(str(i + 1), name) for i, name in enumerate(names)], [(s["id"], s["name"]) for s in listed])
        for s in listed:
            self.assertEqual(0, s["vm-state-size"])
            self.assertLess(s["date-nsec"], 10**9)
            # No machine, so no clock of its own: it is the time of day, looked up twice by the reference.
            self.assertLess(abs(s["date-sec"] - s["vm-clock-sec"]) * 10**9 + abs(s["date-nsec"] - s["vm-clock-nsec"]), 10**8)
        # What is deleted is returned; a name that looks like an id is none.
        self.assertEqual(listed[1], self.q.cmd(DELETE, device="n", name="2"))
        self.assertEqual(listed[0], self.q.cmd(DELETE, device="n", id="1"))
        self.assertEqual(listed[2], self.q.cmd(DELETE, device="n", id="3", name=names[2]))
        self.assertEqual(listed[3:], self.snapshots())
        # Ids are not used again while a higher one is there.
        self.q.cmd(SNAPSHOT, device="n", name="again")
        self.assertEqual(["4", "5"], [s["id"] for s in self.snapshots()])
        self.close("n")
        self.assert_clean(path)
        self.assertEqual(["4", "5"], [s["id"] for s in self.qemu_info(path)["snapshots"]])
        self.io(path, "read -P 1 0 1M")

    def test_while_a_client_writes(self):
        path = self.make("a", options="cluster_size=4k")
        self.open("n", path)
        server = self.start_nbd(self.q)
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="n", writable=True)
        writer = Writer(self.uri(server, "n"))
        writer.start()
        bounds = {}
        try:
            for i in range(8):
                before = writer.done
                gt.wait_for(lambda: writer.error or writer.done > before + 300, "more writes")
                earliest = writer.done
                self.q.cmd(SNAPSHOT, device="n", name=f"s{i}")
                bounds[f"s{i}"] = (earliest, writer.begun)
                if i % 3 == 2:  # one of those before goes, while its clusters are being left behind
                    self.q.cmd(DELETE, device="n", name=f"s{i - 1}")
                    del bounds[f"s{i - 1}"]
        finally:
            writer.finish()
        self.q.cmd("block-export-del", id="e", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.close("n")
        self.assert_clean(path)
        self.assertEqual(list(bounds), [s["name"] for s in self.qemu_info(path)["snapshots"]])
        self.assertEqual(Writer.contents_after(writer.done), self.contents(path))
        for name, (earliest, latest) in bounds.items():
            # One writer, one write after the other: the disk as it was after one of them, and after all of its past.
            found = self.contents(path, "-l", f"snapshot.name={name}")
            newest = max(int.from_bytes(found[at : at + 8], "big") for at in range(0, len(found), Writer.BLOCK))
            self.assertTrue(earliest <= newest <= latest, (name, earliest, newest, latest))
            self.assertEqual(Writer.contents_after(newest), found, name)

    def contents(self, path, *words):
        self.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *words, path, self.path("raw"))
        with open(self.path("raw"), "rb") as file:
            return file.read(Writer.BLOCK * Writer.COUNT)

    def test_of_a_grown_disk_and_of_encrypted_data(self):
        path = self.make("e", *SECRETS, options="encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10")
        self.open("n", path, encrypt={"format": "luks", "key-secret": "s0"})
        server = self.start_nbd(self.q)

        def write(*commands):
            self.q.cmd("block-export-add", type="nbd", id="e", node_name="n", writable=True)
            self.run_tool("qemu-io", "-f", "raw", *[w for c in commands for w in ("-c", c)], self.uri(server, "n"))
            self.q.cmd("block-export-del", id="e", mode="hard")
            self.q.event("BLOCK_EXPORT_DELETED", id="e")

        write("write -P 1 0 1M")
        self.q.cmd(SNAPSHOT, device="n", name="small")
        self.q.cmd("block_resize", node_name="n", size=6 * MIB)
        write("write -P 2 0 512k", "write -P 3 5M 1M")
        self.q.cmd(SNAPSHOT, device="n", name="large")
        self.q.cmd("block_resize", node_name="n", size=2 * MIB)
        write("read -P 2 0 512k", "read -P 1 512k 512k", "read -P 0 1M 1M")
        self.close("n")
        opts = f"driver=qcow2,encrypt.key-secret=s0,file.filename={path}"
        self.run_tool("qemu-img", "check", "-q", *SECRETS, "--image-opts", opts)
        for snapshot, expected in (("small", b"\1" * MIB + bytes(3 * MIB)),
                                   ("large", b"\2" * (MIB // 2) + b"\1" * (MIB // 2) + bytes(4 * MIB) + b"\3" * MIB)):
            self.run_tool("qemu-img", "snapshot", *SECRETS, "--image-opts", "-a", snapshot, opts)
            self.run_tool("qemu-img", "convert", *SECRETS, "--image-opts", "-O", "raw", opts, self.path("out"))
            with open(self.path("out"), "rb") as file:
                self.assertTrue(expected == file.read(), snapshot)


if __name__ == "__main__":
    gt.main()
