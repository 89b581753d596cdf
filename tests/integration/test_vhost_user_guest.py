#!/usr/bin/python3
# One configuration: booting a guest takes most of the time, and has no part of ours in it.
"""A real guest on vhost-user-blk disks: data, queues, discard, caches, a file system, a new size, a daemon that is killed under
I/O; everything is compared from outside afterwards. GANTRYD=qemu-storage-daemon proves the test itself."""

import json
import os
import pathlib
import shutil
import struct
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from guest import Guest, GuestDisk
from gantry_test import KIB, MIB

SOAK = bool(os.environ.get("GANTRY_SOAK"))
KILLS = 20 if SOAK else 2  # of the daemon under load
LOAD_SECONDS = 1.5  # after each of them
SIZE = 64 * MIB
RANDOM_AT, RANDOM_BYTES = 32 * MIB, 16 * MIB  # of each disk that `random` works on
BLOCK = 4 * KIB
FEATURE_PACKED, FEATURE_EVENT_IDX = 34, 29


def pattern(offset, length, version):
    """What `disk fill` writes."""
    if version == 0:
        return bytes(length)
    return b"".join(struct.pack("<QQ", sector, version) * 32 for sector in range(offset // 512, (offset + length) // 512))


class RealGuest(gt.Case):
    def setUp(self):
        super().setUp()
        gt.require("qemu-img", "e2fsck")
        self.logs = tempfile.mkdtemp(prefix="gt-", dir="/dev/shm")
        self.addCleanup(shutil.rmtree, self.logs, ignore_errors=True)
        self.states = {}  # disk: what `random` has left on it

    # The daemon

    def words(self):
        words = ["--mapping-logs", self.logs] if gt.IS_GANTRY else []
        for name in ("raw", "ro", "fs"):
            node = {"driver": "file", "node-name": name, "filename": self.path(name + ".raw"), "discard": "unmap",
                    "read-only": name == "ro"}
            words += ["--blockdev", json.dumps(node)]
        node = {"driver": "qcow2", "node-name": "qcow2", "discard": "unmap",
                "file": {"driver": "file", "filename": self.path("qcow2.qcow2"), "discard": "unmap"}}
        words += ["--blockdev", json.dumps(node)]
        for name, more in (("raw", {}), ("qcow2", {}), ("ro", {"writable": False}), ("fs", {"logical-block-size": 4096})):
            export = {"type": "vhost-user-blk", "id": name, "node-name": name, "writable": True, "num-queues": 2,
                      "addr": {"type": "unix", "path": self.path(name + ".sock")}, **more}
            words += ["--export", json.dumps(export)]
        return words

    def start_daemon(self):
        self.server = self.daemon(*self.words())
        self.server.qmp.socket.settimeout(60)

    def kill_and_restart(self):
        self.server.kill()
        self.start_daemon()

    # What the guest sees

    def disk(self, words, name="vda"):
        verb, rest = words.split(" ", 1) if " " in words else (words, "")
        return self.guest.run(f"disk {verb} /dev/{name} {rest}")

    def in_sysfs(self, path):
        return self.guest.run(f"cat /sys/block/{path}")

    def features(self, name):
        return self.in_sysfs(f"{name}/device/features")

    # The steps: each has a place of its own on the disks.

    def data_through_every_queue(self):
        self.assertEqual(self.in_sysfs("vda/size"), str(SIZE // 512))
        self.assertEqual(len(self.guest.run("ls /sys/block/vda/mq").split()), 2)
        jobs = [self.guest.start(f"disk fill /dev/vda {cpu * 4 * MIB} {4 * MIB} {cpu + 1} {cpu}") for cpu in (0, 1)]
        for job in jobs:
            self.guest.finish(job)
        for cpu in (0, 1):
            self.disk(f"check {cpu * 4 * MIB} {4 * MIB} {cpu + 1} {1 - cpu}")
        self.disk(f"vector {8 * MIB} 3")
        self.disk(f"fill {SIZE - KIB} 1024 4")
        self.disk(f"check {SIZE - KIB} 1024 4")
        self.disk("flush")
        self.assertEqual(self.outside(0, 8 * MIB), pattern(0, 4 * MIB, 1) + pattern(4 * MIB, 4 * MIB, 2))
        self.assertEqual(self.outside(8 * MIB, 256 * KIB), pattern(8 * MIB, 256 * KIB, 3))
        self.assertEqual(self.outside(SIZE - KIB, KIB), pattern(SIZE - KIB, KIB, 4))

    def what_the_devices_say(self):
        print(f"packed rings: {self.features('vdb')[FEATURE_PACKED]} of 1 asked for", file=sys.stderr)
        self.assertEqual(self.features("vda")[FEATURE_EVENT_IDX], "1")
        self.assertEqual([self.in_sysfs(f"{name}/queue/logical_block_size") for name in ("vda", "vdd")], ["512", "4096"])
        if gt.IS_GANTRY:
            self.assertEqual([self.in_sysfs(f"vd{letter}/serial") for letter in "abcd"], ["raw", "qcow2", "ro", "fs"])

    def caches(self):
        for kind in ("write through", "write back"):
            self.guest.run(f"echo '{kind}' >/sys/block/vda/cache_type")
            self.assertEqual(self.in_sysfs("vda/cache_type"), kind)
            self.disk(f"fill {9 * MIB} {256 * KIB} 5")
            self.disk(f"check {9 * MIB} {256 * KIB} 5")
        self.guest.run(f"dd if=/dev/zero of=/dev/vda bs=64k seek={10 * 16} count=16 conv=fsync 2>/dev/null")
        self.assertEqual(self.outside(10 * MIB, MIB), bytes(MIB))

    def discard_and_zeroes(self):
        at = 12 * MIB
        for name, path in (("vda", "raw.raw"), ("vdb", "qcow2.qcow2")):
            self.disk(f"fill {at} {6 * MIB} 6", name)
            self.disk("flush", name)
            full = os.stat(self.path(path)).st_blocks
            self.disk(f"discard {at} {2 * MIB}", name)
            self.disk(f"zero {at + 2 * MIB} {2 * MIB}", name)
            self.disk(f"punch {at + 4 * MIB} {MIB}", name)
            self.disk(f"check {at + 2 * MIB} {3 * MIB} 0", name)
            self.disk(f"check {at + 5 * MIB} {MIB} 6", name)
            self.disk("flush", name)
            self.assertLess(os.stat(self.path(path)).st_blocks, full - 2 * MIB // 512, f"{path}: nothing was given back")
        self.assertEqual(self.outside(at + 2 * MIB, 4 * MIB), bytes(3 * MIB) + pattern(at + 5 * MIB, MIB, 6))

    def read_only(self):
        self.assertEqual(self.in_sysfs("vdc/ro"), "1")
        self.disk(f"check 0 {4 * MIB} 9", "vdc")
        self.assertNotEqual(self.guest.attempt("disk fill /dev/vdc 0 4096 1")[1], 0)
        self.assertEqual(gt.checksum(self.path("ro.raw")), self.ro_checksum)

    def file_system(self):
        self.guest.run("mkfs.ext4 -F -q -b 4096 /dev/vdd && mount /dev/vdd /mnt && mkdir /mnt/many")
        self.guest.run("dd if=/dev/urandom of=/mnt/noise bs=64k count=64 2>/dev/null")
        self.guest.run("for i in $(seq 200); do echo $i >/mnt/many/$i; done; sync")
        before = self.guest.run("sha256sum /mnt/noise")
        self.guest.run("rm -r /mnt/many && fstrim /mnt && umount /mnt && mount /dev/vdd /mnt")
        self.assertEqual(self.guest.run("sha256sum /mnt/noise"), before)
        self.guest.run("umount /mnt")
        self.run_tool("e2fsck", "-fn", self.path("fs.raw"))

    def new_size(self):
        if not gt.IS_GANTRY:
            return  # qemu-storage-daemon 7.2 tells nobody
        self.server.qmp.cmd("block_resize", node_name="raw", size=SIZE + 8 * MIB)
        gt.wait_for(lambda: self.in_sysfs("vda/size") == str((SIZE + 8 * MIB) // 512), "the guest to see the new size")
        self.disk(f"fill {SIZE + 4 * MIB} {4 * MIB} 7")
        self.disk(f"check {SIZE + 4 * MIB} {4 * MIB} 7")
        self.assertEqual(self.outside(SIZE + 4 * MIB, 4 * MIB), pattern(SIZE + 4 * MIB, 4 * MIB, 7))

    def paused_and_continued(self):
        for _ in range(3):
            before = self.written("vda")
            job = self.guest.start(f"disk random /dev/vda {20 * MIB} {4 * MIB} 0.5 2 7 /tmp/paused")
            self.wait_for_writes("vda", before)
            self.guest.qmp().cmd("stop")
            self.guest.qmp().cmd("cont")
            self.guest.finish(job)
        self.assertNotIn("I/O error", self.guest.kernel_log())

    def daemon_killed_under_load(self):
        disks = {"raw": "vda", "qcow2": "vdb"} if gt.IS_GANTRY else {"raw": "vda"}  # only ours keeps its mapping
        seconds = LOAD_SECONDS * (KILLS + 1) + KILLS  # qemu comes back after a second
        jobs = {name: self.guest.start(f"disk random /dev/{disk} {RANDOM_AT} {RANDOM_BYTES} {seconds} 4 {number} /tmp/{name}")
                for number, (name, disk) in enumerate(disks.items())}
        for _ in range(KILLS):
            for disk in disks.values():
                self.wait_for_writes(disk)
            self.kill_and_restart()
        for name, job in jobs.items():
            print(f"{name}, killed {KILLS} times: {self.guest.finish(job, 300)}", file=sys.stderr)
            self.states[name] = self.guest.fetch(f"/tmp/{name}")
        self.assertNotIn("I/O error", self.guest.kernel_log())

    def written(self, disk):
        return int(self.in_sysfs(f"{disk}/stat").split()[4])

    def wait_for_writes(self, disk, before=None):
        """Until the guest has written some more, since now or since written() was `before`."""
        before = self.written(disk) if before is None else before
        gt.wait_for(lambda: self.written(disk) > before + 20, f"writes of {disk}")

    # From outside

    def outside(self, offset, length, name="raw.raw"):
        with open(self.path(name), "rb") as file:
            file.seek(offset)
            return file.read(length)

    def check_random(self, name, path):
        state = self.states[name]
        self.assertEqual(len(state), RANDOM_BYTES // BLOCK)
        for block, version in enumerate(state):
            offset = RANDOM_AT + block * BLOCK
            if self.outside(offset, BLOCK, path) != pattern(offset, BLOCK, version):
                self.fail(f"{name}: the block at {offset} is not what the guest has written last (version {version})")

    def test_everything_on_one_guest(self):
        for name in ("raw", "fs"):
            self.raw_image(name + ".raw", SIZE)
        self.raw_image("ro.raw", 4 * MIB)
        with open(self.path("ro.raw"), "r+b") as file:
            file.write(pattern(0, 4 * MIB, 9))
        self.ro_checksum = gt.checksum(self.path("ro.raw"))
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", self.path("qcow2.qcow2"), str(SIZE))
        self.start_daemon()
        self.guest = Guest(self.dir, [GuestDisk(self.path("raw.sock")), GuestDisk(self.path("qcow2.sock"), options="packed=on"),
                                      GuestDisk(self.path("ro.sock"), queues=1), GuestDisk(self.path("fs.sock"), queues=1)])
        self.addCleanup(self.guest.close)
        print(f"up after {self.guest.boot_seconds:.1f} s", file=sys.stderr)
        for step in (self.data_through_every_queue, self.what_the_devices_say, self.caches, self.discard_and_zeroes, self.read_only,
                     self.file_system, self.new_size, self.paused_and_continued, self.daemon_killed_under_load):
            begun = time.monotonic()
            with self.subTest(step.__name__):
                step()
            print(f"{step.__name__}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
        self.guest.close()
        self.server.stop()
        checked = self.run_tool("qemu-img", "check", self.path("qcow2.qcow2"), check=False)
        self.assertIn(checked.returncode, (0,) if gt.IS_GANTRY else (0, 3), checked.stdout)  # the reference leaks clusters
        self.run_tool("qemu-img", "convert", "-O", "raw", self.path("qcow2.qcow2"), self.path("plain.raw"))
        for name, path in (("raw", "raw.raw"), ("qcow2", "plain.raw")):
            if name in self.states:
                self.check_random(name, path)


if __name__ == "__main__":
    gt.main()
