#!/usr/bin/python3
# One configuration: file systems on loop devices; what differs by back end is tested below them.
"""Loop devices on the file of an export, with file systems on them: ext4, xfs and btrfs."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from fuse_case import SOAK, FuseCase, need_root, ready_for, transports
from gantry_test import IS_GANTRY, KIB, MIB, require, require_gantry, wait_for

SIZE, LARGER = 320 * MIB, 400 * MIB  # xfs wants 300 MiB
FILES = 400 if SOAK else 60
MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check", "-p"]}
GROW = {"ext4": lambda dev, at: ["resize2fs", dev], "xfs": lambda dev, at: ["xfs_growfs", at],
        "btrfs": lambda dev, at: ["btrfs", "filesystem", "resize", "max", at]}


def may_use_resources():
    """CAP_SYS_RESOURCE, which ext4 wants for growing while it is mounted."""
    with open("/proc/self/status", encoding="ascii") as file:
        return any(line.startswith("CapEff:") and int(line.split()[1], 16) >> 24 & 1 for line in file)


def digest_of_tree(root):
    """A digest of names, sizes and contents of everything below `root`."""
    digest = hashlib.sha256()
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            path = os.path.join(directory, name)
            digest.update(os.path.relpath(path, root).encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Loops(FuseCase):
    def setUp(self):
        super().setUp()
        need_root("a loop device")
        require("losetup", "qemu-img", "fstrim", "blkdiscard")
        os.environ["PATH"] += ":/sbin:/usr/sbin"

    def loop(self, path, direct, sector):
        """(device, a function that detaches it)."""
        dev = self.run_tool("losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", "--sector-size", sector,
                            path).stdout.strip()
        detach = self.undone_by("losetup", "-d", dev)
        (about,) = json.loads(self.run_tool("losetup", "--json", "--list", "-O", "name,dio,log-sec", dev).stdout)["loopdevices"]
        self.assertEqual((about["dio"], about["log-sec"]), (direct, sector))

        def gone():
            detach()
            wait_for(lambda: not self.run_tool("losetup", "--noheadings", "--list", "-O", "back-file", "-j", path).stdout.strip(),
                     f"{dev} to be detached")
        return dev, gone

    def mounted(self, dev, fs):
        where = self.path("mnt-" + os.path.basename(dev))
        os.makedirs(where, exist_ok=True)
        self.run_tool("mount", "-t", fs, dev, where)
        return where, self.undone_by("umount", where)

    def fill(self, where, seed):
        rng = random.Random(seed)
        for number in range(FILES):
            directory = os.path.join(where, f"d{seed}-{number % 7}")
            os.makedirs(directory, exist_ok=True)
            with open(os.path.join(directory, f"f{number}"), "wb") as file:
                file.write(rng.randbytes(rng.choice((10, 4096, 70000, 300000, 2 * MIB if number % 9 == 0 else 1000))))
                if number % 5 == 0:
                    file.flush()
                    os.fsync(file.fileno())

    def check(self, fs, dev):
        self.run_tool(*CHECK[fs], dev)

    def allocated(self, at):
        return os.stat(at.image).st_blocks * 512

    def whole_life(self, fs, form, direct, sector, **options):
        # File systems on its loop devices are corrupt within seconds, here as without us.
        require_gantry("the reference mixes up the data of requests that come at a time")
        require(MKFS[fs][0], CHECK[fs][0])
        label = f"{fs}-{form}-{sector}"
        at = self.mount(form, image=self.make_image(form, SIZE, label), mountpoint=self.path("f-" + label), **options)
        passthrough = options.get("passthrough")
        dev, detach = self.loop(at.path, direct, sector)
        self.run_tool(*MKFS[fs], dev)
        where, unmount = self.mounted(dev, fs)
        self.fill(where, 1)
        wanted = digest_of_tree(where)
        unmount()
        self.check(fs, dev)
        detach()
        # Everything is there for the next one.
        dev, detach = self.loop(at.path, direct, sector)
        where, unmount = self.mounted(dev, fs)
        self.assertEqual(digest_of_tree(where), wanted)
        # Space that is free is free in the image.
        with open(os.path.join(where, "large"), "wb") as file:
            for i in range(64):
                file.write(bytes([i + 1]) * MIB)
            file.flush()
            os.fsync(file.fileno())
        full = self.allocated(at)
        os.unlink(os.path.join(where, "large"))
        self.run_tool("sync", "-f", where)

        def trimmed():  # xfs frees what is deleted a little later
            self.run_tool("fstrim", where)
            return self.allocated(at) < full - 48 * MIB
        wait_for(trimmed, f"the image to have less than {full} bytes allocated")
        self.assertEqual(digest_of_tree(where), wanted)
        # It grows while it is mounted.
        if not passthrough:
            at.qmp.cmd("block_resize", {"node-name": "disk", "size": LARGER})
            self.run_tool("losetup", "-c", dev)
            self.assertEqual(int(self.run_tool("blockdev", "--getsize64", dev).stdout), LARGER)
            before = os.statvfs(where).f_blocks
            if fs == "ext4" and not may_use_resources():
                unmount()
                self.run_tool("e2fsck", "-fp", dev)
                self.run_tool("resize2fs", dev)
                where, unmount = self.mounted(dev, fs)
            else:
                self.run_tool(*GROW[fs](dev, where))
            self.assertGreater(os.statvfs(where).f_blocks, before)
        self.fill(where, 2)
        wanted = digest_of_tree(where)
        unmount()
        self.check(fs, dev)
        detach()
        at.daemon.stop()
        self.check_image(at.image, form)
        # Without us: what is in the image is what the file system had.
        raw = at.image
        if form != "raw":
            raw = self.path("out.raw")
            self.run_tool("qemu-img", "convert", "-f", form, "-O", "raw", at.image, raw)
        dev, detach = self.loop(raw, False, sector)
        self.check(fs, dev)
        where, unmount = self.mounted(dev, fs)
        self.assertEqual(digest_of_tree(where), wanted)
        unmount()
        detach()
        shutil.rmtree(where, ignore_errors=True)

    def test_ext4(self):
        self.kinds("ext4", ("raw", True, 512), ("qcow2", False, 4096))

    def test_xfs(self):
        self.kinds("xfs", ("raw", False, 4096), ("qcow2", True, 512))

    def test_btrfs(self):
        self.kinds("btrfs", ("raw", True, 4096), ("qcow2", False, 512))

    def kinds(self, fs, *chosen):
        kinds = [(form, direct, sector) for form in ("raw", "qcow2") for direct in (True, False) for sector in (512, 4096)] \
            if SOAK else chosen
        for form, direct, sector in kinds:
            with self.subTest(fs=fs, form=form, direct=direct, sector=sector):
                self.whole_life(fs, form, direct, sector)

    def test_other_transports(self):
        kinds = [("ext4", form, name) for form in ("raw", "qcow2") for name in transports(form) if name != "classic"]
        for fs, form, name in kinds if SOAK else [kind for kind in kinds if kind[1:] in (("raw", "passthrough"), ("qcow2", "uring"))]:
            with self.subTest(fs=fs, form=form, transport=name), ready_for(name):
                self.whole_life(fs, form, True, 512, **transports(form)[name])

    def test_discard_and_zeroes_of_the_device(self):
        for form in ("raw", "qcow2"):
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, 16 * MIB, form, lambda n: b"d" * 65536),
                                mountpoint=self.path("f" + form))
                dev, detach = self.loop(at.path, True, 512)
                before = self.allocated(at)
                self.run_tool("blkdiscard", "-o", 4 * MIB, "-l", 4 * MIB, dev)
                with open(dev, "r+b") as file:
                    os.fsync(file.fileno())  # qcow2 gives space back once the mapping is on disk
                wait_for(lambda: self.allocated(at) <= before - 4 * MIB + 128 * KIB, "the discarded part to be free")
                self.run_tool("blkdiscard", "-z", "-o", 9 * MIB, "-l", MIB, dev)
                if IS_GANTRY:
                    self.run_tool("blkdiscard", "-z", "-o", 12 * MIB + 512, "-l", 1024, dev)
                with open(dev, "rb") as file:
                    data = file.read()
                model = bytearray(b"d" * 16 * MIB)
                model[4 * MIB:8 * MIB] = bytes(4 * MIB)
                model[9 * MIB:10 * MIB] = bytes(MIB)
                if IS_GANTRY:
                    model[12 * MIB + 512:12 * MIB + 1536] = bytes(1024)
                self.assertEqual(hashlib.sha256(data).digest(), hashlib.sha256(model).digest())
                detach()
                at.daemon.stop()
                self.assertEqual(hashlib.sha256(self.contents(at.image, form)).digest(), hashlib.sha256(model).digest())
                self.check_image(at.image, form)

    def test_partitions(self):
        """A partition table and a file system in a partition, by the kernel's own eyes."""
        require_gantry("the reference mixes up the data of requests that come at a time")
        at = self.mount("qcow2", 64 * MIB)
        entry = struct.pack("<B3xB3xII", 0, 0x83, 2048, 65536)
        os.pwrite(at.open(), entry + bytes(48) + b"\x55\xaa", 446)
        first, count = struct.unpack("<II", os.pread(at.open(), 8, 446 + 8))
        dev = self.run_tool("losetup", "--find", "--show", "--direct-io=on", "-o", first * 512, "--sizelimit", count * 512,
                            at.path).stdout.strip()
        detach = self.undone_by("losetup", "-d", dev)
        self.run_tool("mkfs.ext4", "-q", dev)
        where, unmount = self.mounted(dev, "ext4")
        self.fill(where, 3)
        wanted = digest_of_tree(where)
        unmount()
        self.check("ext4", dev)
        where, unmount = self.mounted(dev, "ext4")
        self.assertEqual(digest_of_tree(where), wanted)
        unmount()
        detach()


if __name__ == "__main__":
    gantry_test.main()
