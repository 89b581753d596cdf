#!/usr/bin/env python3
"""Which files an image may name: the operator's --image-references decides; what a definition says is always allowed."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import MIB, Case, require, require_gantry


class ImagePolicy(Case):
    def setUp(self):
        super().setUp()
        require("qemu-img")
        require_gantry("--image-references")
        os.mkdir(self.path("vault"))
        self.raw_image("base.raw", MIB, lambda block: bytes([7]) * 65536)
        self.raw_image("vault/base.raw", MIB, lambda block: bytes([9]) * 65536)
        for name, backing in (("outside.qcow2", "base.raw"), ("inside.qcow2", "vault/base.raw"),
                              ("climbs.qcow2", "vault/../base.raw")):
            self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, self.path(name))
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                      f"data_file={self.path('data.raw')},data_file_raw=on", self.path("data.qcow2"), "1M")

    def add(self, qmp, image, **more):
        return dict({"driver": "qcow2", "node-name": "n", "read-only": True,
                     "file": {"driver": "file", "filename": self.path(image)}}, **more)

    def test_everything_is_allowed_by_default(self):
        qmp = self.daemon().monitor()
        for image in ("outside.qcow2", "inside.qcow2", "data.qcow2"):
            qmp.cmd("blockdev-add", self.add(qmp, image))
            qmp.cmd("blockdev-del", **{"node-name": "n"})

    def test_only_what_lies_in_the_directory_is_allowed(self):
        qmp = self.daemon("--image-references", self.path("vault")).monitor()
        qmp.cmd("blockdev-add", self.add(qmp, "inside.qcow2"))
        qmp.cmd("blockdev-del", **{"node-name": "n"})
        for image, what in (("outside.qcow2", "backing"), ("climbs.qcow2", "backing"), ("data.qcow2", "data-file")):
            error = qmp.error("blockdev-add", self.add(qmp, image))
            self.assertIn(f"as its {what} file, which it may not", error[1])
            self.assertIn(f"give '{what}' explicitly", error[1])
        self.assertEqual([], qmp.cmd("query-named-block-nodes"))

    def test_none_refuses_and_a_definition_overrides(self):
        qmp = self.daemon("--image-references", "none").monitor()
        self.assertIn("which it may not", qmp.error("blockdev-add", self.add(qmp, "inside.qcow2"))[1])
        base = {"driver": "raw", "file": {"driver": "file", "filename": self.path("base.raw")}}
        qmp.cmd("blockdev-add", self.add(qmp, "outside.qcow2", backing=base))
        qmp.cmd("blockdev-del", **{"node-name": "n"})
        qmp.cmd("blockdev-add", self.add(qmp, "outside.qcow2", backing=None))
        qmp.cmd("blockdev-del", **{"node-name": "n"})
        data = {"driver": "file", "filename": self.path("data.raw")}
        qmp.cmd("blockdev-add", self.add(qmp, "data.qcow2", **{"data-file": data}))

    def test_options_count_from_their_place_on(self):
        image = f"driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename={self.path('outside.qcow2')}"
        self.daemon("--blockdev", image, "--image-references", "none").monitor()
        failed = self.run_daemon("--image-references", "none", "--blockdev", image)
        self.assertEqual(1, failed.returncode)
        self.assertIn("which it may not", failed.stderr)


if __name__ == "__main__":
    gantry_test.main()
