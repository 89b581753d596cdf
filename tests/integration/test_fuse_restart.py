#!/usr/bin/python3
# One configuration: the transport that survives a restart does not depend on the loops' back end.
"""Clients of a FUSE export do not notice that its daemon was killed and another one goes on; what cannot go on ends cleanly."""

import contextlib
import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import fuse_guard
import gantry_test as gt
from fuse_case import SOAK, FuseCase
from service_manager import ServiceManager

KILLS = 100 if SOAK else 10  # of a daemon under load
BLOCK = 4096


class Restart(FuseCase):
    def setUp(self):
        super().setUp()
        gt.require_gantry("restart without losing clients")

    def words(self, image, form, path, *, iothreads=0, node=None, **export):
        options = {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": path, "writable": True}
        options.update({key.replace("_", "-"): value for key, value in export.items()})
        if iothreads:
            options["iothread"] = [f"t{i}" for i in range(iothreads)]
        return ["--fd-store", "auto", *self.iothreads(iothreads), "--control-socket", self.path("qmp"), "--blockdev",
                json.dumps(node or self.node_options(image, form, "disk")), "--export", json.dumps(options)]

    def served(self, form="raw", size=64 << 20, *, image=None, path=None, start=True, **options):
        """A manager whose service shows an image as self.path("file")."""
        image = image or self.make_image(form, size)
        path = path or self.path("file")
        pathlib.Path(path).touch()
        self._guard_mount(path)
        manager = ServiceManager(self, [gt.GANTRYD, *gt.gantryd_options()], *self.words(image, form, path, **options))
        self.addCleanup(self.remove_socket)
        manager.image, manager.path = image, path
        if start:
            manager.start()
        return manager

    def remove_socket(self):
        if os.path.exists(self.path("qmp")):
            os.unlink(self.path("qmp"))

    def qmp(self):
        q = gt.Qmp(self.path("qmp"))
        self.addCleanup(q.close)
        return q

    def again(self, manager, *arguments):
        """kill -9, and the next process."""
        manager.kill()
        self.remove_socket()
        manager.start(*arguments)

    def end(self, manager):
        manager.stop()
        self.assertEqual(fuse_guard.mounts(manager.path), [])
        self.assertEqual(manager.names(), [])  # nothing is left behind, neither there

    def fio(self, path, seconds, *more):
        words = ["fio", "--name=v", f"--filename={path}", "--ioengine=libaio", "--iodepth=16", "--direct=1", "--bs=4k",
                 "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--time_based", f"--runtime={seconds}",
                 "--allow_file_create=0", "--overwrite=1", "--output-format=terse", *more]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, cwd=self.dir)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def finish(self, fio):
        out, _ = fio.communicate(timeout=gt.DEADLINE * 4)
        self.assertEqual(fio.returncode, 0, out[-2000:])
        self.assertNotIn("verify:", out)

    # --- under load

    def kills_under_load(self, form, size, *fio_words, kills=KILLS, **options):
        manager = self.served(form, size, **options)
        rng, done = random.Random(7), 0
        while done < kills:  # a slow machine needs more than one run
            fio = self.fio(manager.path, 60 if SOAK else 2, "--rw=randwrite", *fio_words)
            while done < kills and fio.poll() is None:
                time.sleep(rng.uniform(0.02, 0.2))  # any moment
                self.again(manager)
                done += 1
            self.finish(fio)
        self.end(manager)
        self.check_image(manager.image, form)

    def test_raw(self):
        gt.require("fio")
        self.kills_under_load("raw", 64 << 20)

    def test_qcow2_that_allocates(self):
        gt.require("fio", "qemu-img")
        self.kills_under_load("qcow2", 256 << 20)

    def test_several_queues_and_clients(self):
        gt.require("fio")
        self.kills_under_load("raw", 64 << 20, "--numjobs=3", "--offset_increment=16m", "--size=16m", kills=max(4, KILLS // 3),
                              iothreads=3)

    def test_acknowledged_writes_are_there(self):
        """Each write that was answered, without any flush, is read back after each kill: the mapping log's work."""
        gt.require("qemu-img")
        manager = self.served("qcow2", 64 << 20)
        fd = self.opened(manager.path, os.O_RDWR)
        blocks, done = (64 << 20) // 65536, {}
        rng = random.Random(11)
        for number in range(KILLS):
            for _ in range(40):
                at = rng.randrange(blocks)
                data = bytes([rng.randrange(1, 256)]) * BLOCK
                self.assertEqual(os.pwrite(fd, data, at * 65536), BLOCK)
                done[at] = data
            self.again(manager)
            for at, data in done.items():
                self.assertEqual(os.pread(fd, BLOCK, at * 65536), data, f"block {at} after {number + 1} kills")
        os.close(fd)
        self.end(manager)
        self.check_image(manager.image, "qcow2")
        content = self.contents(manager.image, "qcow2")
        for at, data in done.items():
            self.assertEqual(content[at * 65536:at * 65536 + BLOCK], data)

    def test_growing_file(self):
        for form in ("raw", "qcow2"):
            with self.subTest(form):
                manager = self.served(form, 1 << 20, image=self.make_image(form, 1 << 20, name="grow"), growable=True)
                fd = self.opened(manager.path, os.O_RDWR)
                stop, errors, written = threading.Event(), [], []

                def append():
                    at = 1 << 20
                    try:
                        while not stop.is_set():
                            if os.pwrite(fd, bytes([at >> 12 & 0xff]) * BLOCK, at) != BLOCK:
                                raise OSError(errno.EIO, "short")
                            at += BLOCK
                            written.append(at)
                    except OSError as error:
                        errors.append(error)
                writer = threading.Thread(target=append)
                writer.start()
                for _ in range(4):
                    seen = len(written)
                    gt.wait_for(lambda: len(written) > seen + 20 or errors, "writes that enlarge the file")
                    self.again(manager)
                stop.set()
                writer.join(gt.DEADLINE)
                self.assertEqual(errors, [])
                end = written[-1]
                self.assertEqual(os.fstat(fd).st_size, end)
                for at in range(1 << 20, end, BLOCK):
                    self.assertEqual(os.pread(fd, BLOCK, at), bytes([at >> 12 & 0xff]) * BLOCK)
                os.close(fd)
                self.end(manager)
                self.check_image(manager.image, form)
                self.remove_socket()

    def test_truncated_again_and_again(self):
        """The size that the next process finds is one that was asked for."""
        for form in ("raw", "qcow2"):
            with self.subTest(form):
                manager = self.served(form, 1 << 20, image=self.make_image(form, 1 << 20, name="cut"))
                fd = self.opened(manager.path, os.O_RDWR)
                stop, errors, done = threading.Event(), [], []

                def truncate():
                    try:
                        while not stop.is_set():
                            size = (1 + len(done) % 8) << 20
                            os.ftruncate(fd, size)
                            done.append(size)
                            if os.fstat(fd).st_size != size:
                                raise OSError(errno.EIO, "another size")
                    except OSError as error:
                        errors.append(error)
                worker = threading.Thread(target=truncate)
                worker.start()
                rng = random.Random(17)
                for _ in range(60 if SOAK else 8):
                    seen = len(done)
                    gt.wait_for(lambda: len(done) > seen + 4 or errors, "changes of the size")
                    time.sleep(rng.uniform(0, 0.01))  # any moment
                    self.again(manager)
                stop.set()
                worker.join(gt.DEADLINE)
                self.assertEqual(errors, [])
                os.close(fd)
                self.end(manager)
                self.check_image(manager.image, form)
                self.remove_socket()

    # --- what goes along

    def test_mode_and_owner_and_open_files(self):
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        os.fchmod(fd, 0o640)
        os.fchown(fd, 12, 34)
        before = os.stat(manager.path)
        self.again(manager)
        after = os.stat(manager.path)
        self.assertEqual((after.st_mode & 0o7777, after.st_uid, after.st_gid), (0o640, 12, 34))
        self.assertEqual(after.st_dev, before.st_dev)
        self.assertGreaterEqual(after.st_mtime_ns, before.st_mtime_ns)
        q = self.qmp()
        about, = q.cmd("query-fuse-exports")
        self.assertEqual((about["id"], about["mountpoint"], about["transport"]), ("e", manager.path, "classic"))
        self.assertTrue(about["kept-for-restart"])
        self.assertNotIn("kept-reason", about)
        shown = self.run_tool(gt.GANTRY, "status", "--qmp", self.path("qmp")).stdout
        self.assertIn("survives a restart", shown)
        self.assertIn("taken over from the process before this one", shown)
        refused = q.error("block-export-del", id="e")  # the kernel knows who has it open
        self.assertIn("still in use", refused[1])
        os.close(fd)

        def removed():  # other daemons that start may be asking for a moment whether this one lives
            try:
                q.cmd("block-export-del", id="e")
            except gt.QmpError as error:
                self.assertIn("still in use", error.desc)
                return False
            return True
        gt.wait_for(removed, "nobody to have it open")
        q.event("BLOCK_EXPORT_DELETED")
        self.assertEqual(fuse_guard.mounts(manager.path), [])
        self.assertEqual([name for name in manager.names() if "fuse" in name], [])
        q.close()
        self.end(manager)

    def test_image_on_its_own_path(self):
        """Who opens the image by its name again must not enter the mount that waits for him."""
        for form in ("raw", "qcow2"):
            with self.subTest(form):
                image = self.make_image(form, 8 << 20, name="own", pattern=lambda i: bytes([i & 0xff]))
                manager = self.served(form, image=image, path=image)
                fd = self.opened(image, os.O_RDWR)
                os.pwrite(fd, b"x" * BLOCK, 1 << 20)
                for _ in range(3):
                    self.again(manager)
                    self.assertEqual(os.pread(fd, BLOCK, 1 << 20), b"x" * BLOCK)
                    os.pwrite(fd, b"y" * BLOCK, 2 << 20)
                self.assertEqual(os.pread(fd, BLOCK, 2 << 20), b"y" * BLOCK)
                os.close(fd)
                self.end(manager)
                self.check_image(image, form)
                self.remove_socket()

    def test_passthrough_goes_on(self):
        """Opens from before and after use the same file of the kernel's; it refuses two at a time."""
        if os.geteuid() != 0:
            gt.missing("naming files to the kernel needs root", installable=False)
        manager = self.served(x_passthrough=True)
        fd = self.opened(manager.path, os.O_RDWR)
        os.pwrite(fd, b"one", 0)
        for _ in range(2):
            self.again(manager)
            self.assertEqual(os.pread(fd, 3, 0), b"one")
            with open(manager.path, "r+b", buffering=0) as file:
                file.seek(4096)
                file.write(b"two")
            self.assertEqual(os.pread(fd, 3, 4096), b"two")
            q = self.qmp()
            stats = [one["stats"] for one in q.cmd("query-blockstats", query_nodes=True) if one.get("node-name") == "disk"]
            self.assertEqual(sum(one["rd_operations"] + one["wr_operations"] for one in stats), 0)
            self.assertIn("FUSE export 'e'", q.error("block-dirty-bitmap-add", node="disk", name="b")[1])
            q.close()
        os.close(fd)
        self.end(manager)
        with open(manager.image, "rb") as file:
            self.assertEqual(file.read(4099)[-3:], b"two")

    def test_requests_wait_while_nobody_serves(self):
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        os.pwrite(fd, b"before", 0)
        manager.kill()
        got = []
        reader = threading.Thread(target=lambda: got.append(os.pread(fd, 6, 0)))
        reader.start()
        reader.join(0.2)
        self.assertTrue(reader.is_alive())
        self.remove_socket()
        manager.start()
        reader.join(gt.DEADLINE)
        self.assertEqual(got, [b"before"])
        os.close(fd)
        self.end(manager)

    def test_wakings_that_the_killed_process_takes(self):
        """The kernel removes what a process has waited with some time after it has gone; until then requests wake that."""
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        manager.kill()
        self.remove_socket()
        manager.take_wakings()
        manager.start()
        for number in range(50):
            self.assertEqual(os.pwrite(fd, b"%04d" % number, 0), 4)
            self.assertEqual(os.pread(fd, 4, 0), b"%04d" % number)
        os.close(fd)
        self.end(manager)

    def test_hand_over_at_sigterm(self):
        """--hand-over: an orderly end leaves the file to the next process."""
        manager = self.served("qcow2", 32 << 20)
        manager.arguments = ["--hand-over", *manager.arguments]
        self.again(manager)
        fd = self.opened(manager.path, os.O_RDWR)
        for number in range(3):
            os.pwrite(fd, bytes([number + 1]) * BLOCK, number << 20)
            manager.stop(signal.SIGTERM)
            self.assertEqual(len(fuse_guard.mounts(manager.path)), 1)
            manager.run("qemu-img", "check", "-q", manager.image)  # it is closed properly
            manager.start()
            self.assertEqual(os.pread(fd, BLOCK, number << 20), bytes([number + 1]) * BLOCK)
        os.close(fd)
        q = self.qmp()
        q.cmd("quit")  # is no restart
        self.assertEqual(manager.wait(), 0)
        self.assertEqual(fuse_guard.mounts(manager.path), [])
        self.assertEqual(manager.names(), [])

    # --- odd moments

    def test_killed_at_any_moment_of_the_start(self):
        manager = self.served(start=False)
        rng = random.Random(3)
        for _ in range(60 if SOAK else 8):
            manager.start(ready=False)
            time.sleep(rng.uniform(0, 0.08))
            manager.kill()
            self.remove_socket()
        manager.start()
        with open(manager.path, "r+b", buffering=0) as file:
            file.write(b"still there")
            file.seek(0)
            self.assertEqual(file.read(11), b"still there")
        self.end(manager)

    def test_killed_during_removal(self):
        rng = random.Random(5)
        for _ in range(40 if SOAK else 4):
            manager = self.served()
            q = self.qmp()
            q.send(json.dumps({"execute": "block-export-del", "arguments": {"id": "e", "mode": "hard"}}))
            time.sleep(rng.uniform(0, 0.004))
            manager.kill()
            q.close()
            self.remove_socket()
            manager.start()
            with open(manager.path, "rb", buffering=0) as file:
                self.assertEqual(file.read(4), bytes(4))
            self.end(manager)
            self.remove_socket()
            os.unlink(manager.image)

    def test_unmounted_while_nobody_serves(self):
        manager = self.served()
        manager.kill()
        self.remove_socket()
        fuse_guard.detach(manager.path)
        manager.start()
        with open(manager.path, "rb", buffering=0) as file:
            self.assertEqual(file.read(4), bytes(4))
        self.end(manager)

    def test_failed_start_leaves_it_to_the_next(self):
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        os.pwrite(fd, b"kept", 0)
        manager.kill()
        for words in (["--blockdev", "file,node-name=no,filename=/nowhere", *manager.arguments],
                      [*manager.arguments, "--blockdev", "file,node-name=no,filename=/nowhere"]):
            self.remove_socket()
            manager.start(*words, ready=False)
            self.assertEqual(manager.wait(), 1)
        self.remove_socket()
        manager.start()
        self.assertEqual(os.pread(fd, 4, 0), b"kept")
        os.close(fd)
        self.end(manager)

    # --- what does not fit

    def gone(self, fd):
        """Who has the old file open hears that it is gone, at once."""
        self.assert_errno((errno.ENOTCONN, errno.ECONNABORTED), os.pread, fd, 1, 0)
        with contextlib.suppress(OSError):
            os.close(fd)

    def test_what_does_not_fit_ends_cleanly(self):
        other = self.path("elsewhere")
        pathlib.Path(other).touch()
        self._guard_mount(other)
        small, as_large = self.raw_image("small.raw", 1 << 20), self.raw_image("other.raw", 64 << 20)
        for what, change in (("another mount point", {"path": other}), ("another size", {"image": small}),
                             ("another image", {"image": as_large}),
                             ("read-only", {"writable": False}), ("another transport", {"x_transport": "uring"}),
                             ("other rights", {"allow_other": "off"})):
            with self.subTest(what):
                manager = self.served()
                fd = self.opened(manager.path, os.O_RDWR)
                manager.kill()
                self.remove_socket()
                path = change.pop("path", manager.path)
                words = self.words(change.pop("image", manager.image), "raw", path, **change)
                manager.start(*words)
                self.gone(fd)
                self.assertIn("lose their file", manager.errors())
                with open(path, "rb", buffering=0) as file:
                    self.assertEqual(file.read(4), bytes(4))
                if path != manager.path:
                    self.assertEqual(fuse_guard.mounts(manager.path), [])
                manager.path = path
                self.end(manager)
                self.remove_socket()
                os.unlink(manager.image)

    def test_aborted_while_nobody_serves(self):
        """A connection that was ended shows nothing any more: the file is mounted anew."""
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        device = os.minor(os.fstat(fd).st_dev)
        manager.kill()
        self.remove_socket()
        try:
            with open(f"/sys/fs/fuse/connections/{device}/abort", "wb", buffering=0) as file:
                file.write(b"1")
        except OSError as error:
            gt.missing(f"the kernel's control files of FUSE ({error})", installable=False)
        manager.start()
        self.gone(fd)
        with open(manager.path, "r+b", buffering=0) as file:
            file.write(b"anew")
            file.seek(0)
            self.assertEqual(file.read(4), b"anew")
        self.assertEqual(len(self.qmp().cmd("query-block-exports")), 1)
        self.end(manager)

    def test_nobody_wants_it(self):
        """The next process ends without an export of that id: the file is unmounted then."""
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        manager.kill()
        self.remove_socket()
        manager.start("--control-socket", self.path("qmp"))
        self.assertEqual(len(fuse_guard.mounts(manager.path)), 1)  # it may still come over QMP
        self.end(manager)
        self.gone(fd)
        self.assertIn("not wanted any more", manager.errors())

    def test_export_comes_over_qmp(self):
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        os.pwrite(fd, b"kept", 0)
        manager.kill()
        self.remove_socket()
        manager.start("--control-socket", self.path("qmp"))
        q = self.qmp()
        q.cmd("blockdev-add", self.node_options(manager.image, "raw", "disk"))
        q.cmd("block-export-add", {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": manager.path, "writable": True})
        self.assertEqual(os.pread(fd, 4, 0), b"kept")
        q.close()
        os.close(fd)
        self.end(manager)

    def test_hard_removal_ends_clients_at_once(self):
        manager = self.served()
        fd = self.opened(manager.path, os.O_RDWR)
        q = self.qmp()
        q.cmd("block-export-del", id="e", mode="hard")
        q.event("BLOCK_EXPORT_DELETED")
        self.gone(fd)
        q.close()
        self.end(manager)

    def test_damaged_state_is_dropped(self):
        manager = self.served()
        manager.kill()
        self.remove_socket()
        manager.ask("spoil")
        fuse_guard.detach(manager.path)
        manager.start()
        with open(manager.path, "rb", buffering=0) as file:
            self.assertEqual(file.read(4), bytes(4))
        self.assertIn("of no use", manager.errors())
        self.end(manager)

    def test_parts_that_were_lost(self):
        """A store that was full keeps some of them: the file goes on, or is mounted anew; the image is served in any case."""
        for kind, count, goes_on in (("covered", 1, True), ("device", 1, True), ("device", 3, False), ("state", 1, False),
                                     ("log", 1, True)):
            with self.subTest(kind, count=count):
                manager = self.served("qcow2", 16 << 20, iothreads=3)
                fd = self.opened(manager.path, os.O_RDWR)
                os.pwrite(fd, b"kept", 0)
                os.fsync(fd)
                manager.kill()
                self.remove_socket()
                manager.ask("lose", kind, count)
                manager.start()
                if goes_on:
                    self.assertEqual(os.pread(fd, 4, 0), b"kept")
                    os.close(fd)
                else:
                    self.gone(fd)
                with open(manager.path, "r+b", buffering=0) as file:
                    self.assertEqual(file.read(4), b"kept")
                    self.assertEqual(file.write(b"anew"), 4)
                self.end(manager)
                self.check_image(manager.image, "qcow2")
                self.remove_socket()
                os.unlink(manager.image)

    def test_switched_off(self):
        manager = self.served(start=False)
        manager.arguments = ["--fd-store", "off", *manager.arguments[2:]]
        manager.start()
        self.assertEqual(manager.names(), [])
        about, = self.qmp().cmd("query-fuse-exports")
        self.assertFalse(about["kept-for-restart"])
        self.assertEqual(about["kept-reason"], "--fd-store=off")
        fd = self.opened(manager.path, os.O_RDWR)
        os.pread(fd, 4096, 0)
        queues = self.qmp().cmd("query-fuse-exports")[0]["queues"]
        self.assertGreater(sum(queue["requests"] for queue in queues), 0)
        self.assertEqual(sum(queue["bytes-read"] for queue in queues), 4096)
        manager.kill()
        self.remove_socket()
        self.gone(fd)
        manager.start()  # the stale mount is cleaned
        with open(manager.path, "rb", buffering=0) as file:
            self.assertEqual(file.read(4), bytes(4))
        self.end(manager)


if __name__ == "__main__":
    gt.main()
