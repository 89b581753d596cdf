"""Servers that show the image as a file, and the file itself: what fio reads and writes by its path."""

import os
import subprocess
import time

from . import processes
from .servers import START_LIMIT_SECONDS, Server

FUSE_BLOCKDEV = ["--blockdev", "driver=file,node-name=file,filename={image},read-only={readonly},cache.direct={direct}{aio}",
                 "--blockdev", "driver={format},node-name=disk,file=file,read-only={readonly}"]
FUSE_EXPORT = ["--export", "type=fuse,id=export,node-name=disk,mountpoint={mountpoint},writable={writable}{more}"]
ENABLE_URING = "/sys/module/fuse/parameters/enable_uring"


def mounted(path):
    """Whether something is mounted at `path`; asks nobody who could hang."""
    with open("/proc/self/mountinfo") as file:
        return any(line.split()[4] == path for line in file)


class PlainFile:
    """The image without any server: how fast it could be. No peer: nothing is compared with it but by name."""

    front, ours, reference, plain = "fuse", False, True, True

    def __init__(self, name, buffered=False):
        self.name, self.buffered = name, buffered  # buffered: whatever the workload says

    def installed(self):
        return True

    def fits(self, suite, workload):
        return workload.kind == "transfer" and suite.front == self.front and suite.image == "raw" and not suite.direct

    def start(self, directory, image, format_name, direct, readonly, pin=None, tls=""):
        self.path = image

    def stop(self):
        pass

    def abandon(self):
        pass

    def cpu_seconds(self):
        return 0


class FuseServer(Server):
    """`more`: further options of the export. `uring`: the kernel module must offer FUSE over io_uring meanwhile."""

    front, plain, buffered = "fuse", False, False

    def __init__(self, name, arguments, more="", uring=False, **options):
        super().__init__(name, arguments, **options)
        self.more, self.uring = more, uring

    def installed(self):
        if not super().installed() or not os.path.exists("/dev/fuse"):
            return False
        return not self.uring or os.access(ENABLE_URING, os.W_OK)

    def start(self, directory, image, format_name, direct, readonly, pin=None, tls=""):
        self.path = os.path.realpath(os.path.join(directory, "mnt.%s.%d" % (self.name, os.getpid())))
        self.leave_mount()
        with open(self.path, "w"):
            pass
        values = {"image": image, "format": format_name, "mountpoint": self.path, "aio": self.aio, "more": self.more,
                  "direct": "on" if direct else "off", "readonly": "on" if readonly else "off",
                  "writable": "off" if readonly else "on"}
        command = ["taskset", "-c", str(pin)] if pin is not None else []
        command += [argument.format(**values) for argument in self.arguments]
        self.log_path = os.path.join(directory, "server.%s.log" % self.name)
        before = self.offer_uring(True)
        begun = time.monotonic()
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **self.environment}, start_new_session=True)
        self.pid = self.process.pid
        try:
            self.wait_ready(begun)
        except BaseException:
            self.stop()
            raise
        finally:
            self.offer_uring(before)
        self.startup_seconds = time.monotonic() - begun

    def offer_uring(self, offer):
        """What counts is the parameter at the moment of the mount. Returns what it was."""
        if not self.uring:
            return False
        with open(ENABLE_URING) as file:
            before = file.read().strip() == "Y"
        if before != offer:
            with open(ENABLE_URING, "w") as file:
                file.write("Y" if offer else "N")
        return before

    def wait_ready(self, begun):
        problem = "nothing mounted at %s" % self.path
        while time.monotonic() - begun < START_LIMIT_SECONDS:
            if self.process.poll() is not None:
                problem = "exit status %d" % self.process.returncode
                break
            if mounted(self.path):
                reader = subprocess.Popen(["dd", "if=" + self.path, "of=/dev/null", "bs=4k", "count=1", "status=none"],
                                          stderr=subprocess.DEVNULL)
                try:
                    if reader.wait(START_LIMIT_SECONDS) == 0:
                        return
                    problem = "the first block cannot be read"
                except subprocess.TimeoutExpired:
                    problem = "no answer to the first read"
                    self.abandon()
                    reader.kill()
                    reader.wait()
                    break
            time.sleep(0.0005)
        with open(self.log_path) as file:
            raise RuntimeError("%s did not start (%s): %s" % (self.name, problem, file.read()[-400:].strip()))

    def abandon(self):
        """Ends a server that does not answer, and so its clients."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.abandon()
        self.leave_mount()

    def leave_mount(self):
        """Nothing of an earlier server stays behind."""
        while mounted(self.path):
            subprocess.run(["umount", "-l", self.path], check=True)
        if os.path.lexists(self.path):
            os.unlink(self.path)

    def rss_kib(self):
        return processes.tree_rss_kib(self.pid)


def qsd(name, aio, iothread=False):
    thread = ["--object", "iothread,id=thread"] if iothread else []
    return FuseServer(name, ["qemu-storage-daemon", *thread, *FUSE_BLOCKDEV, *FUSE_EXPORT], aio=",aio=" + aio,
                      more=",iothread=thread" if iothread else "", direct=(True,) if aio == "native" else (False, True))


def peers():
    return [qsd("qsd-fuse-threads", "threads"), qsd("qsd-fuse-uring", "io_uring"), qsd("qsd-fuse-native", "native"),
            qsd("qsd-fuse-iothread", "io_uring", iothread=True), PlainFile("file"), PlainFile("file-buffered", buffered=True)]


def gantry(build):
    """Our own servers of one build directory; none when it holds no gantryd."""
    program = os.path.join(build, "gantryd")
    if not os.path.exists(program):
        return []

    def ours(name, more="", words=(), **options):
        return FuseServer(name, [program, *words, *FUSE_BLOCKDEV, *FUSE_EXPORT], more=more, ours=True, **options)
    return [
        ours("gantry-fuse"),
        ours("gantry-fuse-no-poll", words=["--io-poll=off"]),
        ours("gantry-fuse-epoll", words=["--io-backend=epoll"]),
        ours("gantry-fuse-uring", ",x-transport=uring", uring=True),
        ours("gantry-fuse-auto", ",x-transport=auto", uring=True),
        ours("gantry-fuse-passthrough", ",x-passthrough=on", formats=("raw",), direct=(False,)),
        ours("gantry-fuse-on-raw", formats=("raw",), image_kind="raw"),
    ]
