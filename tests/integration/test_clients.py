#!/usr/bin/python3
"""Real NBD clients: nbdinfo, nbdcopy, libnbd, qemu-img, qemu-io and fio, on raw, qcow2 and null, over unix sockets and TCP."""

import json
import os
import pathlib
import random
import socket
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

SIZE = 8 * gt.MIB + 1536  # no multiple of anything large


class Clients(gt.Case):
    """A writable raw image, a read-only qcow2 image with a backing file, and a null disk, on a unix socket and on TCP."""

    def setUp(self):
        super().setUp()
        gt.require("qemu-img", "qemu-io", "nbdinfo", "nbdcopy")
        self.raw = self.raw_image("disk.raw", SIZE, gt.text_block)
        self.base = self.raw_image("base.raw", 4 * gt.MIB, gt.text_block)
        self.qcow2 = self.path("disk.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.base, "-F", "raw", self.qcow2, "8M")
        for command in ("write -P 0x5a 64k 192k", "write -z 512k 128k", "write -P 0x77 5M 1M", "write -P 1 3145728 512"):
            self.run_tool("qemu-io", "-f", "qcow2", "-c", command, self.qcow2)
        self.socket_path = self.path("nbd")
        self.d = self.daemon(
            "--blockdev", f"file,node-name=rf,discard=unmap,filename={self.raw}",
            "--blockdev", "raw,node-name=raw,discard=unmap,file=rf",
            "--blockdev", f"qcow2,node-name=qcow2,read-only=on,file.driver=file,file.filename={self.qcow2}",
            "--blockdev", "null-co,node-name=null,read-zeroes=on,size=1073741824",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket_path}",
            "--export", "nbd,id=raw,node-name=raw,writable=on,description=a raw disk",
            "--export", "nbd,id=qcow2,node-name=qcow2",
            "--export", "nbd,id=null,node-name=null,writable=on",
            "--export", "nbd,id=default,node-name=raw,name=,writable=on")
        self.q = self.d.qmp

    def of(self, export):
        return self.uri(self.socket_path, export)

    def connect(self, export, **settings):
        client = gt.libnbd().NBD()
        for name, value in settings.items():
            getattr(client, name)(*value)
        client.connect_uri(self.of(export))
        return client

    def content(self):
        with open(self.raw, "rb") as file:
            return file.read()

    # --- nbdinfo

    def test_nbdinfo(self):
        info = json.loads(self.run_tool("nbdinfo", "--json", self.of("raw")).stdout)
        self.assertEqual((info["protocol"], info["TLS"], info["structured"]), ("newstyle-fixed", False, True))
        export = info["exports"][0]
        self.assertEqual((export["export-name"], export["description"], export["export-size"]), ("raw", "a raw disk", SIZE))
        for name in ("can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_fast_zero"):
            self.assertTrue(export[name], name)
        self.assertFalse(export["is_read_only"])
        self.assertIn("base:allocation", export["contexts"])
        self.assertEqual(export["block_size_maximum"], 32 * gt.MIB)
        read_only = json.loads(self.run_tool("nbdinfo", "--json", self.of("qcow2")).stdout)["exports"][0]
        self.assertEqual((read_only["is_read_only"], read_only["can_multi_conn"], read_only["export-size"]),
                         (True, True, 8 * gt.MIB))
        self.assertFalse(read_only["can_trim"] or read_only["can_zero"])

    def test_nbdinfo_list(self):
        listed = json.loads(self.run_tool("nbdinfo", "--list", "--json", self.of("")).stdout)
        exports = {export["export-name"]: export for export in listed["exports"]}
        self.assertEqual(set(exports), {"raw", "qcow2", "null", ""})
        self.assertEqual(exports["raw"]["description"], "a raw disk")
        self.assertEqual(exports["null"]["export-size"], gt.GIB)

    def test_nbdinfo_map(self):
        extents = json.loads(self.run_tool("nbdinfo", "--map", "--json", self.of("qcow2")).stdout)
        expected = json.loads(self.run_tool("qemu-img", "map", "--output=json", self.qcow2).stdout)
        self.assertEqual(self.runs((extent["offset"], extent["length"], bool(extent["type"] & 2)) for extent in extents),
                         self.runs((extent["start"], extent["length"], extent["zero"]) for extent in expected))
        extents = json.loads(self.run_tool("nbdinfo", "--map", "--json", self.of("raw")).stdout)
        self.assertEqual(sum(extent["length"] for extent in extents), SIZE)
        holes = [extent for extent in extents if extent["type"] == 3]
        self.assertTrue(holes)
        content = self.content()
        for hole in holes:
            self.assertFalse(any(content[hole["offset"] : hole["offset"] + hole["length"]]))

    def runs(self, extents):
        """Neighbours of one kind joined."""
        joined = []
        for offset, length, zero in extents:
            if joined and joined[-1][2] == zero and joined[-1][0] + joined[-1][1] == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + length, zero)
            else:
                joined.append((offset, length, zero))
        return joined

    # --- nbdcopy

    def test_nbdcopy_out(self):
        copy = self.path("copy")
        self.run_tool("nbdcopy", self.of("raw"), copy)
        self.assertEqual(gt.checksum(copy), gt.checksum(self.raw))
        self.run_tool("nbdcopy", "--connections=4", "--requests=32", self.of("qcow2"), copy)
        flat = self.path("flat")
        self.run_tool("qemu-img", "convert", "-O", "raw", self.qcow2, flat)
        self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, flat)

    def test_nbdcopy_in(self):
        source = self.raw_image("source", SIZE, lambda block: gt.text_block(block + 1))
        self.run_tool("nbdcopy", "--flush", source, self.of("raw"))
        self.assertEqual(gt.checksum(source), gt.checksum(self.raw))
        self.run_tool("nbdcopy", "--flush", "--destination-is-zero", self.of("null"), self.of("null"))

    # --- libnbd

    def test_structured_and_simple_replies(self):
        content = self.content()
        for structured in (True, False):
            client = self.connect("raw", set_request_structured_replies=(structured,))
            self.assertEqual(client.get_structured_replies_negotiated(), structured)
            for offset, length in ((0, SIZE), (1, 1), (65535, 2), (SIZE - 1, 1), (SIZE - 4097, 4097), (196608, 65536)):
                self.assertEqual(bytes(client.pread(length, offset)), content[offset : offset + length])
            client.shutdown()
        client = self.connect("raw", add_meta_context=("base:allocation",))
        chunks = []
        data = client.pread_structured(262144, 0, lambda piece, offset, status, error: chunks.append((offset, len(piece))))
        self.assertEqual(bytes(data), content[:262144])
        self.assertTrue(chunks)

    def test_block_status(self):
        client = self.connect("qcow2", add_meta_context=("base:allocation",))
        extents = []
        client.block_status(8 * gt.MIB, 0, lambda context, offset, entries, error: extents.extend(entries))
        self.assertEqual(sum(extents[0::2]), 8 * gt.MIB)
        at, zero = 0, {}
        for length, flags in zip(extents[0::2], extents[1::2]):
            for block in range(at // 65536, (at + length) // 65536):
                zero[block] = bool(flags & 2)
            at += length
        self.assertFalse(zero[1] or zero[80])
        self.assertTrue(zero[8] and zero[9])
        self.assertTrue(zero[127])  # past the backing file, never written

    def test_writes_zeroes_trim_cache(self):
        nbd = gt.libnbd()
        client = self.connect("raw")
        expected = bytearray(self.content())
        rng = random.Random(7)
        for _ in range(200):
            offset = rng.randrange(SIZE)
            length = min(rng.randrange(1, 300000), SIZE - offset)
            kind = rng.randrange(4)
            if kind == 0:
                data = rng.randbytes(length)
                client.pwrite(data, offset, nbd.CMD_FLAG_FUA if rng.random() < 0.2 else 0)
                expected[offset : offset + length] = data
            elif kind == 1:
                client.zero(length, offset, rng.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA]))
                expected[offset : offset + length] = bytes(length)
            elif kind == 2:
                client.cache(length, offset)
            else:
                self.assertEqual(bytes(client.pread(length, offset)), bytes(expected[offset : offset + length]))
        client.flush()
        self.assertEqual(self.content(), bytes(expected))
        client.trim(gt.MIB, gt.MIB)
        data = bytes(client.pread(gt.MIB, gt.MIB))
        self.assertIn(data, (bytes(gt.MIB), bytes(expected[gt.MIB : 2 * gt.MIB])))
        client.pwrite(b"z" * 65536, gt.MIB)
        client.trim(65536, gt.MIB)
        before = os.stat(self.raw).st_blocks
        client.trim(4 * gt.MIB, gt.MIB)
        client.flush()
        self.assertLessEqual(os.stat(self.raw).st_blocks, before)

    def test_errors_keep_the_connection(self):
        nbd = gt.libnbd()
        before = gt.checksum(self.raw)
        client = self.connect("raw", set_strict_mode=(0,))
        read_only = self.connect("qcow2", set_strict_mode=(0,))
        for attempt, errno in (
            (lambda: client.pread(512, SIZE), "EINVAL"),
            (lambda: client.pread(512, SIZE - 1), "EINVAL"),
            (lambda: client.pwrite(b"x" * 512, SIZE - 511), "ENOSPC"),
            (lambda: client.zero(512, SIZE), "ENOSPC"),
            (lambda: client.trim(512, SIZE), "EINVAL"),
            (lambda: client.pread(512, 0, 1 << 14), "EINVAL"),
            (lambda: read_only.pwrite(b"x", 0), "EPERM"),
            (lambda: read_only.zero(512, 0), "EPERM"),
            (lambda: read_only.trim(512, 0), "EPERM"),
        ):
            with self.assertRaises(nbd.Error) as caught:
                attempt()
            if gt.IS_GANTRY:
                self.assertEqual(caught.exception.errno, errno)
        self.assertEqual(bytes(client.pread(512, 0)), self.content()[:512])
        self.assertEqual(len(read_only.pread(512, 0)), 512)
        self.assertEqual(gt.checksum(self.raw), before)

    def test_unknown_export(self):
        nbd = gt.libnbd()
        with self.assertRaises(nbd.Error) as caught:
            self.connect("no-such-export")
        self.assertIn("no-such-export", str(caught.exception))
        done = self.run_tool("qemu-img", "info", self.of("no-such-export"), check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("no-such-export", done.stderr)

    def test_list_exports_and_choose(self):
        client = gt.libnbd().NBD()
        client.set_opt_mode(True)
        client.connect_unix(self.socket_path)
        names = []
        self.assertEqual(client.opt_list(lambda name, description: names.append((name, description))), 4)
        self.assertIn(("raw", "a raw disk"), names)
        client.set_export_name("null")
        client.opt_info()
        self.assertEqual(client.get_size(), gt.GIB)
        client.set_export_name("raw")
        client.opt_go()
        self.assertEqual(client.get_size(), SIZE)

    # --- qemu

    def test_qemu_img(self):
        info = json.loads(self.run_tool("qemu-img", "info", "--output=json", self.of("raw")).stdout)
        self.assertEqual(info["virtual-size"], SIZE // 512 * 512)
        flat = self.path("flat.raw")
        self.run_tool("qemu-img", "convert", "-O", "raw", self.of("qcow2"), flat)
        self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", flat, self.qcow2)
        self.run_tool("qemu-img", "compare", self.of("qcow2"), flat)
        through = self.path("through.qcow2")
        self.run_tool("qemu-img", "convert", "-O", "qcow2", self.of("raw"), through)
        self.run_tool("qemu-img", "check", through)
        self.run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", through, self.of("raw"))
        source = self.raw_image("source", SIZE // 512 * 512, lambda block: gt.text_block(block + 2))
        self.run_tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, self.of("raw"))
        with open(source, "rb") as file:
            self.assertEqual(self.content()[: SIZE // 512 * 512], file.read())

    def test_qemu_io(self):
        def io(*commands, export="raw"):
            words = [word for command in commands for word in ("-c", command)]
            output = self.run_tool("qemu-io", "-f", "raw", *(["-r"] if export != "raw" else []), *words,
                                   self.of(export)).stdout
            self.assertNotIn("Pattern verification failed", output)
            self.assertNotRegex(output, "error|failed")
        io("write -P 0x11 0 64k", "write -P 0x22 100k 1000k", "flush", "read -P 0x11 0 64k", "read -P 0x22 100k 1000k")
        io("write -z 200k 300k", "read -P 0 200k 300k", "read -P 0x22 100k 100k", "read -P 0x22 500k 600k")
        io("write -z -u 600k 100k", "read -P 0 600k 100k", "discard 700k 64k", "flush", "write -f -P 0x33 700k 4k",
           "read -P 0x33 700k 4k")
        io("read -P 0x5a 64k 192k", "read -P 0 512k 128k", "read -P 0x77 5M 1M", "read -P 0 7M 1M", export="qcow2")
        content = self.content()
        self.assertEqual(content[700 * 1024 : 704 * 1024], b"\x33" * 4096)

    def test_fio_verifies(self):
        gt.require("fio")
        if "nbd" not in self.run_tool("fio", "--enghelp").stdout:
            gt.missing("fio has no nbd engine")
        for depth, jobs, block in ((1, 1, 512), (16, 3, 4096), (8, 2, 65536)):
            self.run_tool("fio", "--ioengine=nbd", f"--uri={self.of('raw')}", "--rw=randrw", f"--bs={block}",
                          f"--iodepth={depth}", f"--numjobs={jobs}", f"--size={2 * gt.MIB}",
                          f"--offset_increment={2 * gt.MIB}", "--verify=crc32c", "--verify_fatal=1",
                          "--do_verify=1", "--fsync=32", "--randseed=3", "--thread", "--name=verify",
                          "--output-format=terse")

    # --- TCP

    def test_tcp(self):
        nbd = gt.libnbd()
        port = gt.free_port()
        self.q.cmd("nbd-server-stop")
        self.q.cmd("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}})
        self.q.cmd("block-export-add", type="nbd", id="tcp", node_name="raw", writable=True)
        uri = f"nbd://127.0.0.1:{port}/raw"
        self.assertEqual(self.run_tool("nbdinfo", "--size", uri).stdout, f"{SIZE}\n")
        copy = self.path("copy")
        self.run_tool("nbdcopy", uri, copy)
        self.assertEqual(gt.checksum(copy), gt.checksum(self.raw))
        client = nbd.NBD()
        client.connect_uri(uri)
        client.pwrite(b"tcp", 5)
        self.assertEqual(self.content()[5:8], b"tcp")

    # --- clients that come, go and misbehave

    def test_exports_come_and_go_under_load(self):
        stop = threading.Event()
        failures = []

        def work(index):
            client = self.connect("raw")
            mine = range(index * 32, index * 32 + 32)
            rng = random.Random(index)
            model = {}
            try:
                while not stop.is_set():
                    block = rng.choice(mine)
                    if block in model and bytes(client.pread(4096, block * 4096)) != model[block]:
                        failures.append(f"client {index}: block {block} differs")
                        return
                    model[block] = rng.randbytes(4096)
                    client.pwrite(model[block], block * 4096)
            except gt.libnbd().Error as error:
                failures.append(f"client {index}: {error}")
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        try:
            for round in range(40):
                name = f"n{round}"
                self.q.cmd("blockdev-add", driver="null-co", node_name=name, size=gt.MIB, read_zeroes=True)
                self.q.cmd("block-export-add", type="nbd", id=name, node_name=name, writable=True)
                visitor = self.connect(name)
                visitor.pwrite(b"x" * 4096, 0)
                self.q.cmd("block-export-del", id=name, mode="hard")
                self.q.event("BLOCK_EXPORT_DELETED", id=name)
                self.q.cmd("blockdev-del", node_name=name)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        self.assertEqual(failures, [])

    def works(self, client, seconds=5.0):
        """One read within the time that no stalled neighbour may cost."""
        begin = time.monotonic()
        self.assertEqual(len(client.pread(65536, 0)), 65536)
        self.assertLess(time.monotonic() - begin, seconds)

    def test_a_client_that_vanishes_disturbs_nobody(self):
        other = self.connect("raw")
        for round in range(20):
            client = self.connect("raw")
            buffers = [gt.libnbd().Buffer(gt.MIB) for _ in range(8)]
            for i, buffer in enumerate(buffers):
                client.aio_pread(buffer, i * gt.MIB)
            client.aio_pwrite(gt.libnbd().Buffer.from_bytearray(bytearray(65536)), 0)
            # In the middle of everything: half a header, half a payload.
            os.write(client.aio_get_fd(), b"\x25\x60\x95\x13"[: 1 + round % 4])
            del client
            self.works(other)
        self.q.cmd("query-block-exports")

    def test_a_client_that_never_reads_disturbs_nobody(self):
        other = self.connect("raw")
        stalled = []
        for _ in range(6):
            client = self.connect("raw")
            for i in range(64):
                client.aio_pread(gt.libnbd().Buffer(gt.MIB), (i % 8) * gt.MIB)  # 64 MiB that nobody takes
            stalled.append(client)
        for _ in range(10):
            self.works(other)
        late = self.connect("raw")
        self.works(late)
        if gt.IS_GANTRY:  # ends although they have unread replies; the reference waits for the clients
            self.q.cmd("block-export-del", id="raw", mode="hard")
            self.q.event("BLOCK_EXPORT_DELETED", id="raw")
        stalled.clear()

    def test_a_handshake_that_stalls_disturbs_nobody(self):
        sockets = []
        for words in (b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\xff\xff" + b"x" * 100):
            for _ in range(5):
                half = socket.socket(socket.AF_UNIX)
                half.connect(self.socket_path)
                half.sendall(words)
                sockets.append(half)
        self.works(self.connect("raw"))
        for half in sockets:
            half.close()
        self.works(self.connect("raw"))

    def test_garbage_ends_only_the_connection(self):
        rng = random.Random(5)
        other = self.connect("raw")
        before = gt.checksum(self.raw)
        for _ in range(30):
            with socket.socket(socket.AF_UNIX) as garbage:
                garbage.settimeout(gt.DEADLINE)
                garbage.connect(self.socket_path)
                try:
                    garbage.sendall(b"\0\0\0\3" * rng.randrange(2) + rng.randbytes(rng.randrange(1, 5000)))
                    garbage.shutdown(socket.SHUT_WR)
                    while garbage.recv(65536):
                        pass
                except (BrokenPipeError, ConnectionResetError):
                    pass
        self.works(other)
        self.assertEqual(gt.checksum(self.raw), before)

    def test_many_connections(self):
        clients = [self.connect("raw") for _ in range(50)]
        content = self.content()
        for i, client in enumerate(clients):
            self.assertEqual(bytes(client.pread(4096, i * 4096)), content[i * 4096 : i * 4096 + 4096])
        clients[0].pwrite(b"seen by all", 0)
        clients[0].flush()
        for client in clients:
            self.assertEqual(bytes(client.pread(11, 0)), b"seen by all")


class Limits(gt.Case):
    def start(self, **options):
        daemon = self.daemon("--blockdev", "null-co,node-name=n,read-zeroes=on")
        daemon.qmp.cmd("nbd-server-start", addr={"type": "unix", "data": {"path": self.path("nbd")}}, **options)
        daemon.qmp.cmd("block-export-add", type="nbd", id="e", node_name="n")
        return daemon

    def test_clients_beyond_the_limit_wait(self):
        nbd = gt.libnbd()
        self.start(max_connections=2)
        clients = [nbd.NBD(), nbd.NBD()]
        for client in clients:
            client.connect_uri(self.uri(self.path("nbd"), "n"))
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(self.path("nbd"))
        waiting.settimeout(0.2)
        with self.assertRaises(TimeoutError):
            waiting.recv(1)
        clients[0].shutdown()
        waiting.settimeout(gt.DEADLINE)
        self.assertEqual(waiting.recv(8), b"NBDMAGIC")
        waiting.close()

    def test_one_connection_means_no_multi_conn(self):
        self.start(max_connections=1)
        info = json.loads(self.run_tool("nbdinfo", "--json", self.uri(self.path("nbd"), "n")).stdout)
        self.assertFalse(info["exports"][0]["can_multi_conn"])

    def test_time_limit_of_the_handshake(self):
        gt.require_gantry("an addition of later versions")
        nbd = gt.libnbd()
        self.start(handshake_max_seconds=1)
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("nbd"), "n"))
        with socket.socket(socket.AF_UNIX) as slow:
            slow.connect(self.path("nbd"))
            slow.settimeout(gt.DEADLINE)
            slow.sendall(b"\0\0\0\3")
            data = b"x"
            while data:  # the greeting, then the end
                data = slow.recv(4096)
        self.assertEqual(len(client.pread(512, 0)), 512)  # who has finished it may stay


if __name__ == "__main__":
    gt.main()
