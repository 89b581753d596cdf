"""Tests of the FUSE export: a daemon that shows an image as a file, and no mount that survives its test."""

import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import fuse_guard
import gantry_test
from gantry_test import IS_GANTRY, Case, Daemon, missing, require, wait_for

SOAK = bool(os.environ.get("GANTRY_SOAK"))
TEST_DEADLINE = 3600 if SOAK else 100  # seconds; then everything is torn down, so that whoever hangs gets errors
ENABLE_URING = pathlib.Path("/sys/module/fuse/parameters/enable_uring")

FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 0x10
FALLOC_COLLAPSE_RANGE, FALLOC_INSERT_RANGE = 8, 0x20
_libc = ctypes.CDLL(None, use_errno=True)


def own_mounts():
    """A mount namespace for this process and all it starts: daemons clean up dead mounts wherever they see them, which would be those
    of tests beside this one. What is left ends with the last of them."""
    clone_newns, recursive, private = 0x20000, 0x4000, 1 << 18
    if os.geteuid() == 0 and _libc.unshare(clone_newns) == 0:
        _libc.mount(None, b"/", None, ctypes.c_ulong(recursive | private), None)


own_mounts()


def fallocate(fd, mode, offset, length):
    """fallocate(2); Python has posix_fallocate alone."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def punch(fd, offset, length):
    fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)


def extents(fd, end=None):
    """[(first byte, behind the last)] of the data of a file, as SEEK_DATA and SEEK_HOLE tell."""
    found, at = [], 0
    end = os.lseek(fd, 0, os.SEEK_END) if end is None else end
    while at < end:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, at))
    return found


def at_the_same_time(work, each):
    """work(one) for each, in threads of their own; raises what one of them has raised, when all have ended."""
    with concurrent.futures.ThreadPoolExecutor(len(each)) as threads:
        list(threads.map(work, each))


def need_fuse():
    """Skips where no FUSE file system can be mounted."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        missing(f"/dev/fuse cannot be opened ({error.strerror})", installable=False)
    if os.geteuid() != 0:
        require("fusermount3")


def need_root(why):
    if os.geteuid() != 0:
        missing(f"{why} needs root", installable=False)


def mount_fusectl():
    """True when connections can be aborted."""
    if not os.path.ismount(fuse_guard.CONNECTIONS) and os.geteuid() == 0:
        subprocess.run(["mount", "-t", "fusectl", "none", fuse_guard.CONNECTIONS], capture_output=True, timeout=10, check=False)
    return os.path.ismount(fuse_guard.CONNECTIONS) and os.geteuid() == 0


@contextlib.contextmanager
def uring_enabled():
    """The kernel offers FUSE over io_uring to mounts made within. Others who want that wait."""
    if not ENABLE_URING.exists():
        missing("this kernel has no FUSE over io_uring", installable=False)
    if not os.access(ENABLE_URING, os.W_OK):
        missing("enabling FUSE over io_uring needs root", installable=False)
    with open(ENABLE_URING, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = ENABLE_URING.read_text(encoding="ascii").strip()
        key = FuseCase.guard.push(run=["sh", "-c", f"echo {before} >{ENABLE_URING}"]) if FuseCase.guard else None
        ENABLE_URING.write_text("Y\n", encoding="ascii")
        try:
            yield
        finally:
            ENABLE_URING.write_text(before + "\n", encoding="ascii")
            if key:
                FuseCase.guard.pop(key)


class Guard:
    """fuse_guard.py as a process; one for all tests of a script."""

    def __init__(self):
        mount_fusectl()
        self.process = subprocess.Popen([sys.executable, fuse_guard.__file__], stdin=subprocess.PIPE, text=True,
                                        start_new_session=True)
        self.keys = 0

    def tell(self, **message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def push(self, **entry):
        self.keys += 1
        self.tell(push=self.keys, **entry)
        return self.keys

    def pop(self, key):
        self.tell(pop=key)


class Mounted:
    """An export as a file: `path` is the file, `image` what is behind it, `daemon` who serves it as export `id`."""

    def __init__(self, case, daemon, image, node, path, id):
        self.case, self.daemon, self.image, self.node, self.path, self.id = case, daemon, image, node, path, id

    @property
    def qmp(self):
        return self.daemon.qmp

    def open(self, flags=os.O_RDWR, mode=0):
        """A descriptor that is closed before the daemon ends."""
        return self.case.opened(self.path, flags, mode)

    def is_mounted(self):
        return bool(fuse_guard.mounts(self.path))

    def status(self, field):
        """A field of stat(1) as text, asked from the server whatever the kernel remembers."""
        return self.case.run_tool("stat", "--cached=never", "-c", field, self.path).stdout.strip()

    def size(self):
        return int(self.status("%s"))

    def blocks(self):
        return int(self.status("%b"))


class FuseCase(Case):
    """Every test has a deadline after which whatever it mounted is gone, and leaves nothing behind when it fails."""

    guard = None

    def setUp(self):
        super().setUp()
        need_fuse()
        self.dir = os.path.realpath(self.dir)
        if FuseCase.guard is None:
            FuseCase.guard = Guard()
        self.guard.tell(deadline=TEST_DEADLINE)

    # --- what has to be undone

    def undone_by(self, *command):
        """A function that runs `command`, which is run at the end of the test in any case."""
        words = [str(word) for word in command]
        key = self.guard.push(run=words)
        done = []

        def undo():
            if not done:
                done.append(True)
                try:
                    subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
                finally:
                    self.guard.pop(key)
        self.addCleanup(undo)
        return undo

    def daemon(self, *arguments, **options):
        keys = []
        self.addCleanup(lambda: [self.guard.pop(key) for key in keys])  # runs once the daemon has ended
        # A monitor of its own for each: a test has several daemons, one after the other or at a time.
        daemon = Daemon(tempfile.mkdtemp(prefix="d", dir=self.dir), *arguments, **options)
        self.addCleanup(self._end, daemon)
        keys.append(self.guard.push(pid=daemon.process.pid))
        return daemon

    def _guard_mount(self, path):
        """From here to the end of the test whatever is mounted on `path` goes away with it."""
        key = self.guard.push(mount=path)

        def clean():
            left = fuse_guard.mounts(path)
            if left:
                fuse_guard.abort(path)
                fuse_guard.detach(path)
            self.guard.pop(key)
            self.assertEqual(left, [], f"nothing is mounted on {path} once its daemon has ended")
        self.addCleanup(clean)

    def opened(self, path, flags=os.O_RDONLY, mode=0):
        fd = os.open(path, flags, mode)

        def close():
            with contextlib.suppress(OSError):
                os.close(fd)
        self.addCleanup(close)
        return fd

    # --- images

    def make_image(self, form, size, name=None, pattern=None):
        """An image of format `form` with `size` bytes; `pattern` as raw_image() takes it."""
        raw = self.raw_image((name or "disk") + ".raw", size, pattern)
        if form == "raw":
            return raw
        require("qemu-img")
        path = self.path((name or "disk") + "." + form)
        if pattern:
            self.run_tool("qemu-img", "convert", "-f", "raw", "-O", form, raw, path)
        else:
            self.run_tool("qemu-img", "create", "-q", "-f", form, path, size)
        return path

    def check_image(self, image, form):
        """Nothing is wrong with it, no leak either."""
        if form == "qcow2":
            self.run_tool("qemu-img", "check", "-q", "-f", form, image)

    def contents(self, image, form):
        """What a guest would read, by a program that is not ours."""
        if form == "raw":
            with open(image, "rb") as file:
                return file.read()
        out = self.path("contents.out")
        self.run_tool("qemu-img", "convert", "-f", form, "-O", "raw", image, out)
        with open(out, "rb") as file:
            data = file.read()
        os.unlink(out)
        return data

    # --- exports

    @staticmethod
    def node_options(image, form, node, **file_options):
        file = {"driver": "file", "filename": image, "discard": "unmap", **file_options}
        if form == "raw":
            return {"node-name": node, **file}
        return {"driver": form, "node-name": node, "discard": "unmap", "file": file}

    @staticmethod
    def iothreads(count):
        return [word for i in range(count) for word in ("--object", f"iothread,id=t{i}")]

    def mount(self, form="raw", size=None, *, image=None, pattern=None, mountpoint=None, writable=True, growable=False,
              transport=None, passthrough=False, cached=False, o_trunc=None, iothreads=0, node_options=None, words=(),
              **export_options):
        """Starts a daemon that shows an image as a file. What is not of the reference skips the test there."""
        node, id = "disk", "e"
        image = image or self.make_image(form, size, pattern=pattern)
        mountpoint = mountpoint or self.path("file")
        if not fuse_guard.mounts(mountpoint):  # what a dead daemon has left answers nobody
            pathlib.Path(mountpoint).touch()
        options = {"type": "fuse", "id": id, "node-name": node, "mountpoint": mountpoint, "writable": writable, **export_options}
        options = {key.replace("_", "-"): value for key, value in options.items()}
        if growable:
            options["growable"] = True
        ours = {"x-transport": transport, "x-passthrough": passthrough or None, "x-cached": cached or None, "x-o-trunc": o_trunc}
        ours = {key: value for key, value in ours.items() if value is not None}
        if ours:
            gantry_test.require_gantry(f"options of ours: {' '.join(ours)}")
        if iothreads > 1:
            gantry_test.require_gantry("several queues")
            options["iothread"] = [f"t{i}" for i in range(iothreads)]
        elif iothreads:
            options["iothread"] = "t0"
        self._guard_mount(mountpoint)
        definition = {**self.node_options(image, form, node), **(node_options or {})}
        if not writable:
            definition["read-only"] = True
            if "file" in definition:
                definition["file"] = {**definition["file"], "read-only": True}
        daemon = self.daemon(*self.iothreads(iothreads), *words, "--blockdev", json.dumps(definition), "--export",
                             json.dumps({**options, **ours}))
        mounted = Mounted(self, daemon, image, node, mountpoint, id)
        wait_for(mounted.is_mounted, f"the mount on {mountpoint}")
        if ours:
            self.check_transport(mounted, transport, passthrough)
        return mounted

    def check_transport(self, mounted, transport, passthrough):
        """What was asked for is what is in use."""
        (about,) = mounted.qmp.cmd("query-fuse-exports")
        self.assertEqual(about["passthrough"], passthrough, about)
        if transport and gantryd_is_on_io_uring():
            self.assertEqual(about["transport"], transport, about)

    def add_export(self, mounted, name="file2", id="e2", **options):
        """One more file of the same node."""
        path = os.path.join(self.dir, name)
        pathlib.Path(path).touch()
        self._guard_mount(path)
        self.addCleanup(self._end_quietly, mounted.daemon)  # before the mount is looked for
        mounted.qmp.cmd("block-export-add", {"type": "fuse", "id": id, "node-name": mounted.node, "mountpoint": path,
                                             "writable": True, **options})
        wait_for(lambda: fuse_guard.mounts(path), f"the mount on {path}")
        return Mounted(self, mounted.daemon, mounted.image, mounted.node, path, id)

    @staticmethod
    def _end_quietly(daemon):
        if not daemon.killed:
            daemon.stop()

    # --- checks

    def assert_errno(self, numbers, call, *arguments):
        """`call` fails with one of `numbers` (one, or several of which the kernel chooses)."""
        wanted = numbers if isinstance(numbers, tuple) else (numbers,)
        try:
            value = call(*arguments)
        except OSError as error:
            self.assertIn(errno.errorcode[error.errno], [errno.errorcode[n] for n in wanted])
            return
        self.fail(f"returned {value!r}; wanted {' or '.join(errno.errorcode[n] for n in wanted)}")


def gantryd_is_on_io_uring():
    return os.environ.get("GANTRY_TEST_IO_BACKEND") != "epoll"


def transports(form):
    """What mount() takes for each way that data can go, by name. `uring` needs uring_enabled()."""
    found = {"classic": {"transport": "classic"} if IS_GANTRY else {}}
    if IS_GANTRY:
        found["queues"] = {"transport": "classic", "iothreads": 3}
    # The others are the same whatever the back end; io_uring has to be it for one of them.
    if IS_GANTRY and (SOAK or gantryd_is_on_io_uring()):
        found["uring"] = {"transport": "uring"}
        if form == "raw":
            found["passthrough"] = {"passthrough": True}
    return found


@contextlib.contextmanager
def ready_for(name):
    """What transport `name` needs of the kernel."""
    if name.startswith("uring"):
        with uring_enabled():
            yield
    else:
        yield


__all__ = ["Daemon", "FuseCase", "Mounted", "SOAK", "extents", "fallocate", "punch", "ready_for", "transports", "uring_enabled"]
