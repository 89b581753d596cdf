#!/usr/bin/python3
"""Bad input: one clear sentence naming what and where, no image changed, and the other exports go on being served."""

import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

NOBODY = 65534


class Reader(threading.Thread):
    """Reads an export over and over and compares."""

    def __init__(self, uri, expected):
        super().__init__()
        self.client = gt.libnbd().NBD()
        self.client.connect_uri(uri)
        self.expected, self.rounds, self.error = expected, 0, None
        self.ending = threading.Event()

    def run(self):
        try:
            while not self.ending.is_set():
                for offset in range(0, len(self.expected), 65536):
                    if bytes(self.client.pread(65536, offset)) != self.expected[offset : offset + 65536]:
                        raise AssertionError(f"wrong data at {offset}")
                self.rounds += 1
        except Exception as error:  # pylint: disable=broad-except
            self.error = error

    def finish(self):
        self.ending.set()
        self.join()
        if self.error:
            raise self.error
        return self.rounds


class BadInput(gt.Case):
    """Each test sends bad input to a daemon whose other export is being read all the time."""

    def setUp(self):
        super().setUp()
        content = b"".join((gt.text_block(i) or bytes(65536)) for i in range(16))
        self.good = self.raw_image("good.raw", gt.MIB, gt.text_block)
        self.nbd_path = self.path("nbd")
        self.d = self.daemon("--blockdev", f"file,node-name=gf,read-only=on,filename={self.good}", "--blockdev",
                             "raw,node-name=good,file=gf,read-only=on", "--nbd-server",
                             f"addr.type=unix,addr.path={self.nbd_path}", "--export", "nbd,id=good,node-name=good")
        self.q = self.d.qmp
        self.reader = Reader(self.uri(self.nbd_path, "good"), content)
        self.reader.start()
        self.addCleanup(self.served)

    def served(self):
        """The other export was served all along, and still is."""
        before = self.reader.rounds
        gt.wait_for(lambda: self.reader.rounds > before or self.reader.error, "another round of reads")
        self.assertGreater(self.reader.finish(), 0)
        self.assertEqual([export["id"] for export in self.q.cmd("query-block-exports")], ["good"])

    def sentence(self, text, *parts):
        """One line that names every part."""
        self.assertEqual(text.strip().count("\n") if gt.IS_GANTRY else 0, 0, text)
        self.assertLess(len(text), 1000)
        for part in parts:
            self.assertRegex(text, part)
        self.assertNotRegex(text, r"(?i)assert|check failed|std::|terminate|\(null\)|0x0000")

    def refused(self, arguments, *parts, images=()):
        """blockdev-add and the command line refuse it alike, and the images stay as they are."""
        before = [(gt.checksum(image), os.stat(image).st_mtime_ns) for image in images]
        kind, desc = self.q.error("blockdev-add", {"node-name": "bad", **arguments})
        self.assertEqual(kind, "GenericError")
        self.sentence(desc, *parts)
        value = json.dumps({"node-name": "bad", **arguments})
        done = self.run_daemon("--blockdev", value)
        self.assertEqual(done.returncode, 1)
        self.sentence(done.stderr, "--blockdev ", *parts)
        self.assertEqual([(gt.checksum(image), os.stat(image).st_mtime_ns) for image in images], before)
        self.assertNotIn("bad", [node["node-name"] for node in self.q.cmd("query-named-block-nodes")])
        return desc

    def test_missing_file(self):
        path = self.path("none.raw")
        self.refused({"driver": "file", "filename": path}, re.escape(path), "No such file or directory")
        self.refused({"driver": "qcow2", "file": {"driver": "file", "filename": path}}, re.escape(path),
                     "No such file or directory")
        self.assertFalse(os.path.exists(path))

    def test_wrong_kind_of_file(self):
        os.mkfifo(self.path("fifo"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path("socket"))
        self.addCleanup(listener.close)
        os.mkdir(self.path("dir"))
        for name in ("fifo", "socket", "dir"):
            self.refused({"driver": "file", "filename": self.path(name)}, re.escape(self.path(name)))
        self.refused({"driver": "host_device", "filename": self.good}, re.escape(self.good))
        self.refused({"driver": "file", "filename": "x" * 300}, "File name too long|too long")

    def test_wrong_option(self):
        for arguments, part in (({"driver": "raw"}, "'file' is missing"),
                                ({"driver": "file", "filename": self.good, "aio": "magic"}, "'aio' does not accept value 'magic'"),
                                ({"driver": "file", "filename": self.good, "detect-zeroes": "unmap"}, "discard")):
            self.refused(arguments, part, images=[self.good])
        image = self.raw_image("small.raw", gt.MIB)
        for window in ({"offset": 2 * gt.MIB}, {"size": 2 * gt.MIB}, {"offset": -1}, {"size": -512}):
            if not gt.IS_GANTRY and min(window.values()) < 0:
                continue  # the reference needs three lines
            self.refused({"driver": "raw", "file": {"driver": "file", "filename": image}, **window},
                         str(2 * gt.MIB) + "|-1|-512|negative|[Oo]ffset|[Ss]ize", images=[image])

    def test_image_locked_by_another_process(self):
        image = self.qcow2("locked.qcow2")
        node = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": image, "read-only": True}}
        holder = subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(holder.stdout.close)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.stdin.close)
        holder.stdin.write("length\n")
        holder.stdin.flush()
        while "1 MiB" not in holder.stdout.readline():
            pass  # it has the image open now
        desc = self.refused(node, 'Failed to get shared "write" lock', images=[image])
        if gt.IS_GANTRY:
            self.sentence(desc, str(holder.pid), "qemu-io")  # who holds it
        # Reading without a lock is possible.
        self.q.cmd("blockdev-add", {"driver": "file", "node-name": "shared", "read-only": True, "force-share": True,
                                    "filename": image})
        self.q.cmd("blockdev-del", node_name="shared")
        holder.stdin.write("quit\n")
        holder.stdin.flush()
        holder.wait(gt.DEADLINE)
        self.q.cmd("blockdev-add", {"node-name": "now", **node})
        # And the other way round: qemu is refused what we hold.
        done = self.run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", image, check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn('"write" lock', done.stderr)
        self.q.cmd("blockdev-del", node_name="now")
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", image)

    def test_image_in_use_by_ourselves(self):
        image = self.qcow2()
        self.q.cmd("blockdev-add", driver="file", node_name="first", filename=image)
        self.q.cmd("block-export-add", type="nbd", id="first", node_name="first", writable=True)
        # A second opening conflicts like another process; the same node conflicts by its users.
        kind, desc = self.q.error("blockdev-add", driver="qcow2", node_name="bad", read_only=True, file={
            "driver": "file", "filename": image, "read-only": True})
        self.sentence(desc, 'Failed to get shared "write" lock')
        kind, desc = self.q.error("blockdev-add", driver="qcow2", node_name="bad", read_only=True, file="first")
        self.sentence(desc, "Permission conflict on node 'first': permissions 'write' are both required by .* and unshared by")
        self.q.cmd("block-export-del", id="first", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="first")

    def test_permission_of_the_file_system(self):
        if os.getuid() != 0:
            gt.missing("only root can become somebody else", installable=False)
        image = self.raw_image("secret.raw", gt.MIB, gt.text_block)
        os.chmod(image, 0o600)
        os.chmod(self.dir, 0o755)
        before = gt.checksum(image)
        done = self.run_daemon("--blockdev", f"file,node-name=f,filename={image}", user=NOBODY, group=NOBODY)
        self.assertEqual(done.returncode, 1)
        self.sentence(done.stderr, re.escape(image), "Permission denied")
        os.chmod(image, 0o644)
        done = self.run_daemon("--blockdev", f"file,node-name=f,filename={image}", user=NOBODY, group=NOBODY)
        self.assertEqual(done.returncode, 1)
        self.sentence(done.stderr, re.escape(image), "Permission denied")
        self.assertEqual(gt.checksum(image), before)

    def test_refused_permission(self):
        kind, desc = self.q.error("block-export-add", type="nbd", id="w", node_name="good", name="w", writable=True)
        self.sentence(desc, "Cannot export read-only node as writable")
        kind, desc = self.q.error("block_resize", node_name="good", size=512)
        self.sentence(desc, "read-only|Permission conflict on node 'good'")
        kind, desc = self.q.error("blockdev-del", node_name="good")
        self.sentence(desc, "Node good is in use")
        self.assertEqual(os.path.getsize(self.good), gt.MIB)

    # --- qcow2

    def qcow2(self, name="q.qcow2", size="1M", **options):
        gt.require("qemu-img", "qemu-io")
        path = self.path(name)
        extra = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", *extra, path, size)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 17 0 128k", path)
        return path

    def patch(self, path, offset, data):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def test_malformed_qcow2(self):
        """Header fields that no image may have (offsets: the qcow2 specification, "Header")."""
        for name, offset, data in (
            ("magic", 0, b"QFI\0"),
            ("version 1", 4, struct.pack(">I", 1)),
            ("version 4", 4, struct.pack(">I", 4)),
            ("cluster_bits 8", 20, struct.pack(">I", 8)),
            ("cluster_bits 63", 20, struct.pack(">I", 63)),
            ("size", 24, struct.pack(">Q", 1 << 63)),
            ("crypt method", 32, struct.pack(">I", 9)),
            ("l1_size", 36, struct.pack(">I", 0xFFFFFFFF)),
            ("l1_table_offset", 40, struct.pack(">Q", 0xFFFFFFFFFFFFFE00)),
            ("unaligned l1", 40, struct.pack(">Q", 0x30001)),
            ("refcount_table_offset", 48, struct.pack(">Q", 0x8000000000000000)),
            ("refcount_table_clusters", 56, struct.pack(">I", 0xFFFFFFFF)),
            ("nb_snapshots", 60, struct.pack(">I", 0xFFFFFFFF)),
            ("incompatible feature", 72, struct.pack(">Q", 1 << 40)),
            ("refcount_order", 96, struct.pack(">I", 7)),
            ("header_length", 100, struct.pack(">I", 0x7FFFFFF0)),
            ("backing name", 8, struct.pack(">QI", 0x7FFFFFFFFFFFFFFF, 1023)),
            ("backing name length", 8, struct.pack(">QI", 0x200, 1024)),
        ):
            with self.subTest(name):
                path = self.qcow2(f"bad {name}.qcow2")
                self.patch(path, offset, data)
                self.refused({"driver": "qcow2", "read-only": True,
                              "file": {"driver": "file", "filename": path, "read-only": True}}, r"\w+ \w+", images=[path])

    def test_truncated_qcow2(self):
        for size in (0, 3, 71, 103):
            with self.subTest(size):
                path = self.qcow2(f"cut{size}.qcow2")
                os.truncate(path, size)
                self.refused({"driver": "qcow2", "read-only": True,
                              "file": {"driver": "file", "filename": path, "read-only": True}}, r"\w+ \w+", images=[path])

    def test_corrupt_tables_are_an_error_of_the_read(self):
        nbd = gt.libnbd()
        path = self.qcow2()
        with open(path, "rb") as file:
            header = file.read(104)
            l1 = struct.unpack(">Q", header[40:48])[0]
        self.patch(path, l1, struct.pack(">Q", 1 << 63 | 0x30200))  # inside a cluster
        before = gt.checksum(path)
        self.q.cmd("blockdev-add", driver="qcow2", node_name="bad", read_only=True,
                   file={"driver": "file", "filename": path, "read-only": True})
        self.q.cmd("block-export-add", type="nbd", id="bad", node_name="bad")
        client = nbd.NBD()
        client.connect_uri(self.uri(self.nbd_path, "bad"))
        with self.assertRaises(nbd.Error) as caught:
            client.pread(4096, 0)
        self.assertEqual(caught.exception.errno, "EIO")
        self.q.event("BLOCK_IMAGE_CORRUPTED", **{"node-name": "bad", "fatal": False})
        self.assertEqual(client.get_size(), gt.MIB)  # the connection stays
        client.shutdown()
        self.q.cmd("block-export-del", id="bad", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="bad")
        self.q.cmd("blockdev-del", node_name="bad")
        self.assertEqual(gt.checksum(path), before)

    def test_missing_backing_file(self):
        gt.require("qemu-img")
        path = self.path("overlay.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", self.path("gone.raw"), "-F", "raw", path, "1M")
        self.refused({"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": path, "read-only": True}},
                     "gone.raw", "No such file or directory", images=[path])
        # Without it on purpose, the image opens.
        self.q.cmd("blockdev-add", {"driver": "qcow2", "node-name": "alone", "read-only": True, "backing": None,
                                    "file": {"driver": "file", "filename": path, "read-only": True}})
        self.q.cmd("blockdev-del", node_name="alone")

    def test_qcow2_that_may_only_be_read(self):
        path = self.qcow2()
        writable = {"driver": "qcow2", "file": {"driver": "file", "filename": path}}
        readable = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": path, "read-only": True}}
        self.patch(path, 79, b"\2")  # marked corrupt
        self.refused(writable, "Image is corrupt; cannot be opened read/write", images=[path])
        before = gt.checksum(path)
        self.q.cmd("blockdev-add", {"node-name": "seen", **readable})
        self.q.cmd("blockdev-del", node_name="seen")
        self.assertEqual(gt.checksum(path), before)
        # A feature that nobody knows is in the way of reading too.
        self.patch(path, 72, b"\1")
        for arguments in (writable, readable):
            self.refused(arguments, r"[Uu]nsupported.*feature", images=[path])

    # --- the server

    def test_addresses(self):
        port = gt.free_port()
        listener = socket.socket()
        listener.bind(("127.0.0.1", port))
        listener.listen()
        self.addCleanup(listener.close)
        for address, part in ((f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}", "Address already in use"),
                              ("addr.type=unix,addr.path=/" + "x" * 200, "too long"),
                              ("addr.type=unix,addr.path=/no/such/directory/s", "No such file or directory"),
                              ("addr.type=fd,addr.str=77", "77"),
                              ("addr.type=inet,addr.host=256.256.256.256,addr.port=1", "256.256.256.256")):
            done = self.run_daemon("--nbd-server", address)
            self.assertEqual(done.returncode, 1)
            self.sentence(done.stderr, "--nbd-server ", part)


if __name__ == "__main__":
    gt.main()
