#!/usr/bin/python3
# One configuration: what differs is the images.
"""qcow2 images of every pair of features: the reference fills them, we read and write them, the reference judges."""

import itertools
import json
import os
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, require, require_gantry

SIZE = 3 * MIB + 5 * 512
SECRET = "secret,id=s,data=open sesame"
SOAK = bool(os.environ.get("GANTRY_SOAK"))

FEATURES = {
    "compat": ("1.1", "0.10"),
    "cluster": (64 * KIB, 512, 4 * KIB, 16 * KIB, 2 * MIB) + ((KIB, 256 * KIB) if SOAK else ()),
    "refcount_bits": (16, 1, 8, 64) + ((2, 4, 32) if SOAK else ()),
    "lazy_refcounts": (False, True),
    "extended_l2": (False, True),
    "compression_type": ("zlib", "zstd"),
    "compressed": (False, True),                # some of what the reference writes
    "data_file": ("none", "plain", "raw"),
    "encryption": ("none", "luks", "aes"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "backing": ("none", "shorter", "longer"),
    "maker": ("reference", "ours"),
}


def possible(row):
    """Whether the format has an image with all of this; `row` may lack features."""
    has = row.get
    if has("compat") == "0.10" and (has("refcount_bits", 16) != 16 or has("lazy_refcounts") or has("extended_l2") or
                                    has("compression_type") == "zstd" or has("data_file", "none") != "none"):
        return False
    if has("extended_l2") and has("cluster", MIB) < 16 * KIB:
        return False
    if has("compressed") and (has("data_file", "none") != "none" or has("encryption", "none") != "none" or
                              has("preallocation", "off") != "off"):  # the reference compresses into nothing but holes
        return False
    if has("backing", "none") != "none" and has("data_file") == "raw":
        return False
    if has("backing", "none") != "none" and has("preallocation", "off") != "off" and not has("extended_l2", True):
        return False
    # What lies under metadata alone is noise once it is deciphered, so there is nothing to compare.
    if has("encryption", "none") != "none" and (has("preallocation", "off") != "off" or has("data_file") == "raw"):
        return False
    # The reference measures its own speed for seconds.
    return not (has("encryption") == "luks" and has("maker") == "reference")


def completed(fixed, rng):
    """A row with the features of `fixed`; None when there is none."""
    row = dict(fixed)
    for name in rng.sample(list(FEATURES), len(FEATURES)):
        if name not in row:
            values = [v for v in FEATURES[name] if possible({**row, name: v})]
            if not values:
                return None
            row[name] = rng.choice(values)
    return row if possible(row) else None


def pairs_of(row):
    return set(itertools.combinations(sorted(row.items(), key=lambda item: item[0]), 2))


def rows(seed=1):
    """Rows in which every possible pair of features occurs."""
    rng = random.Random(seed)
    wanted = {((a, v), (b, w)) for a, b in itertools.combinations(sorted(FEATURES), 2)
              for v in FEATURES[a] for w in FEATURES[b] if possible({a: v, b: w})}
    chosen = []
    for pair in sorted(wanted, key=repr):
        if pair not in wanted:
            continue
        candidates = [row for row in (completed(dict(pair), rng) for _ in range(40)) if row]
        if not candidates:
            raise AssertionError(f"no image has {pair}")
        best = max(candidates, key=lambda row: len(pairs_of(row) & wanted))
        chosen.append(best)
        wanted -= pairs_of(best)
    return chosen


class Contents:
    """Random requests as qemu-io commands, and what the disk holds after them."""

    def __init__(self, seed, row, contents):
        self.random, self.row, self.model = random.Random(seed), row, bytearray(contents)
        # Over a backing file version 2 has no way to forget a cluster.
        self.discards = not (row["compat"] == "0.10" and row["backing"] != "none")

    def compressed(self):
        """Into clusters that have no place yet."""
        unit, out = self.row["cluster"], []
        for cluster in self.random.sample(range(SIZE // unit + 1), min(12, SIZE // unit + 1)):
            at, value = cluster * unit, self.random.randrange(1, 255)
            length = min(unit, SIZE - at)
            out += ["-c", f"write -c -P {value} {at} {length}"]
            self.model[at : at + length] = bytes([value]) * length
        return out

    def commands(self, count):
        out = []
        for _ in range(count):
            kind = self.random.randrange(12)
            at = self.random.randrange(SIZE // 512) * 512
            length = min(self.random.choice((512, 4096, 9 * 512, 65536, 150 * KIB)), SIZE - at)
            if kind < 7:
                value = self.random.randrange(1, 255)
                out.append(f"write -P {value} {at} {length}")
                self.model[at : at + length] = bytes([value]) * length
            elif kind < 9:
                out.append(f"write -z {'-u ' if kind == 8 else ''}{at} {length}")
                self.model[at : at + length] = bytes(length)
            elif kind < 11 and self.discards:
                at, length = self.whole_clusters(at, length)
                out.append(f"discard {at} {length}")
                self.model[at : at + length] = bytes(length)
            else:
                out.append("flush")
        return [word for command in out for word in ("-c", command)]

    def whole_clusters(self, at, length):
        unit = self.row["cluster"]
        at = at // unit * unit
        return at, min((length + unit - 1) // unit * unit, SIZE - at)


class Matrix(Case):
    def setUp(self):
        super().setUp()
        require("qemu-img", "qemu-io")
        require_gantry("writes and makes images by our own tool")

    def base(self, size):
        """A backing file and its contents as an overlay sees them."""
        path = self.path(f"base-{size}.raw")
        if not os.path.exists(path):
            rng = random.Random(size)
            data = b"".join(bytes([rng.randrange(1, 255)]) * (24 * KIB) if i % 3 else bytes(24 * KIB) for i in range(200))[:size]
            with open(path, "wb") as file:
                file.write(data.ljust(size, b"\x11"))
        with open(path, "rb") as file:
            return path, file.read()[:SIZE].ljust(SIZE, b"\0")

    def make(self, name, row):
        """(path, contents)"""
        def word(value):
            return ("off", "on")[value] if isinstance(value, bool) else value

        words = [f"compat={row['compat']}", f"cluster_size={row['cluster']}", f"preallocation={row['preallocation']}"]
        if row["compat"] != "0.10":
            words += [f"{key}={word(row[key])}" for key in ("refcount_bits", "lazy_refcounts", "extended_l2", "compression_type")]
        if row["data_file"] != "none":
            words += [f"data_file={self.path(name)}.data", f"data_file_raw={word(row['data_file'] == 'raw')}"]
        if row["encryption"] != "none":
            words += [f"encrypt.format={row['encryption']}", "encrypt.key-secret=s"]
        if row["encryption"] == "luks":
            words += ["encrypt.iter-time=10"]
        contents, backing = bytes(SIZE), []
        if row["backing"] != "none":
            path, contents = self.base(MIB + 512 if row["backing"] == "shorter" else 4 * MIB)
            backing = ["-F", "raw", "-b", path]
        tool = [gantry_test.GANTRY, "image", "create"] if row["maker"] == "ours" and row["encryption"] != "aes" else ["qemu-img", "create", "-q"]
        self.run_tool(*tool, "-f", "qcow2", "--object", SECRET, "-o", ",".join(words), *backing, self.path(name), SIZE)
        return self.path(name), contents

    @staticmethod
    def opened(path, row):
        encrypt = f",encrypt.format={row['encryption']},encrypt.key-secret=s" if row["encryption"] != "none" else ""
        return ["--object", SECRET, "--image-opts", f"driver=qcow2,discard=unmap,file.driver=file,file.filename={path}{encrypt}"]

    @staticmethod
    def node(name, path, row):
        encrypt = {"encrypt": {"format": row["encryption"], "key-secret": "s"}} if row["encryption"] != "none" else {}
        return {"driver": "qcow2", "node-name": name, "discard": "unmap", **encrypt,
                "file": {"driver": "file", "filename": path, "discard": "unmap"}}

    def judged(self, path, row, model):
        checked = self.run_tool("qemu-img", "check", *self.opened(path, row), check=False)
        self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)
        self.run_tool("qemu-img", "convert", "-O", "raw", *self.opened(path, row), self.path("out.raw"))
        self.assert_holds(self.path("out.raw"), model)
        if row["data_file"] == "raw":
            self.assert_holds(f"{path}.data", model)

    def assert_holds(self, path, model):
        with open(path, "rb") as file:
            data = file.read().ljust(SIZE, b"\0")
        self.assertFalse(any(data[SIZE:]), "beyond the end")  # of a data file of whole clusters
        data = data[:SIZE]
        if data != model:
            at = next(i for i in range(SIZE) if data[i] != model[i])
            self.fail(f"{path}: {data[at]:#x} at {at}, not {model[at]:#x}")

    def test_every_pair_of_features(self):
        images = {}
        all_rows = [row for seed in range(1, 4 if SOAK else 2) for row in rows(seed)]
        for number, row in enumerate(all_rows):
            with self.subTest("the reference fills it", **row):
                path, contents = self.make(f"i{number}", row)
                work = Contents(number, row, contents)
                compressed = work.compressed() if row["compressed"] else []
                self.run_tool("qemu-io", *compressed, *work.commands(30), *self.opened(path, row))
                self.judged(path, row, work.model)
                images[f"i{number}"] = (path, row, work)
        sock = self.path("nbd.sock")
        arguments = ["--object", SECRET, "--nbd-server", f"addr.type=unix,addr.path={sock}"]
        for name, (path, row, _) in images.items():
            arguments += ["--blockdev", json.dumps(self.node(name, path, row)),
                          "--export", f"type=nbd,id=e-{name},node-name={name},name={name},writable=on"]
        daemon = self.daemon(*arguments)
        for name, (path, row, work) in images.items():
            with self.subTest("we read it and write it", **row):
                self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(sock, name), self.path("read.raw"))
                self.assert_holds(self.path("read.raw"), work.model)
                self.run_tool("qemu-io", "-f", "raw", "-d", "unmap", *work.commands(40), self.uri(sock, name))
                self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(sock, name), self.path("read.raw"))
                self.assert_holds(self.path("read.raw"), work.model)
        daemon.stop()
        for path, row, work in images.values():
            with self.subTest("the reference judges and writes it", **row):
                self.judged(path, row, work.model)
                self.run_tool("qemu-io", *work.commands(20), *self.opened(path, row))
                self.judged(path, row, work.model)


if __name__ == "__main__":
    gantry_test.main()
