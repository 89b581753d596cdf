#!/usr/bin/python3
"""Options of qcow2 nodes through QMP: refusals, change at run time, data files by reference, guards, the memory of the caches."""

import json
import os
import pathlib
import random
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, IS_GANTRY, libnbd, require, require_gantry, wait_for


class OptionsCase(Case):
    def setUp(self):
        super().setUp()
        require("qemu-img", "qemu-io")

    def create(self, name, options="", size=4 * MIB):
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), self.path(name), size)
        return self.path(name)

    @staticmethod
    def node(path, **more):
        return {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": path}, **more}

    def export(self, qmp, name="q", writable=True):
        """The address of a new export; it is called `name`."""
        if not hasattr(self, "sock"):
            self.sock = self.start_nbd(qmp)
        qmp.cmd("block-export-add", {"type": "nbd", "id": f"e-{name}", "node-name": name, "name": name, "writable": writable})
        return self.uri(self.sock, name)

    def io(self, target, *commands, check=True, kind="raw", writable=True):
        done = self.run_tool("qemu-io", *([] if writable else ["-r"]), "-f", kind, *[word for c in commands for word in ("-c", c)], target, check=check)
        if check:
            self.assertNotIn("verification failed", done.stdout)
        return done


class Refusals(OptionsCase):
    def test_texts(self):
        image, old = self.create("i.q"), self.create("old.q", "compat=0.10")
        daemon = self.daemon()
        rows = [
            (image, {"cache-size": 1, "l2-cache-size": 1, "refcount-cache-size": 1},
             "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"),
            (image, {"cache-size": MIB, "l2-cache-size": 2 * MIB}, "l2-cache-size may not exceed cache-size"),
            (image, {"cache-size": MIB, "refcount-cache-size": 2 * MIB}, "refcount-cache-size may not exceed cache-size"),
            (image, {"l2-cache-entry-size": 1000},
             "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"),
            (image, {"l2-cache-entry-size": 131072},
             "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"),
            (image, {"cache-clean-interval": 1 << 33}, "Cache clean interval too big"),
            (image, {"refcount-cache-size": 1 << 60}, "Refcount cache size too big"),
            (image, {"overlap-check": {"template": "some"}}, "Parameter 'template' does not accept value 'some'"),
            (image, {"overlap-check": {"everything": True}}, "Parameter 'overlap-check.everything' is unexpected"),
            (image, {"overlap-check": {"active-l1": "on"}},
             "Invalid parameter type for 'overlap-check.active-l1', expected: boolean"),
            (image, {"lazy-refcounts": 1}, "Invalid parameter type for 'lazy-refcounts', expected: boolean"),
            (old, {"lazy-refcounts": True}, "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"),
            (image, {"data-file": {"driver": "null-co"}}, "'data-file' can only be set for images with an external data file"),
        ]
        for path, options, text in rows:
            with self.subTest(options=options):
                _, desc = daemon.qmp.error("blockdev-add", self.node(path, **options))
                self.assertTrue(desc.startswith(text), desc)
        self.assertEqual(daemon.qmp.cmd("query-named-block-nodes"), [])
        if IS_GANTRY:
            _, desc = daemon.qmp.error("blockdev-add", self.node(old, **{"discard-no-unref": True}))
            self.assertTrue(desc.startswith("discard-no-unref is only supported by qcow2 images with at least compatibility level"), desc)


class Reopen(OptionsCase):
    def reopen(self, qmp, path, **options):
        qmp.cmd("blockdev-reopen", {"options": [self.node(path, **options)]})

    def test_options_change_while_clients_write(self):
        image = self.create("i.q", "cluster_size=4k", 64 * MIB)
        daemon = self.daemon()
        qmp = daemon.qmp
        qmp.cmd("blockdev-add", self.node(image))
        target = self.export(qmp)
        nbd = libnbd()
        client = nbd.NBD()
        client.connect_uri(target)
        model = bytearray(64 * MIB)
        rng = random.Random(5)
        choices = [{}, {"l2-cache-size": 8192, "l2-cache-entry-size": 512}, {"cache-size": MIB, "overlap-check": "all"},
                   {"lazy-refcounts": True, "cache-clean-interval": 1}, {"cache-clean-interval": 0, "pass-discard-other": True},
                   {"pass-discard-request": True, "pass-discard-snapshot": False, "refcount-cache-size": 65536},
                   {"overlap-check": {"template": "constant", "inactive-l2": True}, "l2-cache-entry-size": 4096}]
        for options in choices + choices[:1]:
            for _ in range(30):
                at, length = rng.randrange(60 * MIB), rng.choice((512, 5000, 40000))
                data = rng.randbytes(length)
                client.pwrite(data, at)
                model[at : at + length] = data
            self.reopen(qmp, image, **options)
            at = rng.randrange(48 * MIB)
            self.assertTrue(bytes(client.pread(8 * MIB, at)) == bytes(model[at : at + 8 * MIB]), options)
        for options, text in (({"l2-cache-entry-size": 3}, "L2 cache entry size must be"),
                              ({"cache-size": 1, "l2-cache-size": 2}, "l2-cache-size may not exceed cache-size"),
                              ({"data-file": {"driver": "null-co"}}, "")):
            _, desc = qmp.error("blockdev-reopen", {"options": [self.node(image, **options)]})
            self.assertTrue(desc.startswith(text), desc)
        client.flush()
        client.shutdown()
        daemon.stop()
        with open(self.path("model.raw"), "wb") as file:
            file.write(model)
        self.run_tool("qemu-img", "check", "-q", image)
        self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.path("model.raw"), image)

    def test_dirty_bit_of_lazy_counts(self):
        """Set with the first allocation, gone with every way of ceasing to write."""
        image = self.create("i.q", "lazy_refcounts=on")

        def dirty():
            with open(image, "rb") as file:
                return file.read(80)[79] & 1

        daemon = self.daemon()
        qmp = daemon.qmp
        qmp.cmd("blockdev-add", self.node(image))
        target = self.export(qmp)
        self.assertEqual(dirty(), 0)
        self.io(target, "write -P 1 0 1M", "flush")
        self.assertEqual(dirty(), 1)
        qmp.delete_export("e-q")
        self.reopen(qmp, image, **{"read-only": True})
        self.assertEqual(dirty(), 0)
        self.run_tool("qemu-img", "check", "-q", "-U", image)
        self.reopen(qmp, image)
        self.assertEqual(dirty(), 0)
        target = self.export(qmp)
        self.io(target, "write -P 2 1M 1M", "flush")
        self.assertEqual(dirty(), 1)
        daemon.kill()
        # Whoever only reads changes nothing and believes the mapping; whoever writes repairs first.
        with open(image, "rb") as file:
            before = file.read()
        del self.sock
        daemon = self.daemon()
        daemon.qmp.cmd("blockdev-add", self.node(image, **{"read-only": True}))
        told = next(n for n in daemon.qmp.cmd("query-named-block-nodes") if n["node-name"] == "q")
        self.assertTrue(told["image"]["dirty-flag"])
        self.io(self.export(daemon.qmp, writable=False), "read -P 1 0 1M", "read -P 2 1M 1M", writable=False)
        daemon.stop()
        with open(image, "rb") as file:
            self.assertTrue(file.read() == before)
        del self.sock
        daemon = self.daemon()
        daemon.qmp.cmd("blockdev-add", self.node(image))
        self.assertEqual(dirty(), 0)
        self.io(self.export(daemon.qmp), "read -P 1 0 1M", "read -P 2 1M 1M", "write -P 3 2M 1M")
        daemon.stop()
        self.run_tool("qemu-img", "check", "-q", image)


class DataFiles(OptionsCase):
    def test_by_reference(self):
        """A node of the graph takes the place of what the image names."""
        named, other = self.path("named.raw"), self.raw_image("other.raw", 4 * MIB)
        image = self.create("i.q", f"data_file={named}")
        os.unlink(named)
        daemon = self.daemon()
        qmp = daemon.qmp
        _, desc = qmp.error("blockdev-add", self.node(image))
        self.assertIn("No such file or directory", desc)
        _, desc = qmp.error("blockdev-add", self.node(image, **{"data-file": "nobody"}))
        self.assertIn("nobody", desc)
        qmp.cmd("blockdev-add", {"driver": "file", "node-name": "d", "filename": other})
        qmp.cmd("blockdev-add", {"driver": "raw", "node-name": "window", "file": "d", "offset": 0})
        qmp.cmd("blockdev-add", self.node(image, **{"data-file": "window"}))
        _, desc = qmp.error("blockdev-del", node_name="window")
        self.assertIn("in use", desc)
        target = self.export(qmp)
        self.io(target, "write -P 7 100k 200k", "write -z 150k 64k", "flush", "read -P 7 100k 50k", "read -P 0 150k 64k")
        daemon.stop()
        self.assertFalse(os.path.exists(named))
        with open(other, "rb") as file:
            data = file.read()
        self.assertEqual(data[100 * KIB : 150 * KIB], bytes([7]) * (50 * KIB))
        self.assertEqual(data[:100 * KIB], bytes(100 * KIB))
        os.rename(other, named)
        self.run_tool("qemu-img", "check", "-q", image)
        self.io(image, "read -P 7 100k 50k", "read -P 0 150k 64k", "read -P 7 214k 86k", kind="qcow2")

    def test_read_only(self):
        image = self.create("i.q", f"data_file={self.path('d.raw')},data_file_raw=on")
        self.io(image, "write -P 5 0 1M", kind="qcow2")
        for path in (image, self.path("d.raw")):
            os.chmod(path, 0o444)
        daemon = self.daemon()
        daemon.qmp.cmd("blockdev-add", self.node(image, **{"read-only": True}))
        self.io(self.export(daemon.qmp, writable=False), "read -P 5 0 1M", "read -P 0 1M 3M", writable=False)

    def test_one_file_below_two_images_that_write(self):
        require_gantry("the reference takes the lock with the first writer")
        data = self.path("d.raw")
        images = [self.create(f"{i}.q", f"data_file={data}") for i in range(2)]
        daemon = self.daemon()
        daemon.qmp.cmd("blockdev-add", self.node(images[0]))
        _, desc = daemon.qmp.error("blockdev-add", {**self.node(images[1]), "node-name": "other"})
        self.assertIn("lock", desc)


class Guards(OptionsCase):
    def test_a_write_into_metadata_is_an_event_and_the_end_of_writing(self):
        image = self.create("i.q")
        self.io(image, "write -P 1 0 128k", kind="qcow2")
        with open(image, "r+b") as file:
            data = file.read()
            l1 = struct.unpack(">Q", data[40:48])[0]
            l2 = struct.unpack(">Q", data[l1 : l1 + 8])[0] & ~(1 << 63)
            file.seek(l2)
            file.write(struct.pack(">Q", 1 << 63 | l2))
        daemon = self.daemon()
        qmp = daemon.qmp
        qmp.cmd("blockdev-add", self.node(image, **{"overlap-check": {"template": "none", "active-l2": True}}))
        target = self.export(qmp)
        self.io(target, "read -P 1 64k 64k")
        done = self.io(target, "write -P 9 0 4k", check=False)
        self.assertIn("Input/output error", done.stdout + done.stderr)
        event = qmp.event("BLOCK_IMAGE_CORRUPTED")["data"]
        self.assertEqual((event["node-name"], event["fatal"], event["offset"], event["size"]), ("q", True, l2, 4096))
        self.assertEqual(event["msg"], "Preventing invalid write on metadata (overlaps with active L2 table)")
        done = self.io(target, "write -P 9 64k 4k", check=False)  # nowhere else either
        self.assertIn("write failed", done.stdout + done.stderr)
        qmp.cmd("block-export-del", id="e-q", mode="hard")
        qmp.event("BLOCK_EXPORT_DELETED")
        qmp.cmd("blockdev-del", node_name="q")
        _, desc = qmp.error("blockdev-add", self.node(image))
        self.assertTrue(desc.startswith("qcow2: Image is corrupt; cannot be opened read/write"), desc)
        qmp.cmd("blockdev-add", self.node(image, **{"read-only": True}))
        told = next(n for n in qmp.cmd("query-named-block-nodes") if n["node-name"] == "q")
        self.assertTrue(told["image"]["format-specific"]["data"]["corrupt"])
        self.io(self.export(qmp, writable=False), "read -P 1 64k 64k", writable=False)


class Memory(OptionsCase):
    """What docs/qcow2.md says about the memory of an open image."""

    def setUp(self):
        super().setUp()
        if gantry_test.BUILD.name in ("asan", "tsan"):
            gantry_test.missing("sanitizers take memory of their own", installable=False)

    def tebibyte(self):
        """Every part of the disk is mapped, all tables being the same one: a full working set in a small file."""
        cluster, entries = 64 * KIB, 8192
        tables = (1 << 40) // (cluster * entries)
        header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, 1 << 40, 0, tables, 3 * cluster, cluster, 1, 0, 0)
        header += struct.pack(">QQQII", 0, 0, 0, 4, 104)
        with open(self.path("tebi.q"), "wb") as file:
            file.write(header)
            file.seek(cluster)
            file.write(struct.pack(">Q", 2 * cluster))
            file.seek(2 * cluster)
            file.write(struct.pack(">6H", 1, 1, 1, 1, tables, 65535))
            file.seek(3 * cluster)
            file.write(struct.pack(">Q", 4 * cluster) * tables)
            file.seek(4 * cluster)
            file.write(struct.pack(">Q", 5 * cluster) * entries)
            file.write(bytes([0x5A]) * cluster)
        return self.path("tebi.q")

    @staticmethod
    def anonymous(daemon):
        """Bytes of private memory in use."""
        with open(f"/proc/{daemon.process.pid}/status") as file:
            return next(int(line.split()[1]) * KIB for line in file if line.startswith("RssAnon:"))

    def read_everywhere(self, client, order):
        for at in order:
            data = client.pread(4096, at)
            if data[0] != 0x5A or data[4095] != 0x5A:
                self.fail(f"wrong data at {at}")

    def test_a_full_working_set_stays_within_the_cache(self):
        require_gantry("its memory is its own")
        image = self.tebibyte()
        nbd = libnbd()
        daemon = self.daemon()
        qmp = daemon.qmp
        node = self.node(image, **{"read-only": True})
        qmp.cmd("blockdev-add", node)
        client = nbd.NBD()
        client.connect_uri(self.export(qmp, writable=False))
        order = [slot * 32 * MIB + 4096 * random.randrange(8192) for slot in range(32768)]  # each slice once
        random.shuffle(order)
        self.read_everywhere(client, order[:64])
        before = self.anonymous(daemon)
        self.read_everywhere(client, order)
        used = self.anonymous(daemon) - before
        self.assertLess(used, 32 * MIB * 1.02 + MIB)  # the default
        self.assertGreater(used, 24 * MIB)            # and it is used
        # All of it when that is asked for, while clients are there.
        qmp.cmd("blockdev-reopen", {"options": [{**node, "l2-cache-size": 128 * MIB, "cache-clean-interval": 0}]})
        self.read_everywhere(client, order)
        used = self.anonymous(daemon) - before
        self.assertLess(used, 128 * MIB * 1.02 + MIB)
        self.assertGreater(used, 128 * MIB)
        # What nobody uses goes back.
        qmp.cmd("blockdev-reopen", {"options": [{**node, "l2-cache-size": 128 * MIB, "cache-clean-interval": 1}]})
        self.read_everywhere(client, order[:4096])
        wait_for(lambda: self.anonymous(daemon) - before < 4 * MIB, "the cache to be given back")
        self.read_everywhere(client, order[:4096])

    def test_writing_within_the_caches(self):
        require_gantry("its memory is its own")
        image = self.path("i.q")
        self.run_tool(gantry_test.GANTRY, "image", "create", "-f", "qcow2", "-o", "preallocation=metadata", image, "64G")
        nbd = libnbd()
        daemon = self.daemon()
        qmp = daemon.qmp
        node = self.node(image, **{"l2-cache-size": MIB})
        qmp.cmd("blockdev-add", node)
        client = nbd.NBD()
        client.connect_uri(self.export(qmp))
        rng = random.Random(1)
        order = [slot * 32 * MIB + 512 * rng.randrange(65528) for slot in range(2048)]
        rng.shuffle(order)
        for at in order[:64]:
            client.pwrite(struct.pack(">Q", at) * 512, at)
        before = self.anonymous(daemon)
        for at in order:
            client.pwrite(struct.pack(">Q", at) * 512, at)
        self.assertLess(self.anonymous(daemon) - before, MIB * 1.02 + 2 * MIB)  # of 8 MiB
        for at in order[::7]:
            self.assertEqual(bytes(client.pread(4096, at)), struct.pack(">Q", at) * 512)
        # Nobody does anything: tables and counts go; then new clusters are counted and discarded as ever.
        qmp.cmd("blockdev-reopen", {"options": [{**node, "cache-clean-interval": 1, "discard": "unmap"}]})
        wait_for(lambda: self.anonymous(daemon) - before < MIB, "the caches to be given back")
        for at in order[:20]:
            client.trim(128 * KIB, at // MIB * MIB)
            client.pwrite(b"\x77" * 512, at // MIB * MIB)
        client.flush()
        client.shutdown()
        daemon.stop()
        self.run_tool("qemu-img", "check", "-q", image)
        self.io(image, f"read -P 0x77 {order[0] // MIB * MIB} 512", f"read -P 0 {order[0] // MIB * MIB + 512} 130560", kind="qcow2")


if __name__ == "__main__":
    gantry_test.main()
