"""A small Linux guest: qemu-system with the kernel of package linux-image-cloud-amd64, busybox, and the programs of tests/guest.

Its disks are vhost-user-blk devices, vda first. Commands go over a serial line, so that one boot serves many checks.
"""

import base64
import glob
import lzma
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import time
from dataclasses import dataclass

from gantry_test import BUILD, ROOT, Qmp, listening, missing, require, wait_for

SOURCE = ROOT / "tests" / "guest"
MODULES = ("virtio_pci", "virtio_blk")
BOOT_DEADLINE = 120.0
COMMAND_DEADLINE = 120.0  # everything is emulated


@dataclass
class GuestDisk:
    """One device. `options`: further ones of vhost-user-blk-pci, as in "packed=on"."""

    socket: str
    queues: int = 2
    options: str = ""
    reconnect: bool = True


def kernel():
    """(kernel image, its version): the newest that is installed."""
    images = sorted(glob.glob("/boot/vmlinuz-*-cloud-amd64"), key=lambda path: [int(n) for n in re.findall(r"\d+", path)])
    if not images:
        missing("linux-image-cloud-amd64 is not installed")
    return images[-1], os.path.basename(images[-1]).removeprefix("vmlinuz-")


def modules(version):
    """The files of the drivers, each after those that it needs."""
    found = {}
    for name in MODULES:
        done = subprocess.run(["modprobe", "-S", version, "--show-depends", name], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("insmod "):
                found[line.split()[1]] = None
    return list(found)


def disk_program():
    """tests/guest/disk.cc without any library; made again when the source is newer."""
    program, source = BUILD / "guest-disk", SOURCE / "disk.cc"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        unfinished = BUILD / f"guest-disk.{os.getpid()}"
        subprocess.run(["clang++-19", "-std=c++23", "-O2", "-static", "-pthread", source, "-o", unfinished], check=True)
        unfinished.rename(program)
    return program


def libraries(program):
    """The shared libraries of a program, its loader among them."""
    text = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    return re.findall(r"(?:=> )?(/\S+) \(0x", text)


class Archive:
    """An archive in the format that the kernel unpacks at boot ("newc" of cpio)."""

    def __init__(self):
        self.parts, self.folders, self.number = [], set(), 0

    def add(self, name, data, mode=0o755):
        name = name.lstrip("/")
        folder = os.path.dirname(name)
        if folder and folder not in self.folders:
            self.folders.add(folder)
            self.add(folder, b"", stat.S_IFDIR | 0o755)
        self.number += 1
        mode |= 0 if stat.S_IFMT(mode) else stat.S_IFREG
        fields = [self.number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        self.parts += [header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)]

    def add_file(self, name, path):
        with open(path, "rb") as file:
            data = file.read()
        self.add(name, lzma.decompress(data) if path.endswith(".xz") else data)

    def bytes(self):
        self.add("TRAILER!!!", b"", stat.S_IFREG)
        return b"".join(self.parts)


def initial_files(version):
    archive = Archive()
    archive.add_file("init", str(SOURCE / "init"))
    archive.add_file("bin/busybox", shutil.which("busybox"))
    archive.add_file("bin/disk", str(disk_program()))
    archive.add("bin/sh", b"busybox", stat.S_IFLNK | 0o777)
    mkfs = shutil.which("mke2fs", path=os.environ["PATH"] + ":/sbin:/usr/sbin")
    archive.add_file("bin/mkfs.ext4", mkfs)
    for library in libraries(mkfs):
        archive.add_file(library, library)
    names = []
    for path in modules(version):
        names.append("/modules.d/" + os.path.basename(path).removesuffix(".xz"))
        archive.add_file(names[-1], path)
    archive.add("modules", "".join(name + "\n" for name in names).encode())
    return archive.bytes()


class GuestError(AssertionError):
    pass


class Guest:
    """A running guest; it is up when the constructor returns. `directory` is short and its own."""

    def __init__(self, directory, disks, cpus=2, memory=256, incoming=None):
        """`incoming`: where another guest comes from by migrate_to(); then nothing boots here."""
        require("qemu-system-x86_64", "busybox", "clang++-19", "modprobe", "ldd")
        self.directory, self.disks = directory, disks
        self.console_path = os.path.join(directory, "console")
        self.qmp_path = os.path.join(directory, "guest.qmp")
        image, version = kernel()
        files = os.path.join(directory, "initramfs")
        with open(files, "wb") as file:
            file.write(initial_files(version))
        commands = os.path.join(directory, "commands")
        words = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus), "-m", f"{memory}M",
                 "-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on", "-M", "q35,memory-backend=memory",
                 "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
                 "-serial", f"file:{self.console_path}", "-chardev", f"socket,id=commands,path={commands},server=on,wait=off",
                 "-serial", "chardev:commands", "-qmp", f"unix:{self.qmp_path},server=on,wait=off", "-kernel", image, "-initrd", files,
                 "-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on nokaslr"]
        for number, disk in enumerate(disks):
            words += ["-chardev", f"socket,id=disk{number},path={disk.socket}" + (",reconnect=1" if disk.reconnect else ""),
                      "-device", f"vhost-user-blk-pci,id=device{number},chardev=disk{number},num-queues={disk.queues}"
                      + ("," + disk.options if disk.options else "")]
        self.log_path = os.path.join(directory, "qemu.log")
        with open(self.log_path, "wb") as log:
            words += ["-incoming", f"unix:{incoming}"] if incoming else []
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.line, self.buffer, self.jobs, self.monitor = None, b"", 0, None
        begun = time.monotonic()
        try:
            self.line = wait_for(lambda: self.connect(commands), "the guest's serial line", BOOT_DEADLINE)
            if not incoming:
                self.answer(BOOT_DEADLINE)
        except BaseException:
            self.close()
            raise
        self.boot_seconds = time.monotonic() - begun

    def qmp(self):
        """qemu's monitor."""
        if not self.monitor:
            wait_for(lambda: listening(self.qmp_path), "qemu's monitor")
            self.monitor = Qmp(self.qmp_path)
        return self.monitor

    def migrate_to(self, directory, disks):
        """Live migration: the guest that goes on there, with all its jobs. This one is over."""
        door = os.path.join(directory, "incoming")
        other = Guest(directory, disks, incoming=door)
        try:
            wait_for(lambda: listening(door), "the qemu that the guest goes to")
            self.qmp().cmd("migrate", uri=f"unix:{door}")
            status = wait_for(self.migration_result, "the migration", BOOT_DEADLINE)
            if status != "completed":
                raise GuestError(f"the migration ended as {status}: {self.words()[-1500:]}\n{other.words()[-1500:]}")
            wait_for(lambda: other.qmp().cmd("query-status")["running"], "the guest to go on")
        except BaseException:
            other.close()
            raise
        other.jobs = self.jobs
        self.close()
        return other

    def migration_result(self):
        status = self.qmp().cmd("query-migrate").get("status")
        return status if status in ("completed", "failed", "cancelled") else None

    def connect(self, path):
        self.check_alive()
        attempt = socket.socket(socket.AF_UNIX)
        if attempt.connect_ex(path) == 0:
            return attempt
        attempt.close()
        return None

    def check_alive(self):
        if self.process.poll() is not None:
            raise GuestError(f"the guest ended with {self.process.returncode}: {self.words()}")

    def words(self):
        """What qemu and the guest's kernel have said."""
        text = ""
        for path in (self.log_path, self.console_path):
            if os.path.exists(path):
                with open(path, errors="replace") as file:
                    text += file.read()
        return text

    def answer(self, deadline):
        """(output, status) of a command: everything until its last line."""
        end = time.monotonic() + deadline
        while not (found := re.search(rb"(?:^|\n)@@ (\w+)\r?\n", self.buffer)):
            self.line.settimeout(max(0.01, end - time.monotonic()))
            try:
                data = self.line.recv(65536)
            except TimeoutError:
                raise GuestError(f"the guest has not answered for {deadline:.0f} s: {self.buffer.decode(errors='replace')}\n"
                                 f"{self.words()[-2000:]}") from None
            if not data:
                raise GuestError(f"the guest is gone: {self.words()[-2000:]}")
            self.buffer += data
        output = self.buffer[:found.start()].decode(errors="replace").replace("\r\n", "\n")
        self.buffer = self.buffer[found.end():]
        return output, found.group(1).decode()

    def attempt(self, command, deadline=COMMAND_DEADLINE):
        """(output, status) of a line of shell."""
        assert "\n" not in command
        self.line.sendall(command.encode() + b"\n")
        output, status = self.answer(deadline)
        return output, int(status)

    def run(self, command, deadline=COMMAND_DEADLINE):
        """The output of a line of shell, which must succeed."""
        output, status = self.attempt(command, deadline)
        if status != 0:
            raise GuestError(f"in the guest: {command}: status {status}\n{output}\n{self.kernel_log()[-1500:]}")
        return output.strip()

    def start(self, command):
        """Runs a command beside the others; its number for finish()."""
        self.jobs += 1
        self.run(f"sh -c {shlex.quote(command)} >/tmp/job.{self.jobs} 2>&1 & job{self.jobs}=$!")
        return self.jobs

    def running(self, job):
        return self.attempt(f"kill -0 $job{job} 2>/dev/null")[1] == 0

    def finish(self, job, deadline=COMMAND_DEADLINE):
        """Waits for the end of a command, which must have succeeded; its output."""
        output, status = self.attempt(f"wait $job{job}; status=$?; cat /tmp/job.{job}; (exit $status)", deadline)
        if status != 0:
            raise GuestError(f"in the guest: status {status}\n{output}\n{self.kernel_log()[-1500:]}")
        return output.strip()

    def kernel_log(self):
        return self.attempt("dmesg")[0]

    def fetch(self, path):
        """The bytes of a file of the guest."""
        return base64.b64decode(self.run(f"base64 {path}"))

    def close(self):
        """Cuts the power."""
        for connection in (self.line, self.monitor):
            if connection:
                connection.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
