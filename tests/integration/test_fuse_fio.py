#!/usr/bin/python3
"""Programs at full load on the file of an export: what they write is what they read, and every end of it ends them, too."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import fuse_guard
import gantry_test
from fuse_case import SOAK, FuseCase, at_the_same_time, ready_for, transports
from fuse_load import Load
from gantry_test import IS_GANTRY, KIB, MIB, require, require_gantry, wait_for

FORMATS = ("raw", "qcow2")
SIZE = 32 * MIB
SELDOM = {("raw", "uring"), ("raw", "queues")}  # what qcow2 does on them raw does, too
GONE = {"ENOTCONN", "EIO", "ECONNABORTED", "ECANCELED", "close ENOTCONN", "close EIO", "close ECONNABORTED"}


class FioCase(FuseCase):
    def fio(self, at, engine="psync", depth=1, jobs=1, size=8 * MIB, rw="randwrite", direct=1, verify=True, more=()):
        """The words of a fio that checks what it reads; each job has a part of the file."""
        words = ["fio", "--name=v", f"--filename={at.path}", f"--rw={rw}", f"--ioengine={engine}", f"--iodepth={depth}",
                 f"--numjobs={jobs}", f"--size={size}", f"--offset_increment={size}", f"--direct={direct}", "--thread",
                 "--randrepeat=1", "--randseed=7", "--group_reporting", "--allow_file_create=0", *more]
        if not any(word.startswith("--bs") for word in more):
            words.append("--bsrange=512-128k")
        if verify:
            words += ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]
        return words

    def verify(self, at, **options):
        self.run_tool(*self.fio(at, **options), deadline=600 if SOAK else 60)

    def finish(self, at, form):
        at.daemon.stop()
        self.check_image(at.image, form)


class Verify(FioCase):
    def setUp(self):
        super().setUp()
        require("fio", "qemu-img")

    def test_engines(self):
        kinds = [(engine, depth, jobs) for engine, depths in (("psync", (1,)), ("libaio", (1, 32)), ("io_uring", (1, 32)))
                 for depth in depths for jobs in (1, 4)]
        chosen = (("psync", 1, 4), ("libaio", 32, 1), ("libaio", 1, 4), ("io_uring", 32, 4))
        for form in FORMATS:
            for engine, depth, jobs in kinds if SOAK else chosen:
                with self.subTest(form=form, engine=engine, depth=depth, jobs=jobs):
                    if jobs * depth > 1 and not IS_GANTRY:
                        require_gantry("the reference mixes up the data of requests that come at a time")
                    label = f"{form}-{engine}-{depth}-{jobs}"
                    at = self.mount(form, image=self.make_image(form, SIZE, label), mountpoint=self.path("f-" + label))
                    self.verify(at, engine=engine, depth=depth, jobs=jobs, size=(64 if SOAK else 6) * MIB if jobs == 1 else
                                (8 if SOAK else 3) * MIB)
                    self.finish(at, form)

    def test_transports(self):
        for form in FORMATS:
            for name, options in transports(form).items():
                if not SOAK and (form, name) in SELDOM:
                    continue
                with self.subTest(form=form, transport=name), ready_for(name):
                    if not IS_GANTRY:
                        require_gantry("the reference mixes up the data of requests that come at a time")
                    label = f"{form}-{name}"
                    at = self.mount(form, image=self.make_image(form, SIZE, label), mountpoint=self.path("f-" + label), **options)
                    self.verify(at, engine="io_uring", depth=16, jobs=4, size=3 * MIB)
                    self.verify(at, engine="libaio", depth=8, size=16 * MIB, more=["--bs=1m"])
                    self.verify(at, engine="psync", jobs=2, size=MIB, direct=0, rw="randrw")
                    self.finish(at, form)

    def test_any_byte(self):
        require_gantry("the reference mixes up the data of requests that come at a time")
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form), mountpoint=self.path("f" + form))
                self.verify(at, engine="io_uring", depth=16, jobs=2, size=3 * MIB, direct=0,
                            more=["--bsrange=100-20000", "--bs_unaligned=1"])
                self.finish(at, form)

    def test_changes_meanwhile(self):
        """Everything that makes the node quiet for a moment."""
        require_gantry("the reference mixes up the data of requests that come at a time")
        for form in FORMATS:
            for name, options in transports(form).items():
                if name == "passthrough" or not SOAK and (form, name) in SELDOM:
                    continue
                with self.subTest(form=form, transport=name), ready_for(name):
                    label = f"{form}-{name}"
                    at = self.mount(form, image=self.make_image(form, SIZE, label), mountpoint=self.path("f-" + label), **options)
                    load = Load(self, at.path, threads=4, count=300, direct=True).under_way(10)
                    for i in range(100 if SOAK else 8):
                        at.qmp.cmd("block_resize", {"node-name": "disk", "size": SIZE + (i + 1) * 512})
                        at.qmp.cmd("block-dirty-bitmap-add", {"node": "disk", "name": "b"})
                        load.under_way(3)
                        at.qmp.cmd("block-dirty-bitmap-remove", {"node": "disk", "name": "b"})
                        definition = {**self.node_options(at.image, form, "disk"), "discard": "ignore" if i % 2 else "unmap"}
                        at.qmp.cmd("blockdev-reopen", {"options": [definition]})
                        if form == "qcow2":
                            at.qmp.cmd("blockdev-snapshot-internal-sync", {"device": "disk", "name": f"s{i}"})
                            load.under_way(3)
                            if i % 2:
                                at.qmp.cmd("blockdev-snapshot-delete-internal-sync", {"device": "disk", "name": f"s{i}"})
                    load.stop()
                    at.daemon.stop()
                    load.check(self.contents(at.image, form), 1)
                    self.check_image(at.image, form)


class Ends(FioCase):
    def start(self, form, name, options, **more):
        label = f"{form}-{name}"
        at = self.mount(form, image=self.make_image(form, SIZE, label), mountpoint=self.path("f-" + label), **options, **more)
        return at, Load(self, at.path, threads=3).under_way()

    def each(self, body, *more, formats=FORMATS, without=()):
        for form in formats:
            for name, options in transports(form).items():
                if name not in without and (SOAK or (form, name) not in SELDOM):
                    with self.subTest(form=form, transport=name), ready_for(name):
                        body(form, name, options, *more)

    def assert_gone(self, result):
        """Whoever was at work got an error that says so."""
        self.assertTrue(result and set(result) <= GONE, result)

    def test_killed(self):
        self.each(self.killed)

    def killed(self, form, name, options):
        at, load = self.start(form, name, options)
        at.daemon.kill()
        if name == "passthrough":
            load.process.send_signal(signal.SIGTERM)  # the kernel goes on with the file itself
            load.result()
        else:
            self.assert_gone(load.result())
        self.assertTrue(at.is_mounted(), "the mount of a dead daemon stays")
        self.assert_errno((errno.ENOTCONN, errno.ECONNABORTED), os.stat, at.path)
        if not IS_GANTRY:
            fuse_guard.detach(at.path)
        again = self.mount(form, image=at.image, mountpoint=at.path, **options)
        self.assertEqual(len(fuse_guard.mounts(at.path)), 1, "the mount of the dead daemon is gone")
        with open(again.path, "rb") as file:
            load.check(file.read(), 2)
        more = Load(self, again.path).under_way()
        more.stop()
        again.daemon.stop()
        more.check(self.contents(at.image, form), 1)
        if IS_GANTRY:
            self.check_image(at.image, form)

    def test_killed_with_writethrough(self):
        """Every write that was answered is there, flushed by the client or not."""
        for form in FORMATS:
            with self.subTest(form=form):
                at, load = self.start(form, "through", {}, writethrough=True)
                at.daemon.kill()
                self.assert_gone(load.result())
                fuse_guard.detach(at.path)
                self.run_tool("qemu-img", "check", "-q", "-r", "all", at.image, check=False)  # leaks of the reference
                load.check(self.contents(at.image, form), 1)

    def removed(self, at, load, form):
        """The export is gone, its client knows, the daemon serves the node all the same."""
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertFalse(at.is_mounted())
        self.assertEqual(os.stat(at.path).st_size, 0, "what was covered")
        self.assertEqual(at.qmp.cmd("query-block-exports"), [])

    def test_removed_hard(self):
        require_gantry("the reference has no hard removal that does not wait")
        self.each(self.removed_hard, without=("passthrough",))

    def removed_hard(self, form, name, options):
        at, load = self.start(form, name, options)
        kind, text = at.qmp.error("block-export-del", id="e")
        self.assertEqual(kind, "GenericError")
        self.assertIn("still in use", text)
        load.under_way(5)
        at.qmp.cmd("block-export-del", id="e", mode="hard")
        self.assert_gone(load.result())
        self.removed(at, load, form)
        # The same node again, at the same place.
        at.qmp.cmd("block-export-add", {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": at.path,
                                        "writable": True})
        with open(at.path, "rb") as file:
            load.check(file.read(), 1)
        at.daemon.stop()
        load.check(self.contents(at.image, form), 1)
        self.check_image(at.image, form)

    def test_unmounted_lazily(self):
        """Who has it open works on; the export ends with the last of them."""
        require_gantry("the reference ends at once")
        self.each(self.unmounted_lazily, without=("passthrough",))

    def unmounted_lazily(self, form, name, options):
        at, load = self.start(form, name, options)
        fuse_guard.detach(at.path)
        self.assertEqual(os.stat(at.path).st_size, 0, "what was covered")
        load.under_way()
        load.stop()
        self.removed(at, load, form)
        at.daemon.stop()
        load.check(self.contents(at.image, form), 1)
        self.check_image(at.image, form)

    def test_quit_and_sigterm(self):
        for how in ("quit", "SIGTERM"):
            self.each(self.ended, how, without=("passthrough",))

    def ended(self, form, name, options, how):
        at, load = self.start(form, name + how, options)
        if how == "quit":
            at.qmp.cmd("quit")
            self.assertEqual(at.daemon.wait(), 0)
        else:
            at.daemon.stop()
        self.assert_gone(load.result())
        self.assertFalse(at.is_mounted())
        load.check(self.contents(at.image, form), 1)
        self.check_image(at.image, form)

    def test_clients_are_killed(self):
        """In the middle of large requests, of mapped pages, of everything."""
        self.each(self.clients_killed)

    HEAVY = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | (os.O_DIRECT if sys.argv[2] == "direct" else 0))
page = mmap.mmap(-1, 8 << 20)
page[:] = b"k" * len(page)
view = mmap.mmap(fd, 0)
print("begins", flush=True)
while True:
    os.pwritev(fd, [page], 1 << 20)
    os.preadv(fd, [page], (1 << 20) + 4096)
    view[9 << 20:10 << 20] = b"m" * (1 << 20)
    if sys.argv[2] == "sync":
        os.fsync(fd)
"""

    def clients_killed(self, form, name, options):
        label = f"{form}-{name}"
        at = self.mount(form, image=self.make_image(form, SIZE, label), mountpoint=self.path("f-" + label), **options)
        for i in range(100 if SOAK else 3):
            client = subprocess.Popen([sys.executable, "-c", self.HEAVY, at.path, ("direct", "sync", "plain")[i % 3]],
                                      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            self.addCleanup(client.stdout.close)
            self.addCleanup(client.kill)
            client.stdout.readline()
            load = Load(self, at.path, threads=1, count=4).under_way(10 + 5 * i)  # beside what it works on
            client.kill()
            wait_for(lambda c=client: c.poll() is not None, "a client that was killed to end")
            load.kill()
        with open(at.path, "rb") as file:
            self.assertEqual(len(file.read()), SIZE)
        at.qmp.delete_export("e")  # nobody has it open any more
        self.finish(at, form)

    def test_opens_and_closes(self):
        self.each(self.opened_and_closed, formats=("raw",))

    def opened_and_closed(self, form, name, options):
        at = self.mount(form, image=self.make_image(form, SIZE, name), mountpoint=self.path("f-" + name), **options)
        rounds = 3000 if SOAK else 250

        def work(number):
            for i in range(rounds):
                fd = os.open(at.path, os.O_RDWR)
                os.pwrite(fd, bytes([i % 256]) * 512, number * 512)
                self.assertEqual(os.pread(fd, 512, number * 512), bytes([i % 256]) * 512)
                os.close(fd)

        at_the_same_time(work, range(4))
        at.qmp.delete_export("e")
        wait_for(lambda: not at.is_mounted(), "the mount to go")
        at.daemon.stop()


if __name__ == "__main__":
    gantry_test.main()
