#!/usr/bin/env python3
"""Which files an image may name: the operator's --image-references decides; what a definition says is always allowed."""

import json
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

    def rename_backing(self, name, backing, image="renamed.qcow2"):
        """An image whose backing file is called `name` word for word, whatever that leads to."""
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.path(backing), self.path(image))
        self.run_tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, self.path(image))
        return image

    def test_no_name_leads_around_it(self):
        qmp = self.daemon("--image-references", self.path("vault")).monitor()
        inside = {"driver": "file", "filename": self.path("vault/base.raw")}
        outside = {"driver": "file", "filename": self.path("base.raw")}
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", self.path("vault/top.qcow2"), "1M")
        os.symlink(self.path("base.raw"), self.path("vault/link.raw"))
        os.symlink(self.path("vault"), self.path("way-in"))
        qcow2 = {"driver": "qcow2", "file": {"driver": "file", "filename": self.path("vault/top.qcow2")}}
        names = [
            "vault/link.raw",
            "./vault/./../vault/link.raw",
            "file:" + self.path("base.raw"),
            "nbd://localhost/export",
            "nbd+unix:///x?socket=" + self.path("vault/socket"),
            "json:" + json.dumps({"driver": "raw", "file": outside}),
            "json:" + json.dumps(dict(qcow2, backing={"driver": "raw", "file": outside})),
            "json:" + json.dumps(dict(qcow2, backing=outside)),
            'json:{"driver":"qcow2","file.driver":"file","file.filename":"%s","backing.driver":"file",'
            '"backing.filename":"%s"}' % (self.path("vault/top.qcow2"), self.path("base.raw")),
            'json:{"driver":"raw","file":{"driver":"null-co","size":512}}',
        ]
        for number, name in enumerate(names):
            with self.subTest(name):
                image = self.rename_backing(name, "base.raw", f"around{number}.qcow2")
                error = qmp.error("blockdev-add", self.add(qmp, image))[1]
                self.assertRegex(error, "which it may not|does not accept value 'nbd'" if "nbd" in name
                                 else "which it may not")
        for number, name in enumerate((os.path.join(self.path("way-in"), "base.raw"),
                                       "json:" + json.dumps(dict(qcow2, backing={"driver": "raw", "file": inside})))):
            with self.subTest(name):
                image = self.rename_backing(name, "base.raw", f"within{number}.qcow2")
                qmp.cmd("blockdev-add", self.add(qmp, image))
                qmp.cmd("blockdev-del", **{"node-name": "n"})
        self.assertEqual([], qmp.cmd("query-named-block-nodes"))

    def test_the_backing_file_of_a_backing_file_counts(self):
        qmp = self.daemon("--image-references", self.path("vault")).monitor()
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.path("base.raw"),
                      self.path("vault/middle.qcow2"))
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o",
                      f"data_file={self.path('data2.raw')}", self.path("vault/data.qcow2"), "1M")
        for number, below in enumerate(("vault/middle.qcow2", "vault/data.qcow2")):
            image = f"chain{number}.qcow2"
            self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", self.path(below),
                          self.path(image))
            self.assertIn("which it may not", qmp.error("blockdev-add", self.add(qmp, image))[1])
            self.assertIn("which it may not", qmp.error("blockdev-add", self.add(
                qmp, image, backing=self.definition(below)))[1])
        self.assertEqual([], qmp.cmd("query-named-block-nodes"))

    def definition(self, image):
        return {"driver": "qcow2", "file": {"driver": "file", "filename": self.path(image)}}

    def test_what_a_stored_name_describes_is_never_opened_for_writing(self):
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", self.path("victim.qcow2"), "1M")
        self.run_tool("qemu-img", "bitmap", "--add", self.path("victim.qcow2"), "b")
        before = pathlib.Path(self.path("victim.qcow2")).read_bytes()
        name = "json:" + json.dumps(dict(self.definition("victim.qcow2"), **{"read-only": False}))
        image = self.rename_backing(name, "base.raw")
        qmp = self.daemon().monitor()
        qmp.cmd("blockdev-add", self.add(qmp, image))
        nodes = qmp.cmd("query-named-block-nodes")
        self.assertEqual({True}, {node["ro"] for node in nodes})
        qmp.cmd("blockdev-del", **{"node-name": "n"})
        self.assertEqual(before, pathlib.Path(self.path("victim.qcow2")).read_bytes())

    def test_options_count_from_their_place_on(self):
        image = f"driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename={self.path('outside.qcow2')}"
        self.daemon("--blockdev", image, "--image-references", "none").monitor()
        failed = self.run_daemon("--image-references", "none", "--blockdev", image)
        self.assertEqual(1, failed.returncode)
        self.assertIn("which it may not", failed.stderr)


if __name__ == "__main__":
    gantry_test.main()
