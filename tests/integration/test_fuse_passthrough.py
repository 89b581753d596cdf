#!/usr/bin/python3
# One configuration: the kernel moves the data, no loop of ours.
"""x-passthrough: clients read and write the image's file itself; the graph refuses what would change the way to it."""

import json
import mmap
import os
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from fuse_case import FuseCase, need_root

MIB = 1 << 20


class Passthrough(FuseCase):
    def setUp(self):
        super().setUp()
        gt.require_gantry("x-passthrough")
        need_root("naming files to the kernel")

    def requests(self, mounted):
        """READ and WRITE messages that reached the daemon, in operations of its node."""
        stats = mounted.qmp.cmd("query-blockstats", query_nodes=True)
        of = [entry["stats"] for entry in stats if entry.get("node-name") == mounted.node]
        return sum(one["rd_operations"] + one["wr_operations"] for one in of)

    def test_data_goes_past_us(self):
        for driver in ("file", "raw"):
            with self.subTest(driver):
                image = self.raw_image(f"{driver}.raw", 8 * MIB, pattern=lambda block: bytes([block & 0xff]) * 65536)
                # As any format but raw: a node over a file node.
                form, options = ("qcow2", {"driver": "raw"}) if driver == "raw" else ("raw", {})
                mounted = self.mount(form, image=image, mountpoint=self.path(f"{driver}.file"), passthrough=True,
                                     node_options=options)
                fd = mounted.open()
                before = self.requests(mounted)
                model = bytearray(pathlib.Path(image).read_bytes())
                rng = random.Random(1)
                for _ in range(300):
                    at, size = rng.randrange(len(model)), rng.randrange(1, 20000)
                    size = min(size, len(model) - at)
                    if rng.random() < 0.5:
                        self.assertEqual(os.pread(fd, size, at), bytes(model[at:at + size]))
                    else:
                        data = rng.randbytes(size)
                        self.assertEqual(os.pwrite(fd, data, at), size)
                        model[at:at + size] = data
                with mmap.mmap(fd, 0) as memory:
                    self.assertEqual(memory[:4096], bytes(model[:4096]))
                    memory[MIB:MIB + 5] = model[MIB:MIB + 5] = b"mmap!"
                    memory.flush()
                os.fsync(fd)
                self.assertEqual(self.requests(mounted), before)
                about, = mounted.qmp.cmd("query-block-exports")
                self.assertEqual(about["transport"], "passthrough")
                self.assertEqual(pathlib.Path(image).read_bytes(), bytes(model))
                # What is not data still is ours: times, size, holes.
                self.assertEqual(os.fstat(fd).st_size, len(model))
                self.assertGreaterEqual(os.fstat(fd).st_mtime_ns, os.stat(image).st_mtime_ns)
                self.assertEqual(os.lseek(fd, 0, os.SEEK_DATA), 0)
                os.close(fd)
                mounted.daemon.stop()

    def refused(self, definition, text, **export):
        """An export that cannot pass requests through fails with one sentence, and nothing is mounted."""
        daemon = self.daemon("--blockdev", json.dumps(definition))
        path = self.path("refused")
        pathlib.Path(path).touch()
        self._guard_mount(path)
        words = {"type": "fuse", "id": "e", "node-name": definition["node-name"], "mountpoint": path, "x-passthrough": True, **export}
        _, desc = daemon.qmp.error("block-export-add", words)
        self.assertIn(text, desc)
        self.assertNotIn("\n", desc)
        self.assertFalse(os.path.ismount(path))
        daemon.stop()

    def test_refusals_name_what_stands_in_the_way(self):
        image = self.raw_image("disk.raw", 4 * MIB)
        file = {"driver": "file", "filename": image}
        self.refused({"driver": "raw", "node-name": "d", "file": file, "offset": 65536, "size": MIB}, "only a part of its file")
        self.refused({"driver": "raw", "node-name": "d", "file": file, "offset": 65536}, "is not the whole of its file")
        self.refused({"driver": "file", "node-name": "d", "filename": image, "cache": {"direct": True}}, "cache.direct=on")
        self.refused({"driver": "null-co", "node-name": "d", "size": MIB}, "keeps no plain file")
        self.refused({"driver": "file", "node-name": "d", "filename": image}, "every write is followed by a flush", writable=True,
                     writethrough=True)
        self.refused({"driver": "file", "node-name": "d", "filename": image}, "growable=on and x-passthrough=on exclude each other",
                     writable=True, growable=True)
        qcow2 = self.make_image("qcow2", 4 * MIB)
        self.refused({"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": qcow2}}, "keeps no plain file")

    def test_a_bitmap_stands_in_the_way(self):
        image = self.raw_image("disk.raw", 4 * MIB)
        daemon = self.daemon("--blockdev", json.dumps({"driver": "file", "node-name": "disk", "filename": image}))
        daemon.qmp.cmd("block-dirty-bitmap-add", node="disk", name="b")
        path = self.path("file")
        pathlib.Path(path).touch()
        self._guard_mount(path)
        words = {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": path, "x-passthrough": True}
        self.assertIn("dirty bitmaps", daemon.qmp.error("block-export-add", words)[1])
        daemon.qmp.cmd("block-dirty-bitmap-remove", node="disk", name="b")
        daemon.qmp.cmd("block-export-add", words)
        daemon.stop()

    def test_changes_are_refused_naming_the_export(self):
        mounted = self.mount(size=4 * MIB, passthrough=True)
        q, file = mounted.qmp, {"driver": "file", "filename": mounted.image}
        for name, arguments in (("block-dirty-bitmap-add", {"node": "disk", "name": "b"}),
                                ("block_resize", {"node-name": "disk", "size": 8 * MIB}),
                                ("blockdev-reopen", {"options": [{**file, "node-name": "disk", "read-only": True}]})):
            kind, desc = q.error(name, arguments)
            self.assertIn("FUSE export 'e'", desc, name)
        with open(mounted.path, "r+b", buffering=0) as opened:
            opened.write(b"still right")
        self.assertEqual(pathlib.Path(mounted.image).read_bytes()[:11], b"still right")
        q.cmd("block-export-del", id="e", mode="hard")
        q.event("BLOCK_EXPORT_DELETED")
        q.cmd("block-dirty-bitmap-add", node="disk", name="b")  # the lease ends with the export
        mounted.daemon.stop()

    def test_read_only(self):
        mounted = self.mount(size=4 * MIB, passthrough=True, writable=False)
        with open(mounted.path, "rb", buffering=0) as opened:
            self.assertEqual(opened.read(4), bytes(4))
        self.assertRaises(OSError, os.open, mounted.path, os.O_RDWR)
        mounted.daemon.stop()


if __name__ == "__main__":
    gt.main()
