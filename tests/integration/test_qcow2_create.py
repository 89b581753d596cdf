#!/usr/bin/env python3
"""blockdev-create: jobs, refusals and images, on our daemon and on the reference's."""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, require, require_gantry, wait_for


class Create(Case):
    def setUp(self):
        super().setUp()
        require("qemu-img", "qemu-io")
        self.qmp = self.daemon().qmp

    def create(self, job="j", **options):
        """Runs the job to its end and dismisses it: its error, "" when there is none."""
        self.qmp.cmd("blockdev-create", {"job-id": job, "options": options})
        return self.finish(job)

    def finish(self, job="j"):
        def concluded():
            found = [j for j in self.qmp.cmd("query-jobs") if j["id"] == job]
            return found[0] if found and found[0]["status"] == "concluded" else None

        info = wait_for(concluded, f"job {job} to conclude")
        self.assertEqual("create", info["type"])
        self.assertEqual(info["current-progress"], info["total-progress"])
        self.qmp.cmd("job-dismiss", id=job)
        return info.get("error", "")

    def file(self, name, size=0, **more):
        """A file made by the daemon; its definition."""
        self.assertEqual("", self.create(driver="file", filename=self.path(name), size=size, **more))
        return {"driver": "file", "filename": self.path(name)}

    def statuses(self, job="j"):
        seen = []
        while "null" not in seen:
            event = self.qmp.event("JOB_STATUS_CHANGE", id=job)
            seen.append(event["data"]["status"])
        return seen

    def info(self, name):
        return json.loads(self.run_tool("qemu-img", "info", "--output=json", self.path(name)).stdout)

    def assert_clean(self, name):
        self.run_tool("qemu-img", "check", self.path(name))

    # -- jobs

    def test_the_life_of_a_job(self):
        self.file("a", 4096)
        self.assertEqual(["created", "running", "waiting", "pending", "concluded", "null"], self.statuses())
        self.assertEqual(4096, os.path.getsize(self.path("a")))
        # Options that make no sense together are the job's error.
        self.assertIn("Could not create '/nix/a': No such file or directory",
                      self.create(driver="file", filename="/nix/a", size=1))
        self.assertEqual(["created", "running", "aborting", "concluded", "null"], self.statuses())

    def test_what_is_refused_at_once(self):
        def refused(options, job="j"):
            return self.qmp.error("blockdev-create", {"job-id": job, "options": options})[1]

        file = {"driver": "file", "filename": self.path("a")}
        self.assertEqual("Invalid job ID '1x'", refused({"driver": "qcow2", "file": file, "size": 512}, "1x"))
        self.assertIn("Parameter 'options.foo' is unexpected",
                      refused({"driver": "qcow2", "file": file, "size": 512, "foo": 1}))
        self.assertIn("Parameter 'options.size' is unexpected", refused({"driver": "raw", "size": 512}))
        self.assertIn("Driver does not support blockdev-create", refused({"driver": "null-co"}))
        self.assertIn("Parameter 'options.size' is missing", refused({"driver": "qcow2", "file": file}))
        self.assertIn("does not accept value 'v4'",
                      refused({"driver": "qcow2", "file": file, "size": 512, "version": "v4"}))
        self.assertEqual([], self.qmp.cmd("query-jobs"))
        self.assertFalse(os.path.exists(self.path("a")))

    def test_errors_of_the_job(self):
        file = self.file("a")
        for options, text in (
            ({"size": 1000}, "Image size must be a multiple of 512 bytes"),
            ({"size": 512, "cluster-size": 1000}, "Cluster size must be a power of two between 512 and 2048k"),
            ({"size": 512, "refcount-bits": 5}, "Refcount width must be a power of two and may not exceed 64 bits"),
            ({"size": 512, "data-file": "zz"}, "Cannot find device='zz' nor node-name='zz'"),
            ({"size": 512, "file": "zz"}, "Cannot find device='zz' nor node-name='zz'"),
            ({"size": 512, "file": {"driver": "file", "filename": self.path("nix")}}, "No such file or directory"),
            ({"size": 512, "backing-fmt": "raw"}, "Backing format cannot be used without backing file"),
            ({"size": 512, "encrypt": {"format": "luks"}}, "Parameter 'encrypt.key-secret' is required for cipher"),
            ({"size": 512, "encrypt": {"format": "luks", "key-secret": "s"}}, "No secret with id 's'"),
        ):
            with self.subTest(text):
                self.assertIn(text, self.create(driver="qcow2", **{"file": file, **options}))
        self.assertEqual([], self.qmp.cmd("query-named-block-nodes"))

    # -- images

    def test_images(self):
        for number, options in enumerate((
            {},
            {"version": "v2"},
            {"cluster-size": 512, "refcount-bits": 64},
            {"extended-l2": True, "cluster-size": 65536, "preallocation": "metadata"},
            {"preallocation": "full", "compression-type": "zstd", "lazy-refcounts": True},
            {"backing-file": "base.img", "backing-fmt": "raw"},
        )):
            with self.subTest(options):
                name = f"image{number}"
                self.assertEqual("", self.create(driver="qcow2", file=self.file(name), size=3 * MIB, **options))
                if "backing-file" in options:
                    self.raw_image("base.img", MIB)
                self.assert_clean(name)
                info = self.info(name)
                self.assertEqual(3 * MIB, info["virtual-size"])
                self.assertEqual(options.get("cluster-size", 65536), info["cluster-size"])
                data = info["format-specific"]["data"]
                self.assertEqual("0.10" if options.get("version") == "v2" else "1.1", data["compat"])
                self.assertEqual(options.get("refcount-bits", 16), data["refcount-bits"])
                self.assertEqual(options.get("extended-l2", False), data.get("extended-l2", False))
                self.assertEqual(options.get("compression-type", "zlib"), data["compression-type"])
                self.assertEqual(options.get("backing-file"), info.get("backing-filename"))

    def test_over_nodes_that_exist(self):
        self.qmp.cmd("blockdev-add", **self.file("a", MIB), **{"node-name": "a"})
        self.qmp.cmd("blockdev-add", **self.file("d", 0), **{"node-name": "d"})
        self.assertEqual("", self.create(driver="qcow2", file="a", size=MIB, **{"data-file": "d"}))
        self.qmp.cmd("blockdev-add", driver="qcow2", file="a", **{"node-name": "q", "data-file": "d"})
        self.qmp.cmd("blockdev-del", **{"node-name": "q"})
        # A raw data file.
        self.assertEqual("", self.create(driver="qcow2", file="a", size=MIB, **{"data-file": "d", "data-file-raw": True}))
        for node in ("a", "d"):
            self.qmp.cmd("blockdev-del", **{"node-name": node})
        self.assert_clean("a")
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 64k 4k", self.path("a"))
        with open(self.path("d"), "rb") as file:
            self.assertEqual(bytes(65536) + b"\x09" * 4096, file.read(65536 + 4096))

    def test_an_image_that_is_open_is_not_emptied(self):
        self.assertEqual("", self.create(driver="qcow2", file=self.file("a"), size=MIB))
        before = os.path.getsize(self.path("a"))
        self.qmp.cmd("blockdev-add", driver="qcow2", file={"driver": "file", "filename": self.path("a")},
                     **{"node-name": "q", "read-only": False})
        self.start_nbd(self.qmp)
        self.qmp.cmd("block-export-add", type="nbd", id="e", writable=True, **{"node-name": "q"})
        self.assertIn("lock", self.create(driver="file", filename=self.path("a"), size=0))
        self.assertNotEqual("", self.create(driver="qcow2", size=MIB,
                                            file={"driver": "file", "filename": self.path("a")}))
        self.assertGreaterEqual(os.path.getsize(self.path("a")), before)

    def test_encrypted(self):
        require_gantry("deriving keys takes the reference too long")
        self.qmp.cmd("object-add", **{"qom-type": "secret", "id": "s", "data": "word"})
        encrypt = {"format": "luks", "key-secret": "s", "iter-time": 10}
        self.assertEqual("", self.create(driver="qcow2", file=self.file("a"), size=MIB, encrypt=encrypt))
        words = ("--object", "secret,id=s,data=word", "--image-opts",
                 f"driver=qcow2,encrypt.key-secret=s,file.filename={self.path('a')}")
        self.run_tool("qemu-img", "check", *words)
        self.run_tool("qemu-io", *words, "-c", "read -P 0 0 1M")

    def test_cancel_in_a_long_preallocation(self):
        require_gantry("the reference cannot be cancelled here")
        file = self.file("a")
        self.qmp.cmd("blockdev-create", {"job-id": "j", "options": {
            "driver": "qcow2", "file": file, "size": 4096 * MIB, "preallocation": "full"}})
        wait_for(lambda: os.path.getsize(self.path("a")) > 0, "the job to begin")
        self.qmp.cmd("job-cancel", id="j")
        self.finish()
        with open(self.path("a"), "rb") as image:
            self.assertNotEqual(b"QFI\xfb", image.read(4))


if __name__ == "__main__":
    gantry_test.main()
