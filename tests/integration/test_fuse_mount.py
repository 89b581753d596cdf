#!/usr/bin/python3
"""Where an export can be mounted, by whom, and how it ends. What happens to data: test_fuse_file.py, test_fuse_sizes.py."""
# One configuration: nothing of it depends on how loops do their I/O.

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import unittest.mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import fuse_case
import fuse_guard
import gantry_test
from fuse_case import Daemon, FuseCase, Mounted
from gantry_test import GANTRYD, MIB, require, require_gantry, wait_for

SIZE = 4 * MIB
USER = 65534  # nobody in particular
DEADLOCK = "Resource deadlock avoided; it is FUSE export 'e' of this process"


class MountCase(FuseCase):
    def export(self, daemon, mountpoint, id="e2", **more):
        self._guard_mount(mountpoint)
        self.addCleanup(self._end_quietly, daemon)  # before the mount is looked for
        daemon.qmp.cmd("block-export-add", {"type": "fuse", "id": id, "node-name": "disk", "mountpoint": mountpoint, **more})

    def refusal(self, qmp, mountpoint, id="e2", **more):
        return qmp.error("block-export-add", {"type": "fuse", "id": id, "node-name": "disk", "mountpoint": mountpoint, **more})[1]

    def unserved(self, form="raw"):
        """A daemon with a node and no export."""
        image = self.make_image(form, SIZE)
        return self.daemon("--blockdev", json.dumps({**self.node_options(image, form, "disk"), "read-only": True}))

    def touch(self, name, mode=0o600):
        path = self.path(name)
        pathlib.Path(path).touch(mode)
        return path

    def wrapped(self, script):
        """Daemons are started by a shell script that ends with `exec ... "$@"`, $0 being gantryd."""
        path = self.path("wrapper")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"#!/bin/sh\nset -e\n{script.replace('GANTRYD', GANTRYD)}\n")
        os.chmod(path, 0o755)
        self.enterContext(unittest.mock.patch.object(gantry_test, "GANTRYD", path))


class Rules(MountCase):
    """spec/fuse.md section 1, "Mount point rules"."""

    def test_what_is_no_file(self):
        daemon = self.unserved()
        missing = self.path("missing")
        self.assertEqual(self.refusal(daemon.qmp, missing), f"Failed to stat '{missing}': No such file or directory")
        os.symlink("missing", self.path("dangling"))
        self.assertIn("No such file", self.refusal(daemon.qmp, self.path("dangling")))
        for path in (self.dir, "/dev/null"):
            self.assertRegex(self.refusal(daemon.qmp, path), f"^'{path}' is not a regular file")
        self.assertEqual(daemon.qmp.cmd("query-block-exports"), [])

    def test_one_export_a_file(self):
        at = self.mount("raw", SIZE)
        self.assertIn(f"There already is a FUSE export on '{at.path}'", self.refusal(at.qmp, at.path))
        self.assertEqual(len(fuse_guard.mounts(at.path)), 1)
        require_gantry("the reference compares names alone")
        os.symlink(at.path, self.path("link"))
        os.mkdir(self.path("sub"))
        for alias in (self.path("link"), self.path("sub/../file")):
            self.assertIn("it is FUSE export 'e'", self.refusal(at.qmp, alias))
        if os.geteuid() == 0:
            bound = self.touch("bound")
            self.undone_by("umount", bound)
            self.run_tool("mount", "--bind", at.path, bound)
            self.assertIn("it is FUSE export 'e'", self.refusal(at.qmp, bound))
        self.assertEqual(len(fuse_guard.mounts(at.path)), 1)

    def test_a_link_leads_to_what_is_covered(self):
        target = self.touch("target")
        os.symlink("target", self.path("link"))
        daemon = self.unserved()
        self._guard_mount(target)
        self.addCleanup(self._end_quietly, daemon)
        self.export(daemon, self.path("link"))
        self.assertTrue(fuse_guard.mounts(target))
        self.assertTrue(stat.S_ISLNK(os.lstat(self.path("link")).st_mode))
        self.assertEqual(os.stat(self.path("link")).st_size, SIZE)
        daemon.qmp.delete_export("e2")
        self.assertEqual(os.stat(target).st_size, 0)

    def test_a_living_export_of_another_process(self):
        require_gantry("the reference mounts over it")
        at = self.mount("raw", SIZE)
        other = self.daemon("--blockdev", "driver=null-co,node-name=disk,size=1048576")
        self.assertIn("another process serves it", self.refusal(other.qmp, at.path))
        self.assertEqual(at.size(), SIZE)

    def test_two_daemons_at_the_same_time(self):
        """One of them gets it, and the other covers nothing."""
        require_gantry("the reference mounts over it")
        null = ("--blockdev", "driver=null-co,node-name=disk,size=1048576")
        daemons = [self.daemon(*null) for _ in range(2)]
        path = self.touch("both")
        self._guard_mount(path)
        for daemon in daemons:
            self.addCleanup(self._end_quietly, daemon)
        for _ in range(8):
            for daemon in daemons:
                daemon.qmp.send(json.dumps({"execute": "block-export-add", "arguments": {
                    "type": "fuse", "id": "e", "node-name": "disk", "mountpoint": path}}))
            answers = [daemon.qmp.receive() for daemon in daemons]
            self.assertEqual(sum("return" in answer for answer in answers), 1, answers)
            self.assertIn("another process serves it", next(a for a in answers if "error" in a)["error"]["desc"])
            self.assertEqual(len(fuse_guard.mounts(path)), 1)
            daemons[0 if "return" in answers[0] else 1].qmp.delete_export("e")
            self.assertEqual(fuse_guard.mounts(path), [])

    def test_a_frozen_daemon_holds_up_nobody(self):
        require_gantry("the reference waits for it")
        at = self.mount("raw", SIZE)
        gantry_test.freeze(at.daemon.process)
        self.addCleanup(at.daemon.process.send_signal, signal.SIGCONT)
        other = self.touch("other")
        self._guard_mount(other)
        daemon = self.daemon("--blockdev", "driver=null-co,node-name=disk,size=1048576", "--export",
                             f"fuse,id=e,node-name=disk,mountpoint={other}")
        self.assertIn("another process serves it", self.refusal(daemon.qmp, at.path))
        self.assertEqual(os.stat(other).st_size, MIB)
        self.assertTrue(at.is_mounted())
        at.daemon.process.send_signal(signal.SIGCONT)
        self.assertEqual(at.size(), SIZE)

    def test_how_it_is_mounted(self):
        at = self.mount("raw", SIZE, writable=False)
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            (line,) = [line for line in table if f" {at.path} " in line]
        flags, _, (kind, source, options) = (line.split()[5].split(","), None, line.split(" - ")[1].split())
        for flag in ("nosuid", "nodev"):
            self.assertIn(flag, flags)
        self.assertIn("default_permissions", options)
        require_gantry("names of our own")
        self.assertIn("ro", flags)
        self.assertEqual((kind, source), ("fuse.gantry", "gantry:e"))
        self.assertIn("max_read=1048576", options)


class OwnPath(MountCase):
    """The image lies below its own export: nothing that goes by its name may wait for us."""

    def setUp(self):
        super().setUp()
        require_gantry("the reference waits for itself when it looks at its own mount")

    def own_path(self, form, **more):
        image = self.make_image(form, SIZE, pattern=gantry_test.text_block)
        return self.mount(form, image=image, mountpoint=image, **more)

    def test_content_and_end(self):
        for form in ("raw", "qcow2"):
            with self.subTest(form):
                at = self.own_path(form)
                expected = b"".join((gantry_test.text_block(i) or bytes(65536)) for i in range(SIZE // 65536))
                with open(at.path, "r+b", buffering=0) as file:
                    self.assertEqual(file.read(SIZE), expected)
                    os.pwrite(file.fileno(), b"written", 1000)
                at.daemon.stop()
                self.assertFalse(at.is_mounted())
                self.assertEqual(self.contents(at.path, form)[1000:1007], b"written")
                self.check_image(at.path, form)
                os.unlink(at.path)

    def test_resize_and_reopen(self):
        for form in ("raw", "qcow2"):
            with self.subTest(form):
                at = self.own_path(form)
                at.qmp.cmd("block_resize", {"node-name": "disk", "size": 2 * SIZE})
                self.assertEqual(at.size(), 2 * SIZE)
                options = self.node_options(at.image, form, "disk")
                if form == "qcow2":
                    child = [n["node-name"] for n in at.qmp.cmd("query-named-block-nodes") if n["drv"] == "file"][0]
                    options["file"] = child
                at.qmp.cmd("blockdev-reopen", {"options": [options]})
                cache = {"cache": {"direct": True}}
                if form == "raw":
                    at.qmp.cmd("blockdev-reopen", {"options": [{**options, **cache}]})
                with open(at.path, "r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), b"after", SIZE + 5)
                    self.assertEqual(os.pread(file.fileno(), 7, SIZE + 4), b"\0after\0")
                at.daemon.stop()
                self.check_image(at.path, form)
                os.unlink(at.path)

    def test_becoming_writable(self):
        """The image is opened again for writing below its living read-only export."""
        image = self.make_image("raw", SIZE)
        daemon = self.daemon("--blockdev", json.dumps({"driver": "file", "node-name": "disk", "filename": image,
                                                       "auto-read-only": True}))
        self.export(daemon, image, "r")
        second = self.touch("second")
        self.export(daemon, second, "w", writable=True)
        with open(second, "r+b", buffering=0) as file:
            file.write(b"through the other")
        daemon.qmp.delete_export("w")
        with open(image, "rb", buffering=0) as file:
            self.assertEqual(file.read(17), b"through the other")
        daemon.qmp.delete_export("r")

    def test_queries(self):
        for form in ("raw", "qcow2"):
            with self.subTest(form):
                at = self.own_path(form)
                nodes = {node["node-name"]: node for node in at.qmp.cmd("query-named-block-nodes")}
                self.assertEqual(nodes["disk"]["image"]["filename"], at.path)
                self.assertEqual(nodes["disk"]["image"]["virtual-size"], SIZE)
                at.qmp.cmd("query-blockstats", {"query-nodes": True})
                at.daemon.stop()
                os.unlink(at.path)

    def test_what_goes_by_its_name(self):
        at = self.own_path("raw")
        os.symlink(at.path, self.path("link"))
        for path in (at.path, self.path("link")):
            for driver in ("file", "host_device"):
                self.assertIn(DEADLOCK, at.qmp.error("blockdev-add", {"driver": driver, "node-name": "again", "filename": path})[1])
        overlay = self.path("overlay.qcow2")
        self.make_overlay(overlay, at.path)
        for policy in ("below", "beside"):
            with self.subTest(policy):
                error = at.qmp.error("blockdev-add", {"driver": "qcow2", "node-name": "o", "file": {
                    "driver": "file", "filename": overlay}})[1]
                self.assertIn("Resource deadlock avoided", error)
        self.assertIn("Resource deadlock avoided", self.creation_error(at.qmp, {"driver": "file", "filename": at.path, "size": MIB}))
        self.assertEqual(at.size(), SIZE)

    def make_overlay(self, overlay, backing):
        """Made while nothing is there: qemu-img looks at it."""
        require("qemu-img")
        self.run_tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", overlay, str(SIZE))

    def creation_error(self, qmp, options):
        qmp.cmd("blockdev-create", {"job-id": "c", "options": options})
        job = wait_for(lambda: [j for j in qmp.cmd("query-jobs") if j["id"] == "c" and j["status"] == "concluded"], "the job")[0]
        qmp.cmd("job-dismiss", id="c")
        return job["error"]

    def test_references_within_a_directory(self):
        image = self.make_image("raw", SIZE)
        overlay = self.path("overlay.qcow2")
        self.make_overlay(overlay, image)
        at = self.mount("raw", image=image, mountpoint=image, words=["--image-references", self.dir])
        error = at.qmp.error("blockdev-add", {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": overlay}})[1]
        self.assertIn("Resource deadlock avoided", error)

    def test_a_lock_that_a_client_holds_here(self):
        """Who holds a lock is looked for among the descriptors of all processes; ours lead back to us."""
        at = self.own_path("raw")
        image = self.raw_image("locked.raw", MIB)
        fd = at.open()
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 100, 200, 0))
        holder = os.open(image, os.O_RDWR)
        self.addCleanup(os.close, holder)
        fcntl.fcntl(holder, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0))
        at.qmp.cmd("blockdev-add", {"driver": "file", "node-name": "locked", "filename": image, "read-only": True})
        error = at.qmp.error("block-export-add", {"type": "fuse", "id": "l", "node-name": "locked", "mountpoint": self.touch("l")})[1]
        self.assertIn(f"process {os.getpid()}", error)


class Removal(MountCase):
    def test_safe_and_hard(self):
        require_gantry("the reference removes a file that is in use in either mode")
        at = self.mount("raw", SIZE)
        fd = at.open()
        self.assertIn("still in use", at.qmp.error("block-export-del", id="e")[1])
        os.pwrite(fd, b"still there", 0)
        at.qmp.cmd("block-export-del", id="e", mode="hard")
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertFalse(at.is_mounted())
        self.assert_errno((errno.ENOTCONN, errno.EIO, errno.ECONNABORTED), os.pread, fd, 1, 0)
        with contextlib.suppress(OSError):
            os.close(fd)
        self.assertEqual(at.qmp.cmd("query-block-exports"), [])
        with open(at.image, "rb") as file:
            self.assertEqual(file.read(11), b"still there")
        # The place and the id are free again.
        self.export(at.daemon, at.path, "e")
        at.qmp.delete_export("e")

    def test_safe_without_clients(self):
        at = self.mount("raw", SIZE)
        at.qmp.delete_export("e")
        wait_for(lambda: not at.is_mounted(), "the mount to go")

    def test_unmounted_by_somebody(self):
        at = self.mount("qcow2", SIZE)
        with open(at.path, "r+b", buffering=0) as file:
            file.write(b"before")
        self.run_tool("umount" if os.geteuid() == 0 else "fusermount3", *([] if os.geteuid() == 0 else ["-u"]), at.path)
        require_gantry("the reference keeps the export")
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertEqual(at.qmp.cmd("query-block-exports"), [])
        self.export(at.daemon, at.path, "again")
        with open(at.path, "rb", buffering=0) as file:
            self.assertEqual(file.read(6), b"before")

    def test_unmounted_lazily_while_in_use(self):
        require_gantry("the reference keeps the export")
        fuse_case.need_root("umount -l")
        at = self.mount("raw", SIZE)
        fd = at.open()
        self.run_tool("umount", "-l", at.path)
        os.pwrite(fd, b"served to the end", 0)
        self.assertEqual(os.pread(fd, 17, 0), b"served to the end")
        self.assertEqual(len(at.qmp.cmd("query-block-exports")), 1)
        os.close(fd)
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")

    def test_aborted(self):
        require_gantry("the reference keeps the export")
        if not fuse_case.mount_fusectl():
            gantry_test.missing("needs fusectl", installable=False)
        at = self.mount("raw", SIZE)
        fd = at.open()
        self.assertTrue(fuse_guard.abort(at.path))
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assert_errno((errno.ENOTCONN, errno.ECONNABORTED), os.pread, fd, 1, 0)
        wait_for(lambda: not at.is_mounted(), "the mount to go")

    def test_somebody_mounts_over_it(self):
        require_gantry("the reference unmounts whatever is on top")
        fuse_case.need_root("mount --bind")
        at = self.mount("raw", SIZE)
        other = self.touch("other")
        self.run_tool("mount", "--bind", other, at.path)
        at.qmp.cmd("block-export-del", id="e", mode="hard")
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertEqual(len(fuse_guard.mounts(at.path)), 2, "the other's stays, and what it covers")
        self.assertEqual(os.stat(at.path).st_size, 0)
        self.run_tool("umount", at.path)
        self.run_tool(gantry_test.GANTRY, "umount", at.path, check=False)
        self.assertFalse(at.is_mounted())

    def test_somebody_mounts_over_it_in_a_container(self):
        """There the kernel's control files are not to be seen, and rings end by an abort alone."""
        require_gantry("the reference has no rings")
        require("unshare", "nsenter")
        fuse_case.need_root("mount --bind")
        if not fuse_case.gantryd_is_on_io_uring():
            self.skipTest("rings need io_uring")
        self.enterContext(fuse_case.uring_enabled())
        self.wrapped("exec unshare -m --propagation private sh -c "
                     '"umount /sys/fs/fuse/connections || :; exec GANTRYD \\"\\$@\\"" sh "$@"')
        image, path, other = self.make_image("raw", SIZE), self.touch("file"), self.touch("other")
        daemon = self.daemon("--blockdev", json.dumps(self.node_options(image, "raw", "disk")), "--export",
                             f"fuse,id=e,node-name=disk,mountpoint={path},x-transport=uring")
        inside = ["nsenter", "-t", str(daemon.process.pid), "-m"]
        self.assertEqual(self.run_tool(*inside, "stat", "-c", "%s", path).stdout, f"{SIZE}\n")
        self.run_tool(*inside, "mount", "--bind", other, path)
        daemon.qmp.cmd("block-export-del", id="e", mode="hard")
        daemon.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        mounts = self.run_tool(*inside, "grep", path, "/proc/self/mountinfo").stdout.splitlines()
        self.assertEqual(len(mounts), 2, "the other's stays, and what it covers")
        self.assertEqual(self.run_tool(*inside, "stat", "-c", "%s", path).stdout, "0\n")


class Stale(MountCase):
    """What a killed daemon leaves."""

    def leave(self, **more):
        at = self.mount("raw", SIZE, **more)
        with open(at.path, "r+b", buffering=0) as file:
            file.write(b"from before")
            os.fsync(file.fileno())
        at.daemon.kill()
        # What was asked at the moment of its death has another error. A daemon of another test may clean it away.
        wait_for(lambda: self.stat_error(at.path) == errno.ENOTCONN or not at.is_mounted(), "the end of the connection")
        return at

    @staticmethod
    def stat_error(path):
        try:
            os.stat(path)
            return 0
        except OSError as error:
            return error.errno

    def again(self, image, path):
        self._guard_mount(path)
        self.daemon("--blockdev", json.dumps(self.node_options(image, "raw", "disk")), "--export",
                    f"fuse,id=e,node-name=disk,mountpoint={path}")
        with open(path, "rb", buffering=0) as file:
            self.assertEqual(file.read(11), b"from before")
        self.assertEqual(len(fuse_guard.mounts(path)), 1)

    def test_the_next_daemon_takes_the_place(self):
        require_gantry("the reference cannot")
        at = self.leave()
        self.again(at.image, at.path)

    def test_the_image_itself(self):
        """Its name leads nowhere until the mount is gone."""
        require_gantry("the reference cannot")
        image = self.make_image("raw", SIZE)
        self.leave(image=image, mountpoint=image)
        self.again(image, image)

    def test_over_qmp(self):
        require_gantry("the reference cannot")
        at = self.leave()
        daemon = self.daemon("--blockdev", "driver=null-co,node-name=disk,size=1048576")
        self.export(daemon, at.path)
        self.assertEqual(os.stat(at.path).st_size, MIB)
        self.assertEqual(len(fuse_guard.mounts(at.path)), 1)

    def test_opening_what_lies_below(self):
        """Without an export nobody cleans; the error says how to."""
        require_gantry("a hint of ours")
        image = self.make_image("raw", SIZE)
        at = self.leave(image=image, mountpoint=image)
        daemon = self.daemon()
        try:
            daemon.qmp.cmd("blockdev-add", {"driver": "file", "node-name": "below", "filename": image})
            self.assertFalse(at.is_mounted(), "a daemon of another test has cleaned it away, else it cannot be opened")
        except gantry_test.QmpError as error:
            self.assertIn(f"Transport endpoint is not connected; a daemon that is gone has left its mount there: 'gantry umount {image}'",
                          error.desc)
        self.run_tool(gantry_test.GANTRY, "umount", image, check=False)
        self.assertFalse(at.is_mounted())

    def test_by_the_way(self):
        """An export elsewhere has them cleaned, too."""
        require_gantry("the reference cannot")
        at = self.leave()
        other = self.touch("other")
        self._guard_mount(other)
        self.daemon("--blockdev", "driver=null-co,node-name=disk,size=1048576", "--export", f"fuse,id=e,node-name=disk,mountpoint={other}")
        wait_for(lambda: not at.is_mounted(), "the old mount to go")
        self.assertEqual(os.stat(other).st_size, MIB)


@contextlib.contextmanager
def device_for_all():
    """/dev/fuse as it is on systems with udev."""
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    if mode & 0o666 == 0o666:
        yield
        return
    os.chmod("/dev/fuse", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", mode)


class Unprivileged(MountCase):
    """A user mounts by fusermount3."""

    def setUp(self):
        super().setUp()
        require_gantry("the reference mounts by libfuse")
        require("fusermount3", "setpriv", "unshare")
        fuse_case.need_root("to become another user")
        self.enterContext(device_for_all())
        os.chown(self.dir, USER, USER)
        if subprocess.run(["setpriv", f"--reuid={USER}", "--clear-groups", "test", "-x", GANTRYD], check=False).returncode != 0:
            gantry_test.missing(f"{GANTRYD} is out of reach for other users", installable=False)

    def own(self, path, mode=0o600):
        os.chown(path, USER, USER)
        os.chmod(path, mode)
        return path

    def as_user(self, *more):
        self.wrapped(f'exec setpriv --reuid={USER} --regid={USER} --clear-groups {" ".join(more)} GANTRYD "$@"')

    def serve(self, name="file", **options):
        """A daemon of that user and its export."""
        image = self.own(self.raw_image("disk.raw", SIZE, gantry_test.text_block))
        path = self.own(self.touch(name))
        self._guard_mount(path)
        directory = tempfile.mkdtemp(prefix="d", dir=self.dir)
        os.chown(directory, USER, USER)
        daemon = Daemon(directory, "--blockdev", json.dumps(self.node_options(image, "raw", "disk")))
        self.addCleanup(self._end, daemon)
        mounted = Mounted(self, daemon, image, "disk", path, "e")
        daemon.qmp.cmd("block-export-add", {"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": path,
                                            "writable": True, **options})
        return mounted

    def user_does(self, *command):
        return subprocess.run(["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *command], capture_output=True,
                              timeout=20, check=False)

    def test_a_mount_of_ones_own(self):
        self.as_user()
        at = self.serve()
        self.assertEqual(fuse_guard.mounts(at.path)[-1][1], "fuse.gantry")
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            (line,) = [line for line in table if f" {at.path} " in line]
        self.assertIn(f"user_id={USER}", line)
        self.assertNotIn("allow_other", line)  # auto: /etc/fuse.conf does not allow it
        self.assert_errno(errno.EACCES, os.stat, at.path)  # not even root
        done = self.user_does("sh", "-c", f"stat -c '%s %u %a' {at.path}; echo new | dd of={at.path} conv=notrunc,fsync status=none")
        self.assertEqual((done.returncode, done.stdout.decode()), (0, f"{SIZE} {USER} 600\n"), done.stderr)
        with open(at.image, "rb") as file:
            self.assertEqual(file.read(4), b"new\n")
        at.qmp.delete_export("e")
        wait_for(lambda: not at.is_mounted(), "the mount to go")

    def test_safe_and_hard_removal(self):
        self.as_user()
        at = self.serve()
        held = subprocess.Popen(["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "sh", "-c",
                                 f"exec 3<{at.path}; echo open; read x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(held.communicate)
        self.assertEqual(held.stdout.readline(), b"open\n")
        self.assertIn("still in use", at.qmp.error("block-export-del", id="e")[1])
        at.qmp.cmd("block-export-del", id="e", mode="hard")
        at.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertFalse(at.is_mounted())

    def test_the_end_of_the_daemon(self):
        self.as_user()
        at = self.serve()
        at.daemon.stop()
        self.assertFalse(at.is_mounted())

    def test_what_a_killed_daemon_leaves(self):
        self.as_user()
        at = self.serve()
        at.daemon.kill()
        self.umounted(self.user_does(gantry_test.GANTRY, "umount", at.path), at)

    def test_root_cleans_what_a_user_left(self):
        self.as_user()
        at = self.serve()
        at.daemon.kill()
        self.umounted(subprocess.run([gantry_test.GANTRY, "umount", at.path], capture_output=True, timeout=20, check=False), at)

    def umounted(self, done, at):
        """By gantry umount, or just before by a daemon of another test."""
        self.assertTrue(done.returncode == 0 or b"is no file that gantry shows" in done.stderr, done.stderr)
        self.assertFalse(at.is_mounted())

    def test_allow_other_needs_fuse_conf(self):
        self.as_user()
        with self.assertRaises(gantry_test.QmpError) as caught:
            self.serve(**{"allow-other": "on"})
        self.assertIn("user_allow_other", caught.exception.desc)
        self.assertIn("add that line there, or use allow-other=off", caught.exception.desc)

    def test_allow_other_where_fuse_conf_has_it(self):
        conf = self.path("fuse.conf")
        pathlib.Path(conf).write_text("user_allow_other\n", encoding="ascii")
        self.wrapped(f'exec unshare -m sh -c \'mount --bind {conf} /etc/fuse.conf && exec setpriv --reuid={USER} --regid={USER} '
                     '--clear-groups GANTRYD "$@"\' sh "$@"')
        at = self.serve()
        inside = f"/proc/{at.daemon.process.pid}/root{at.path}"
        self.assertEqual(os.stat(inside).st_size, SIZE)  # of another user

    def test_a_mount_point_of_somebody_else(self):
        self.as_user()
        at = self.serve()
        foreign = self.touch("foreign", 0o644)
        error = self.refusal(at.qmp, foreign)
        self.assertIn("fusermount3", error)
        self.assertIn("a user mounts over files that he may write", error)

    def test_no_new_privileges(self):
        self.as_user("--no-new-privs")
        with self.assertRaises(gantry_test.QmpError) as caught:
            self.serve()
        self.assertIn("no_new_privs is set", caught.exception.desc)

    def test_no_fusermount3(self):
        self.wrapped(f'exec setpriv --reuid={USER} --regid={USER} --clear-groups env PATH=/nowhere GANTRYD "$@"')
        with self.assertRaises(gantry_test.QmpError) as caught:
            self.serve()
        self.assertIn("fusermount3 is not there; install the package fuse3", caught.exception.desc)

    def refused_by_device(self, prepare):
        """The error in a mount namespace of its own, where `prepare` has been run."""
        self.wrapped(f"cd {self.dir}; exec unshare -m sh -c '{prepare} && exec setpriv --reuid={USER} --regid={USER} "
                     '--clear-groups GANTRYD "$@"\' sh "$@"')
        with self.assertRaises(gantry_test.QmpError) as caught:
            self.serve()
        return caught.exception.desc

    def test_no_device(self):
        error = self.refused_by_device("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3")
        self.assertIn("/dev/fuse: No such file or directory; load the kernel's module (modprobe fuse)", error)

    def test_a_device_for_others(self):
        error = self.refused_by_device("mknod -m 600 fuse c 10 229 && mount --bind fuse /dev/fuse")
        self.assertIn(f"/dev/fuse: Permission denied; uid {USER} needs to read and write it", error)

    def test_in_a_user_namespace(self):
        """As a rootless container does it: root within, mount(2) allowed, no fusermount3."""
        probe = self.user_does("unshare", "-rm", "true")
        if probe.returncode != 0:
            gantry_test.missing(f"no user namespaces: {probe.stderr.decode().strip()}", installable=False)
        self.wrapped(f"exec setpriv --reuid={USER} --regid={USER} --clear-groups env PATH=/usr/bin:/bin unshare -rm "
                     'env PATH=/nowhere GANTRYD "$@"')
        at = self.serve()
        self.assertFalse(at.is_mounted(), "it is seen within the namespace alone")
        done = subprocess.run(["nsenter", "-t", str(at.daemon.process.pid), "-U", "-m", "stat", "-c", "%s %u",
                               at.path], capture_output=True, text=True, timeout=20, check=False)
        self.assertEqual((done.returncode, done.stdout), (0, f"{SIZE} 0\n"), done.stderr)


if __name__ == "__main__":
    gantry_test.main()
