"""The images that are served, and the state of their page cache."""

import mmap
import os
import random
import subprocess
import sys

PAGE = 4096
CHAIN = 10  # images of the kind "chain"
FRESH_GIB = 64
FRESH_MEMORY = 6 << 30  # bytes; what a run can fill


def format_of(kind):
    """The format of an image kind: raw and null are themselves, the others are qcow2 in different states."""
    if kind in ("holes", "target"):
        return "raw"
    return kind if kind in ("raw", "null") else "qcow2"


def work_directory():
    """Where images, sockets and results live: BENCH_DIR, or a folder of the user's cache. Must be on a real disk."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gantry-bench")
    directory = os.environ.get("BENCH_DIR") or default
    os.makedirs(directory, exist_ok=True)
    if file_system(directory) in ("tmpfs", "ramfs"):
        sys.exit("%s is in memory: set BENCH_DIR to a directory on a real disk" % directory)
    return directory


def file_system(directory):
    done = subprocess.run(["df", "--output=fstype", directory], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


class Images:
    """Makes each image once, and remembers which folios its page cache holds."""

    def __init__(self, directory, mebibytes):
        self.directory, self.mebibytes = directory, mebibytes
        self.folios = {}

    def path(self, kind):
        return os.path.join(self.directory, "%s.%d.img" % (kind, self.mebibytes)) if kind != "null" else ""

    def files(self, kind):
        """What the image consists of."""
        below = ["%s.%d" % (self.path(kind), level) for level in range(CHAIN - 1)] if kind == "chain" else []
        return [self.path(kind), *below]

    def make(self, kind):
        if kind in ("null", "fresh") or os.path.exists(self.path(kind)):
            return
        # A file appears under its name when it is complete.
        unfinished = self.path(kind) + ".unfinished"
        if kind == "raw":
            with open(unfinished, "wb") as file:
                for _ in range(self.mebibytes):
                    file.write(os.urandom(1 << 20))
        elif kind == "holes":
            make_holes(unfinished, self.mebibytes << 20, 4 * PAGE)
        elif kind == "qcow2-holes":
            make_holes(unfinished + ".raw", self.mebibytes << 20, 65536)
            subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-S", "65536", unfinished + ".raw", unfinished], check=True)
            os.unlink(unfinished + ".raw")
        elif kind == "target":
            self.make("raw")
            subprocess.run(["cp", "--reflink=never", "--sparse=never", self.path("raw"), unfinished], check=True)
        elif kind == "chain":
            self.make_chain(unfinished)
        elif kind == "compressed":
            self.make_compressed(unfinished)
        else:
            self.make("raw")
            subprocess.run(["qemu-img", "convert", "-O", "qcow2", self.path("raw"), unfinished], check=True)
        flush(unfinished)
        os.rename(unfinished, self.path(kind))

    def make_fresh(self):
        """An empty image, larger than any run fills; what the one before dirtied goes to the disk first. On a virtual
        machine the first touch of memory that the host took back costs several times what filling a page does."""
        path = self.path("fresh")
        if os.path.exists(path):
            flush(path)
            os.unlink(path)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "%dG" % FRESH_GIB], check=True)
        flush(path)
        touch_memory(FRESH_MEMORY)

    def make_chain(self, unfinished):
        """Each image of the chain holds every CHAINth cluster."""
        self.make("raw")
        previous = None
        for level in range(CHAIN):
            path = unfinished if level == CHAIN - 1 else self.files("chain")[1 + level]
            backing = ["-F", "qcow2", "-b", previous] if previous else []
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, path, "%dM" % self.mebibytes], check=True)
            commands = ["write -P %d %d 65536" % (level + 1, cluster * 65536)
                        for cluster in range(level, self.mebibytes * 16, CHAIN)]
            subprocess.run(["qemu-io", "-f", "qcow2", path], input="\n".join(commands), text=True, check=True,
                           stdout=subprocess.DEVNULL)
            flush(path)
            previous = path

    def make_compressed(self, unfinished):
        """Half noise, half repetition in each 4 KiB."""
        source = unfinished + ".raw"
        with open(source, "wb") as file:
            for _ in range(self.mebibytes * 256):
                file.write(os.urandom(2048) + bytes(2048))
        subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", source, unfinished], check=True)
        os.unlink(source)

    def prepare(self, kind, folios):
        """Once before a workload. `folios`: "large" fills the page cache by reading in order (ext4 then keeps large
        folios, in which a 4 KiB overwrite is slow), "small" by 4 KiB writes all over the file, None (O_DIRECT) empties it."""
        self.make(kind)
        if kind in ("null", "fresh") or (folios and self.folios.get(kind) == folios):
            return
        for path in self.files(kind):
            drop(path)
            if folios == "small":
                write_in_pages(path)
            elif folios == "large":
                read_in_order(path)
        self.folios[kind] = folios

    def warm(self, kind, folios):
        """Before each run: the kernel may have reclaimed pages that nobody maps. What is there stays as it is."""
        if kind == "null":
            return
        if kind == "fresh":
            self.make_fresh()
            return
        for path in self.files(kind):
            flush(path)  # or the writeback of the run before disturbs this one
            if folios == "small":
                read_in_pages(path)
            elif folios == "large":
                read_in_order(path)


def make_holes(path, bytes_, unit):
    """Every second unit is data."""
    with open(path, "wb") as file:
        for offset in range(0, bytes_, 2 * unit):
            file.seek(offset)
            file.write(b"x" * unit)
        file.truncate(bytes_)


def touch_memory(limit):
    """Makes the kernel hold up to `limit` free bytes that were in use a moment ago."""
    bytes_ = min(limit, os.sysconf("SC_AVPHYS_PAGES") * PAGE // 2)
    with mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def flush(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def drop(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_in_order(path):
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(4 << 20)
        while file.readinto(buffer):
            pass


def read_in_pages(path):
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead, which would bring large folios
    buffers = [bytearray(PAGE)]
    for offset in range(0, os.fstat(fd).st_size, PAGE):
        os.preadv(fd, buffers, offset)
    os.close(fd)


def write_in_pages(path):
    """Every page with what it holds: the image stays as it is."""
    fd = os.open(path, os.O_RDWR)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    offsets = list(range(0, os.fstat(fd).st_size, PAGE))
    random.Random(1).shuffle(offsets)
    for offset in offsets:
        os.pwrite(fd, os.pread(fd, PAGE, offset), offset)
    os.fsync(fd)
    os.close(fd)
