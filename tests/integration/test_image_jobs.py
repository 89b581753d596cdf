#!/usr/bin/python3
"""The jobs that change and make images, x-blockdev-amend and blockdev-create, on our daemon and on the reference's."""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import KIB, MIB
from image_case import SECRETS, Images, Writer


class Amend(Images):
    def amend(self, node, encrypt=None, **more):
        options = {"driver": "qcow2"}
        if encrypt is not None:
            options["encrypt"] = {"format": "luks", **{key.replace("_", "-"): value for key, value in encrypt.items()}}
        return self.job("x-blockdev-amend", node_name=node, options=options, **more)

    def failed(self, text, node, encrypt, **more):
        error, statuses = self.amend(node, encrypt, **more)
        if error.rstrip() != text and not (gt.IS_GANTRY and error.startswith(text + "; ")):
            self.assertEqual(error, text)
        self.assertEqual(["created", "running", "aborting", "concluded", "null"], statuses)

    def succeeded(self, node, encrypt=None, **more):
        error, statuses = self.amend(node, encrypt, **more)
        self.assertEqual(("", ["created", "running", "waiting", "pending", "concluded", "null"]), (error, statuses))

    def encrypted(self):
        path = self.make("e", *SECRETS, options="encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10")
        self.open("e", path, encrypt={"format": "luks", "key-secret": "s0"})
        return path

    def opens_with(self, path, secret):
        """Whether qemu-io can read the image with a passphrase; the image is not open here."""
        opts = f"driver=qcow2,encrypt.key-secret={secret},file.filename={path}"
        return self.run_tool("qemu-io", *SECRETS, "-r", "--image-opts", opts, "-c", "read 0 64k", check=False).returncode == 0

    def slots(self):
        return [slot["active"] for slot in self.image("e")["format-specific"]["data"]["encrypt"]["slots"]]

    def test_key_slots(self):
        path = self.encrypted()
        self.assertEqual([True] + [False] * 7, self.slots())
        self.succeeded("e", {"state": "active", "new_secret": "s1", "iter_time": 10})
        self.succeeded("e", {"state": "active", "new_secret": "s2", "iter_time": 10, "keyslot": 7})
        self.assertEqual([True, True] + [False] * 5 + [True], self.slots())
        self.succeeded("e", {"state": "inactive", "old_secret": "s0"})
        self.assertEqual([False, True] + [False] * 5 + [True], self.slots())
        # It stays open and is used on: the master key is the same. Another slot with a passphrase of those left.
        self.succeeded("e", {"state": "active", "new_secret": "s0", "iter_time": 10, "secret": "s1"})
        self.succeeded("e", {"state": "inactive", "keyslot": 1})
        self.close("e")
        self.assertEqual([True, False, True], [self.opens_with(path, s) for s in ("s0", "s1", "s2")])
        self.run_tool("qemu-img", "check", "-q", *SECRETS, "--image-opts",
                      f"driver=qcow2,encrypt.key-secret=s2,file.filename={path}")

    def test_while_a_client_writes(self):
        path = self.encrypted()
        server = self.start_nbd(self.q)
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="e", writable=True)
        writer = Writer(self.uri(server, "e"))
        writer.start()
        try:
            for _ in range(3):
                before = writer.done
                gt.wait_for(lambda: writer.error or writer.done > before + 50, "more writes")
                self.succeeded("e", {"state": "active", "new_secret": "s1", "iter_time": 10})
                self.succeeded("e", {"state": "inactive", "old_secret": "s1"})
        finally:
            writer.finish()
        self.q.cmd("block-export-del", id="e", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.close("e")
        self.run_tool("qemu-img", "convert", *SECRETS, "--image-opts", "-O", "raw",
                      f"driver=qcow2,encrypt.key-secret=s0,file.filename={path}", self.path("raw"))
        with open(self.path("raw"), "rb") as file:
            self.assertEqual(Writer.contents_after(writer.done), file.read(Writer.BLOCK * Writer.COUNT))

    def test_what_fails(self):
        self.encrypted()
        self.failed("'new-secret' is required to activate a keyslot", "e", {"state": "active"})
        self.failed("No secret with id 'zz'", "e", {"state": "active", "new_secret": "zz"})
        self.failed("Refusing to overwrite active keyslot 0 - please erase it first", "e",
                    {"state": "active", "new_secret": "s1", "keyslot": 0})
        self.failed("Invalid keyslot 8 specified, must be between 0 and 7", "e", {"state": "active", "new_secret": "s1", "keyslot": 8})
        self.failed("No keyslots match given (old) password for erase operation", "e", {"state": "inactive", "old_secret": "s2"})
        self.failed("Given keyslot 5 is already erased (inactive)", "e", {"state": "inactive", "keyslot": 5})
        self.failed("To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given",
                    "e", {"state": "inactive"})
        self.failed("All the active keyslots match the (old) password that was given and erasing them will erase all the data in "
                    "the image irreversibly - refusing operation", "e", {"state": "inactive", "old_secret": "s0"})
        self.failed("Attempt to erase the only active keyslot 0 which will erase all the data in the image irreversibly - refusing "
                    "operation", "e", {"state": "inactive", "keyslot": 0})
        self.assertEqual([True] + [False] * 7, self.slots())
        self.succeeded("e", {"state": "inactive", "keyslot": 0}, force=True)
        self.assertEqual([False] * 8, self.slots())

    def test_what_is_refused_at_once(self):
        self.open("n", self.make("a"))
        self.q.cmd("blockdev-add", {"driver": "raw", "node-name": "raw",
                                    "file": {"driver": "file", "filename": self.raw_image("r", MIB)}})

        def refused(text, node, options, job="j"):
            self.refused(text, "x-blockdev-amend", job_id=job, node_name=node, options=options)

        refused("Cannot find device='' nor node-name='zz'", "zz", {"driver": "qcow2"})
        refused("x-blockdev-amend doesn't support changing the block driver", "n", {"driver": "raw"})
        refused("x-blockdev-amend doesn't support changing the block driver", "raw", {"driver": "qcow2"})
        refused("Driver does not support x-blockdev-amend", "raw", {"driver": "raw"})
        refused("Parameter 'options.encrypt.state' is missing", "n", {"driver": "qcow2", "encrypt": {"format": "luks"}})
        refused("Parameter 'options.compat' is unexpected", "n", {"driver": "qcow2", "compat": "v2"})
        refused("Invalid job ID '1'", "n", {"driver": "qcow2"}, "1")
        self.assertEqual([], self.q.cmd("query-jobs"))
        self.succeeded("n")  # nothing to change
        self.failed("image is not encrypted, can't amend", "n", {"state": "active", "new_secret": "s1"})


class Create(Images):
    """blockdev-create takes every option of its drivers and makes what qemu-img makes of the same."""

    def create(self, **options):
        error, _ = self.job("blockdev-create", options=options)
        return error

    def test_files(self):
        for preallocation in ("off", "falloc", "full"):
            path = self.path(f"f-{preallocation}")
            self.assertEqual("", self.create(driver="file", filename=path, size=3 * MIB, preallocation=preallocation, nocow=True,
                                             **{"extent-size-hint": 0}))
            self.assertEqual(3 * MIB, os.path.getsize(path))
            self.assertEqual(preallocation != "off", os.stat(path).st_blocks * 512 >= 3 * MIB)
        # One that exists is emptied.
        self.assertEqual("", self.create(driver="file", filename=path, size=MIB))
        self.assertEqual(MIB, os.path.getsize(path))
        self.assertLessEqual(os.stat(path).st_blocks * 512, 4096)
        self.assertIn("metadata", self.create(driver="file", filename=path, size=MIB, preallocation="metadata"))

    QCOW2 = (
        ({}, ""),
        ({"version": "v2"}, "compat=0.10"),
        ({"version": "v3", "lazy-refcounts": True, "refcount-bits": 8}, "compat=1.1,lazy_refcounts=on,refcount_bits=8"),
        ({"cluster-size": 512}, "cluster_size=512"),
        ({"cluster-size": 2 * MIB, "preallocation": "falloc"}, "cluster_size=2M,preallocation=falloc"),
        ({"extended-l2": True, "cluster-size": 16 * KIB, "preallocation": "metadata"},
         "extended_l2=on,cluster_size=16k,preallocation=metadata"),
        ({"compression-type": "zstd"}, "compression_type=zstd"),
        ({"preallocation": "full"}, "preallocation=full"),
        ({"backing-file": "base", "backing-fmt": "raw"}, "backing_file=base,backing_fmt=raw"),
        ({"data-file": True}, "data_file=DATA"),
        ({"data-file": True, "data-file-raw": True, "preallocation": "metadata"}, "data_file=DATA,data_file_raw=on,preallocation=metadata"),
        ({"encrypt": {"format": "luks", "key-secret": "s0", "cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv",
                      "ivgen-hash-alg": "sha256", "hash-alg": "sha1", "iter-time": 10}},
         "encrypt.format=luks,encrypt.key-secret=s0,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,"
         "encrypt.ivgen-hash-alg=sha256,encrypt.hash-alg=sha1,encrypt.iter-time=10"),
    )

    def info(self, path, encrypted):
        words = (SECRETS, "--image-opts", f"driver=qcow2,encrypt.key-secret=s0,file.filename={path}") if encrypted else ([], path)
        out = self.run_tool("qemu-img", "info", "--output=json", *words[0], *words[1:]).stdout
        data = json.loads(out)
        for slot in data["format-specific"]["data"].get("encrypt", {}).get("slots", []):
            slot.pop("iters", None)  # measured
        for measured in ("uuid", "master-key-iters"):
            data["format-specific"]["data"].get("encrypt", {}).pop(measured, None)
        return {key: data.get(key) for key in ("virtual-size", "cluster-size", "encrypted", "format-specific", "backing-filename",
                                               "backing-filename-format", "dirty-flag")}

    def test_the_old_encryption(self):
        self.assertEqual("", self.create(driver="file", filename=self.path("old"), size=0))
        error = self.create(driver="qcow2", file={"driver": "file", "filename": self.path("old")}, size=MIB,
                            encrypt={"format": "qcow", "key-secret": "s0"})
        if gt.IS_GANTRY:  # reads and writes such images, but makes none
            self.assertIn("not secure: use encrypt.format=luks", error)
            self.assertEqual(0, os.path.getsize(self.path("old")))
        else:
            self.assertEqual("", error)

    def test_every_option_of_qcow2(self):
        self.raw_image("base", MIB)
        for options, words in self.QCOW2:
            with self.subTest(words):
                encrypted = "encrypt" in options
                ours, theirs, data = self.path("ours"), self.path("theirs"), self.path("data")
                for path in (ours, data):
                    self.assertEqual("", self.create(driver="file", filename=path, size=0))
                more = {"data-file": {"driver": "file", "filename": data}} if "data-file" in options else {}
                file = {"driver": "file", "filename": ours}
                self.assertEqual("", self.create(driver="qcow2", file=file, size=3 * MIB, **{**options, **more}))
                self.make("theirs", *(SECRETS if encrypted else []), options=words.replace("DATA", self.path("theirs.data")), size="3M")
                a, b = self.info(ours, encrypted), self.info(theirs, encrypted)
                if "data-file" in options:
                    self.assertEqual((data, self.path("theirs.data")), (a["format-specific"]["data"].pop("data-file"),
                                                                       b["format-specific"]["data"].pop("data-file")))
                self.assertEqual(b, a)
                if not encrypted:
                    self.assert_clean(ours)
                    self.run_tool("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", ours, theirs)


if __name__ == "__main__":
    gt.main()
