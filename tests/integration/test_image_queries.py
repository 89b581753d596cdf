#!/usr/bin/python3
"""What the queries tell of images, on our daemon and on the reference's, is what qemu-img tells of the files."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from image_case import SECRETS, Images


class Queries(Images):
    """query-named-block-nodes tells of an open image what qemu-img info tells of the file."""

    SHAPES = {
        "plain": "",
        "old": "compat=0.10",
        "extended": "extended_l2=on",
        "lazy": "lazy_refcounts=on",
        "wide": "refcount_bits=64,cluster_size=4k",
        "zstd": "compression_type=zstd",
        "data": "data_file=DIR/data.raw",
        "raw data": "data_file=DIR/raw.raw,data_file_raw=on",
        "luks": "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
        "aes": "encrypt.format=aes,encrypt.key-secret=s0",
    }

    def compare(self, node, theirs):
        ours = self.image(node)
        for key in ("virtual-size", "cluster-size", "format", "format-specific", "encrypted", "backing-filename",
                    "backing-filename-format", "full-backing-filename", "snapshots", "dirty-flag", "compressed"):
            self.assertEqual(theirs.get(key), ours.get(key), key)
        self.assertEqual(set(theirs), set(ours) - {"backing-image"} | ({"children"} & set(theirs)))

    def test_every_shape(self):
        for shape, options in self.SHAPES.items():
            with self.subTest(shape):
                options = options.replace("DIR", self.dir)
                encrypted = "encrypt" in options
                path = self.make("i", *(SECRETS if encrypted else []), options=options)
                if encrypted:
                    info = self.qemu_info(f"driver=qcow2,encrypt.key-secret=s0,file.filename={path}", *SECRETS, "--image-opts")
                else:
                    info = self.qemu_info(path)
                how = {"encrypt": {"format": shape, "key-secret": "s0"}} if encrypted else {}
                self.open("n", path, **how)
                self.compare("n", info)
                node = self.node("n")
                self.assertEqual(("qcow2", encrypted, False), (node["drv"], node["encrypted"], node["ro"]))
                if not encrypted:
                    self.assertEqual((path, path), (node["file"], node["image"]["filename"]))
                self.close("n")

    def test_stored_bitmaps(self):
        path = self.make("b")
        self.run_tool("qemu-img", "bitmap", "--add", path, "one")
        self.run_tool("qemu-img", "bitmap", "--add", "-g", "4096", path, "two")
        self.run_tool("qemu-img", "bitmap", "--disable", path, "two")
        info = self.qemu_info(path)
        self.assertEqual([("one", ["auto"]), ("two", [])],
                         [(b["name"], b["flags"]) for b in info["format-specific"]["data"]["bitmaps"]])
        self.open_for_reading("n", path)
        self.compare("n", info)

    def test_a_corrupt_image(self):
        path = self.make("c")
        with open(path, "r+b") as file:
            file.seek(79)
            file.write(b"\2")
        self.open_for_reading("n", path)
        self.assertTrue(self.image("n")["format-specific"]["data"]["corrupt"])
        self.compare("n", self.qemu_info(path))

    def test_chains(self):
        base = self.make("base", options="cluster_size=4k")
        middle = self.make("middle", "-b", "base", "-F", "qcow2", size=None)
        top = self.make("top", "-b", middle, "-F", "qcow2", size=None)
        self.run_tool("qemu-img", "snapshot", "-c", "s", top)
        chain = json.loads(self.run_tool("qemu-img", "info", "--backing-chain", "--output=json", top).stdout)
        self.open("n", top)
        self.compare("n", chain[0])
        node = self.node("n")
        self.assertEqual((middle, 2), (node["backing_file"], node["backing_file_depth"]))
        image = node["image"]
        for theirs in chain:
            self.assertEqual({k: v for k, v in theirs.items() if k != "children"},
                             {k: v for k, v in image.items() if k != "backing-image"})
            image = image.get("backing-image")
        self.assertIsNone(image)
        flat = self.node("n", flat=True)
        self.assertNotIn("backing-image", flat["image"])
        self.assertEqual(0, flat["backing_file_depth"])
        self.close("n")
        self.assertEqual(base, self.qemu_info(middle)["full-backing-filename"])

    def test_the_name_of_a_node(self):
        base, top, other = self.make("base"), None, self.make("other")
        top = self.make("top", "-b", base, "-F", "qcow2", size=None)

        def name(**options):
            self.open("n", top, **options)
            found = self.node("n")["file"]
            self.assertEqual(found, self.image("n")["filename"])
            self.close("n")
            return found

        def image(path):
            return {"driver": "qcow2", "file": {"driver": "file", "filename": path}}

        # Options that say how, not what.
        for options in ({}, {"lazy-refcounts": True}, {"l2-cache-size": 65536, "overlap-check": "all"},
                        {"discard": "unmap", "pass-discard-request": True, "detect-zeroes": "unmap"}, {"backing": image(base)}):
            self.assertEqual(top, name(**options), options)
        for backing in (None, image(other)):
            described = name(backing=backing)
            self.assertEqual("json:", described[:5])
            self.assertEqual({**image(top), "backing": backing}, json.loads(described[5:]))


if __name__ == "__main__":
    gt.main()
