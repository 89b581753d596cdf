#!/usr/bin/python3
"""qcow2 images written through the daemon by real clients, then judged by qemu-img; and the other way round; kill -9."""

import itertools
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, IS_GANTRY, libnbd, require, require_gantry

SIZE = 4 * MIB + 3 * 512

# name: (creation options, cluster size)
SHAPES = {
    "plain": ("", 64 * KIB),
    "c512": ("cluster_size=512", 512),
    "c1k-r64": ("cluster_size=1k,refcount_bits=64", KIB),
    "c4k-r1": ("cluster_size=4k,refcount_bits=1", 4 * KIB),
    "c16k-r2": ("cluster_size=16k,refcount_bits=2", 16 * KIB),
    "c256k-r8": ("cluster_size=256k,refcount_bits=8", 256 * KIB),
    "c2m-r32": ("cluster_size=2M,refcount_bits=32", 2 * MIB),
    "v2": ("compat=0.10", 64 * KIB),
    "v2-c4k": ("compat=0.10,cluster_size=4k", 4 * KIB),
    "lazy": ("lazy_refcounts=on,cluster_size=4k", 4 * KIB),
    "sub16k": ("extended_l2=on,cluster_size=16k", 16 * KIB),
    "sub64k": ("extended_l2=on", 64 * KIB),
    "sub2m": ("extended_l2=on,cluster_size=2M", 2 * MIB),
    "meta": ("preallocation=metadata,cluster_size=8k", 8 * KIB),
    "falloc": ("preallocation=falloc", 64 * KIB),
    "zstd": ("compression_type=zstd,cluster_size=32k", 32 * KIB),
}


class Work:
    """Random requests as qemu-io commands, and what the disk holds after them."""

    def __init__(self, seed, contents, unit, discards):
        self.random = random.Random(seed)
        self.model = bytearray(contents)
        self.unit = unit
        self.discards = discards

    def commands(self, count):
        out = []
        for _ in range(count):
            kind = self.random.randrange(12)
            at = self.random.randrange(SIZE // 512) * 512
            length = min(self.random.choice((512, 4096, 9 * 512, 65536, 200 * KIB)), SIZE - at)
            if kind < 7:
                value = self.random.randrange(1, 255)
                out.append(f"write -P {value} {at} {length}")
                self.model[at : at + length] = bytes([value]) * length
            elif kind < 9:
                out.append(f"write -z {'-u ' if kind == 8 else ''}{at} {length}")
                self.model[at : at + length] = bytes(length)
            elif kind < 11 and self.discards:
                unit = self.unit
                at = at // unit * unit
                length = min((length + unit - 1) // unit * unit, SIZE - at)
                out.append(f"discard {at} {length}")
                self.model[at : at + length] = bytes(length)
            else:
                out.append("flush")
        return out


class Qcow2Write(Case):
    def setUp(self):
        super().setUp()
        require("qemu-img", "qemu-io")
        require_gantry("the write side is ours")

    # -- pieces

    def create(self, name, options, backing=None):
        command = ["qemu-img", "create", "-q", "-f", "qcow2"]
        if options:
            command += ["-o", options]
        if backing:
            command += ["-F", "qcow2", "-b", backing]
        self.run_tool(*command, self.path(name), SIZE)
        return self.path(name)

    def base(self):
        """A backing file with something everywhere but in the holes."""
        path = self.create("base.qcow2", "")
        commands = [f"write -P {1 + i % 250} {i * 96 * KIB} {64 * KIB}" for i in range(SIZE // (96 * KIB) - 1)]
        self.run_tool("qemu-io", "-f", "qcow2", *[w for c in commands for w in ("-c", c)], path)
        self.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, self.path("base.raw"))
        with open(self.path("base.raw"), "rb") as file:
            return file.read()

    @staticmethod
    def node(name, path, **more):
        return {"driver": "qcow2", "node-name": name, "discard": "unmap",
                "file": {"driver": "file", "filename": path, "discard": "unmap"}, **more}

    def serve(self, nodes, *more):
        sock = self.path("nbd.sock")
        arguments = [*more, "--nbd-server", f"addr.type=unix,addr.path={sock}"]
        for node in nodes:
            name = node["node-name"]
            arguments += ["--blockdev", json.dumps(node)]
            arguments += ["--export", f"type=nbd,id=e-{name},node-name={name},name={name},writable=on"]
        return self.daemon(*arguments), sock

    def client(self, sock, name, commands):
        self.run_tool("qemu-io", "-f", "raw", "-d", "unmap", *[w for c in commands for w in ("-c", c)],
                      self.uri(sock, name))

    def assert_image(self, path, model, what, leaks=False):
        checked = self.run_tool("qemu-img", "check", path, check=False)
        self.assertIn(checked.returncode, (0, 3) if leaks else (0,), f"{what}: {checked.stdout}{checked.stderr}")
        with open(self.path("model.raw"), "wb") as file:
            file.write(model)
        compared = self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.path("model.raw"), path, check=False)
        self.assertEqual(0, compared.returncode, f"{what}: {compared.stdout}{compared.stderr}")

    # -- the matrix

    def matrix(self, backed):
        base = self.base() if backed else bytes(SIZE)
        shapes = {name: shape for name, shape in SHAPES.items()
                  if not backed or ("preallocation" not in shape[0])}
        works, nodes = {}, []
        for seed, (name, (options, cluster)) in enumerate(shapes.items()):
            path = self.create(f"{name}.qcow2", options, "base.qcow2" if backed else None)
            discards = not (backed and "0.10" in options)
            works[name] = (Work(seed, base, cluster, discards), path)
            nodes.append(self.node(name, path))
        for part in range(2):
            daemon, sock = self.serve(nodes)
            for work, path in works.values():
                name = os.path.basename(path)[:-6]
                self.client(sock, name, work.commands(60))
            daemon.stop()
            for name, (work, path) in works.items():
                with self.subTest(name=name, part=part):
                    self.assert_image(path, work.model, name)
            # The other writer takes a turn.
            for name, (work, path) in works.items():
                commands = work.commands(20)
                self.run_tool("qemu-io", "-f", "qcow2", "-d", "unmap", *[w for c in commands for w in ("-c", c)], path)
        daemon, sock = self.serve(nodes)
        for name, (work, path) in works.items():
            with self.subTest(name=name, part="read"):
                self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(sock, name), self.path("read.raw"))
                with open(self.path("read.raw"), "rb") as file:
                    self.assertTrue(file.read() == bytes(work.model), name)

    def test_every_shape(self):
        self.matrix(backed=False)

    def test_every_shape_over_a_backing_file(self):
        self.matrix(backed=True)

    def test_external_data_files(self):
        for raw, options in itertools.product((False, True), ("", "cluster_size=4k", "extended_l2=on,cluster_size=16k")):
            with self.subTest(raw=raw, options=options):
                data = self.path("data.raw")
                more = f"data_file={data},data_file_raw={'on' if raw else 'off'}"
                path = self.create("ext.qcow2", f"{options},{more}" if options else more)
                cluster = {"": 64, "cluster_size=4k": 4}.get(options, 16) * KIB
                work = Work(3, bytes(SIZE), cluster, True)
                daemon, sock = self.serve([self.node("n", path)])
                self.client(sock, "n", work.commands(80))
                daemon.stop()
                self.assert_image(path, work.model, options)
                if raw:
                    with open(data, "rb") as file:
                        self.assertTrue(file.read()[: len(work.model)].ljust(SIZE, b"\0") == bytes(work.model), "the data file alone")
                os.unlink(path)
                os.unlink(data)

    def test_nothing_changes_when_opened_read_only(self):
        path = self.create("quiet.qcow2", "lazy_refcounts=on")
        with open(path, "rb") as file:
            before = file.read()
        daemon, sock = self.serve([])
        qmp = daemon.monitor()
        qmp.cmd("blockdev-add", self.node("q", path, **{"read-only": True}))
        qmp.cmd("blockdev-del", **{"node-name": "q"})
        daemon.stop()
        with open(path, "rb") as file:
            self.assertEqual(before, file.read())

    def test_reopening_read_only_and_back(self):
        path = self.create("turn.qcow2", "")
        daemon = self.daemon()
        qmp = daemon.monitor()
        node = self.node("n", path)
        qmp.cmd("blockdev-add", node)
        sock = self.start_nbd(qmp)
        for turn in range(3):
            qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": True})
            self.run_tool("qemu-io", "-f", "raw", "-c", f"write -P {turn + 1} {turn * 100}k 100k", self.uri(sock, "n"))
            qmp.delete_export("e")
            qmp.cmd("blockdev-reopen", {"options": [dict(node, **{"read-only": True})]})
            self.run_tool("qemu-img", "check", "-U", path)
            qmp.cmd("blockdev-reopen", {"options": [node]})
        daemon.stop()
        self.run_tool("qemu-img", "check", path)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 100k", "-c", "read -P 3 200k 100k", path)

    # -- kill -9

    def killed_round(self, path, base, seed, size, *more):
        """With a mapping log (`more`) what was acknowledged is certain, not only what was flushed."""
        nbd = libnbd()
        rng = random.Random(seed)
        flushed = bytearray(base)  # what is certain
        pending = []               # (offset, bytes) acknowledged or on the way since
        daemon, sock = self.serve([self.node("n", path)], *more)
        handle = nbd.NBD()
        handle.connect_uri(self.uri(sock, "n"))
        timer = threading.Timer(0.05 + rng.random() * 0.3, daemon.kill)
        timer.start()
        try:
            while True:
                at = rng.randrange(size // 512) * 512
                length = min(rng.choice((512, 4096, 65536, 100 * KIB)), size - at)
                data = bytes([rng.randrange(1, 256)]) * length
                pending.append((at, data))
                handle.pwrite(data, at)
                if more:
                    flushed[at : at + length] = data
                    pending = []
                elif rng.randrange(6) == 0:
                    count = len(pending)
                    handle.flush()
                    for where, what in pending[:count]:
                        flushed[where : where + len(what)] = what
                    pending = pending[count:]
        except nbd.Error:
            pass
        timer.join()
        if "lazy" not in path:  # there the dirty bit says that counts are to be made anew
            checked = self.run_tool("qemu-img", "check", path, check=False)
            self.assertIn(checked.returncode, (0, 3), f"{checked.stdout}{checked.stderr}")
        daemon, sock = self.serve([self.node("n", path)], *more)
        handle = nbd.NBD()
        handle.connect_uri(self.uri(sock, "n"))
        now = bytearray()
        for at in range(0, size, MIB):
            now += handle.pread(min(MIB, size - at), at)
        allowed = {}
        for at, data in pending:
            for sector in range(at // 512, (at + len(data)) // 512):
                allowed.setdefault(sector, []).append(data[:512])
        for sector in range(size // 512):
            found = bytes(now[sector * 512 : sector * 512 + 512])
            if found != flushed[sector * 512 : sector * 512 + 512] and found not in allowed.get(sector, ()):
                self.fail(f"sector {sector} holds {found[:4].hex()}..., flushed was {bytes(flushed[sector * 512:sector * 512 + 4]).hex()}")
        handle.shutdown()
        daemon.stop()
        # Closed in order: what the crash leaked is reclaimed.
        self.run_tool("qemu-img", "check", path)
        return bytes(now)

    def test_kill_9_keeps_what_was_flushed(self):
        libnbd()
        shapes = {"plain": "", "c4k": "cluster_size=4k", "sub": "extended_l2=on", "lazy": "lazy_refcounts=on,cluster_size=16k",
                  "c512": "cluster_size=512"}
        size = SIZE // 512 * 512
        for name, options in shapes.items():
            path = self.create(f"kill-{name}.qcow2", options)
            contents = bytes(size)
            for seed in range(3):
                with self.subTest(name=name, seed=seed):
                    contents = self.killed_round(path, contents, seed, size)

    def test_kill_9_keeps_what_was_acknowledged_with_a_mapping_log(self):
        libnbd()
        logs = tempfile.mkdtemp(prefix="gt-", dir="/dev/shm")
        self.addCleanup(shutil.rmtree, logs, ignore_errors=True)
        shapes = {"plain": "", "c4k": "cluster_size=4k", "sub": "extended_l2=on", "c512": "cluster_size=512"}
        size = SIZE // 512 * 512
        for name, options in shapes.items():
            path = self.create(f"log-{name}.qcow2", options)
            contents = bytes(size)
            for seed in range(3):
                with self.subTest(name=name, seed=seed):
                    contents = self.killed_round(path, contents, seed, size, "--mapping-logs", logs)

    def test_mapping_logs_must_be_in_memory(self):
        failed = self.run_daemon("--mapping-logs", "/usr")
        self.assertEqual(1, failed.returncode)
        self.assertIn("is not in memory", failed.stderr)


if __name__ == "__main__":
    gantry_test.main()
