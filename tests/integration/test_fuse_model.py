#!/usr/bin/python3
"""Random operations through the file of an export, against a copy in memory: every transport, raw and qcow2, any byte, growing."""

import json
import mmap
import os
import pathlib
import random
import subprocess
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from file_model import FileModel
from fuse_case import SOAK, FuseCase, at_the_same_time, ready_for, transports
from gantry_test import IS_GANTRY, KIB, MIB, require, require_gantry, text_block, wait_for

FORMATS = ("raw", "qcow2")
UNIT = 1 if IS_GANTRY else 512
OPERATIONS = 20000 if SOAK else 300
SEEDS = range(10) if SOAK else range(1)


def punches(form):
    """The reference leaves data in parts of clusters alone."""
    return IS_GANTRY or form == "raw"


class Model(FuseCase):
    def small_clusters(self, form, size, name):
        """Clusters of 4 KiB: many of them, and tables that fill."""
        if form == "raw":
            return self.make_image(form, size, name, text_block)
        raw = self.raw_image(name + ".raw", size, text_block)
        path = self.path(name + ".qcow2")
        self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
        return path

    def finish(self, at, form, data):
        """Nothing was lost, and nothing is wrong with the image."""
        at.daemon.stop()
        self.assertEqual(self.contents(at.image, form), bytes(data))
        self.check_image(at.image, form)

    def alone(self, form, name, seed, room=768 * KIB + 512, **options):
        """One file, one program, everything that fsx does."""
        label = f"{form}-{name}-{seed}-{len(options)}"
        start = room // 2 // 512 * 512
        at = self.mount(form, image=self.small_clusters(form, start, label), mountpoint=self.path("f-" + label), **options)
        passthrough = options.get("passthrough")
        # The reference mixes up the data of requests that come at a time, which is what the kernel makes of mapped writes.
        model = FileModel(at.path, seed, room=start if passthrough else room, resizes=not passthrough,
                          growable=bool(options.get("growable")), maps=IS_GANTRY, unit=UNIT,
                          punches=punches(form), size_unit=1 if form == "raw" else 512,
                          direct_unit=4096 if passthrough else 1)  # what the file system below wants
        model.run(OPERATIONS)
        model.close()
        self.finish(at, form, model.data)

    def test_one_file(self):
        for form in FORMATS:
            for name, options in transports(form).items():
                for seed in SEEDS:
                    with self.subTest(form=form, transport=name, seed=seed), ready_for(name):
                        self.alone(form, name, seed, **options)

    def test_one_growing_file(self):
        for form in FORMATS:
            for name, options in transports(form).items():
                for seed in SEEDS:
                    if name != "passthrough":
                        with self.subTest(form=form, transport=name, seed=seed), ready_for(name):
                            self.alone(form, name, 100 + seed, growable=True, **options)

    def threads(self, form, name, count=4, **options):
        """A part of the file each; what lies next to it is somebody else's."""
        size, label = 4 * MIB, f"{form}-{name}"
        at = self.mount(form, image=self.small_clusters(form, size, label), mountpoint=self.path("f-" + label), **options)
        part = size // count
        models = [FileModel(at.path, number, begin=number * part, room=part, maps=IS_GANTRY, unit=UNIT, punches=punches(form),
                            direct_unit=4096 if options.get("passthrough") else 1) for number in range(count)]
        at_the_same_time(lambda model: model.run(OPERATIONS // 2), models)
        for model in models:
            model.close()
        self.finish(at, form, b"".join(bytes(model.data) for model in models))

    def test_threads(self):
        for form in FORMATS:
            for name, options in transports(form).items():
                with self.subTest(form=form, transport=name), ready_for(name):
                    self.threads(form, name, **options)

    def test_growers_at_a_time(self):
        """Each appends its blocks at places of its own, far beyond the end; nobody cuts off what another has written."""
        for form in FORMATS:
            for name, options in transports(form).items():
                if name == "passthrough":
                    continue
                with self.subTest(form=form, transport=name), ready_for(name):
                    label = f"{form}-{name}"
                    at = self.mount(form, image=self.make_image(form, 512, label), mountpoint=self.path("f-" + label),
                                    growable=True, **options)
                    block, rounds, count = 4096, 400 if SOAK else 60, 4

                    def work(number, at=at):
                        fd = os.open(at.path, os.O_RDWR | (os.O_DIRECT if number % 2 and IS_GANTRY else 0))
                        page = mmap.mmap(-1, block)
                        for i in range(rounds):
                            index = i * count + number
                            page[:] = index.to_bytes(8, "big") * (block // 8)
                            os.pwritev(fd, [page], index * block)
                        os.close(fd)

                    at_the_same_time(work, range(count))
                    self.assertEqual(at.size(), rounds * count * block)
                    self.finish(at, form, b"".join(i.to_bytes(8, "big") * (block // 8) for i in range(rounds * count)))

    def test_other_sizes_meanwhile(self):
        """The size is changed over QMP while a program works in the part that stays."""
        require_gantry("the reference deadlocks at times")
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.small_clusters(form, 2 * MIB, form), mountpoint=self.path("f" + form))
                model = FileModel(at.path, 7, room=MIB)
                failures = []

                def work(model=model):
                    try:
                        model.run(OPERATIONS)
                    except BaseException as error:  # pylint: disable=broad-except
                        failures.append(error)

                worker = threading.Thread(target=work)
                worker.start()
                rng, size = random.Random(8), 2 * MIB
                while worker.is_alive():
                    size = rng.randrange(MIB, 4 * MIB) // 512 * 512
                    at.qmp.cmd("block_resize", {"node-name": "disk", "size": size})
                    self.assertEqual(os.stat(at.path).st_size, size)
                worker.join()
                model.close()
                for failure in failures:
                    raise failure
                at.qmp.cmd("block_resize", {"node-name": "disk", "size": MIB})
                self.finish(at, form, model.data)

    def test_cached_reading(self):
        """The kernel keeps pages: what is read is right all the same, by every call."""
        for form in FORMATS:
            for name, options in transports(form).items():
                if name == "passthrough":
                    continue
                with self.subTest(form=form, transport=name), ready_for(name):
                    size, label = 4 * MIB + 512, f"{form}-{name}"
                    image = self.make_image(form, size, label, text_block)
                    wanted = self.contents(image, form)
                    at = self.mount(form, image=image, mountpoint=self.path("f-" + label), writable=False, cached=IS_GANTRY,
                                    **options)
                    fd, rng = at.open(os.O_RDONLY), random.Random(9)
                    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:
                        for _ in range(OPERATIONS):
                            length = rng.choice((1, 511, 4096, 70000, 300000))
                            offset = rng.randrange(size)
                            self.assertEqual(os.pread(fd, length, offset), wanted[offset:offset + length])
                            self.assertEqual(view[offset:offset + length], wanted[offset:offset + length])
                    os.close(fd)
                    at.daemon.stop()

    def test_removed_while_pages_are_told_of(self):
        """A new size has the kernel drop its pages, which takes as long as they are being read; the end comes all the same."""
        require_gantry("the reference has no cached mode")
        path, overlay = self.path("file"), self.path("disk.qcow2")
        pathlib.Path(path).touch()
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", overlay, 64 * MIB)
        self._guard_mount(path)
        slow = {"driver": "null-co", "node-name": "slow", "size": 64 * MIB, "latency-ns": 200_000_000, "read-zeroes": True,
                "read-only": True}
        disk = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": overlay}, "backing": "slow"}
        daemon = self.daemon("--blockdev", json.dumps(slow), "--blockdev", json.dumps(disk), "--export", json.dumps(
            {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": path, "x-cached": True}))
        script = ("import os, sys\nfd, at = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])\n"
                  "while True:\n    os.pread(fd, 65536, at)\n    at = (at + 65536) % (64 << 20)\n")
        readers = [subprocess.Popen([sys.executable, "-c", script, path, str(i * 8 * MIB)], stderr=subprocess.DEVNULL)
                   for i in range(6)]
        for reader in readers:
            self.addCleanup(reader.wait, 20)
            self.addCleanup(reader.kill)
        (about,) = daemon.qmp.cmd("query-fuse-exports")
        wait_for(lambda: daemon.qmp.cmd("query-fuse-exports")[0]["queues"][0]["bytes-read"] > MIB, f"readers at work: {about}")
        daemon.qmp.cmd("block_resize", {"node-name": "disk", "size": 65 * MIB})
        daemon.qmp.cmd("block-export-del", id="e", mode="hard")
        for reader in readers:
            self.assertNotEqual(reader.wait(20), 0, "told that the file is gone")
        daemon.qmp.event("BLOCK_EXPORT_DELETED", id="e")


if __name__ == "__main__":
    require("qemu-img")
    gantry_test.main()
