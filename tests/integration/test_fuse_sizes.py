#!/usr/bin/python3
"""An image as a file: its length, and who else uses the node or the file at the same time."""

import errno
import mmap
import os
import pathlib
import random
import stat
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import fuse_case
import gantry_test
from fuse_case import FuseCase, extents, fallocate, punch
from gantry_test import IS_GANTRY, MIB, checksum, require, require_gantry, text_block, wait_for

FORMATS = ("raw", "qcow2")
SIZE = 4 * MIB


class Sizes(FuseCase):
    """Truncation, growth, resizing from outside."""

    def test_truncate(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, lambda n: b"d" * 65536),
                                mountpoint=self.path("f" + form))
                fd = at.open()
                for size in (MIB, 3 * MIB, MIB + 512, 8 * MIB, 0, 512, SIZE):
                    os.ftruncate(fd, size)
                    self.assertEqual((os.fstat(fd).st_size, at.size()), (size, size))
                    if size:
                        self.assertEqual(os.pwrite(fd, b"e" * 512, size - 512), 512)
                    self.assertEqual(os.pread(fd, 100, size), b"")
                data = os.pread(fd, SIZE, 0)
                self.assertEqual(data, b"e" * 512 + bytes(SIZE - 1024) + b"e" * 512)
                os.truncate(at.path, 2 * MIB)
                self.assertEqual(os.fstat(fd).st_size, 2 * MIB)
                too_large = (errno.EFBIG, errno.EINVAL, errno.ENOSPC) if IS_GANTRY else errno.EIO
                self.assert_errno(too_large, os.ftruncate, fd, (1 << 63) - 1)
                self.assertEqual(at.size(), 2 * MIB)
                os.close(fd)
                at.daemon.stop()
                self.assertEqual(len(self.contents(at.image, form)), 2 * MIB)
                self.check_image(at.image, form)

    def test_truncate_to_any_byte(self):
        require_gantry("the reference rounds to 512")
        at = self.mount("raw", image=self.raw_image("i", SIZE, lambda n: b"d" * 65536))
        fd = at.open()
        for size in (1000003, 1000002, 1, 0, 77777):
            os.ftruncate(fd, size)
            self.assertEqual((os.fstat(fd).st_size, os.path.getsize(at.image)), (size, size))
        self.assertEqual(os.pread(fd, 100000, 0), bytes(77777))

    def test_growing(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, MIB, form, lambda n: b"d" * 65536),
                                mountpoint=self.path("f" + form), growable=True)
                fd, other = at.open(), at.open(os.O_RDONLY)
                self.assertEqual(os.pwrite(fd, b"a" * 1024, MIB - 512), 1024)
                self.assertEqual(os.fstat(fd).st_size, MIB + 512)
                self.assertEqual(os.pwrite(fd, b"b" * 1024, 3 * MIB), 1024)
                self.assertEqual(os.fstat(other).st_size, 3 * MIB + 1024)
                self.assertEqual(os.pread(other, 3 * MIB, MIB), b"a" * 512 + bytes(2 * MIB - 512) + b"b" * 1024)
                append = at.open(os.O_WRONLY | os.O_APPEND)
                for i in range(20):
                    self.assertEqual(os.write(append, bytes([i]) * 512), 512)
                self.assertEqual(os.pread(other, 20 * 512, 3 * MIB + 1024), b"".join(bytes([i]) * 512 for i in range(20)))
                fallocate(fd, 0, 4 * MIB, MIB)
                self.assertEqual(os.fstat(fd).st_size, 5 * MIB)
                fallocate(fd, fuse_case.FALLOC_ZERO_RANGE, 6 * MIB, MIB)
                self.assertEqual(os.fstat(other).st_size, 7 * MIB)
                self.assertEqual(os.pread(fd, 4 * MIB, 4 * MIB), bytes(3 * MIB))
                os.close(fd)
                os.close(other)
                os.close(append)
                at.daemon.stop()
                self.assertEqual(len(self.contents(at.image, form)), 7 * MIB)
                self.check_image(at.image, form)

    def test_growing_by_any_byte(self):
        require_gantry("the reference rounds to 512")
        at = self.mount("raw", 0, growable=True)
        fd = at.open(os.O_RDWR | os.O_APPEND)
        model, rng = b"", random.Random(3)
        self.assertEqual(os.pread(fd, 10, 0), b"")
        for _ in range(200):
            data = rng.randbytes(rng.choice((1, 3, 511, 513, 5000)))
            self.assertEqual(os.write(fd, data), len(data))
            model += data
            self.assertEqual(os.fstat(fd).st_size, len(model))
        self.assertEqual(os.pread(fd, len(model) + 1, 0), model)
        os.close(fd)
        out = self.path("out")
        self.run_tool("cp", at.path, out)
        self.run_tool("sh", "-c", f"tar cf - -C {self.dir} out >> {at.path}")
        at.daemon.stop()
        with open(at.image, "rb") as file:
            data = file.read()
        self.assertEqual(data[:len(model)], model)
        self.assertGreater(len(data), 2 * len(model))

    def test_fallocate(self):
        modes = fuse_case
        keep, hole, zero = modes.FALLOC_KEEP_SIZE, modes.FALLOC_PUNCH_HOLE, modes.FALLOC_ZERO_RANGE
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, lambda n: b"d" * 65536),
                                mountpoint=self.path("f" + form))
                fd, model = at.open(), bytearray(b"d" * SIZE)
                unit = 1 if IS_GANTRY else 512
                whole = ((0, 65536), (MIB, MIB), (SIZE - 65536, 65536))
                parts = ((512, 512), (unit, 100 * 512 + unit), (MIB - 512, MIB), (SIZE - 512, 512))
                for mode in (hole | keep, zero | keep, zero):
                    # (The reference leaves what is no cluster alone.)
                    for offset, length in whole if mode & hole and not IS_GANTRY else whole + parts:
                        os.pwrite(fd, b"e" * length, offset)
                        fallocate(fd, mode, offset, length)
                        model[offset:offset + length] = bytes(length)
                        self.assertEqual(os.pread(fd, SIZE, 0), bytes(model), (mode, offset, length))
                # What lies beyond the end is left out.
                for mode in (hole | keep, zero | keep):
                    os.pwrite(fd, b"f" * 131072, SIZE - 131072)
                    fallocate(fd, mode, SIZE - 65536, MIB)
                    model[SIZE - 131072:] = b"f" * 65536 + bytes(65536)
                    fallocate(fd, mode, SIZE, MIB) if IS_GANTRY or mode & hole else None
                    self.assertEqual(os.pread(fd, SIZE, 0), bytes(model), mode)
                if IS_GANTRY:
                    self.assert_errno(errno.ENOSPC, fallocate, fd, zero, SIZE, 4096)
                    self.assert_errno(errno.ENOSPC, fallocate, fd, 0, SIZE, 4096)
                self.assertEqual(at.size(), SIZE)
                for mode in (hole, modes.FALLOC_COLLAPSE_RANGE, modes.FALLOC_INSERT_RANGE, hole | zero | keep, 0x40):
                    self.assert_errno((errno.EOPNOTSUPP, errno.EINVAL), fallocate, fd, mode, 0, 4096)
                self.assert_errno(errno.EFBIG, fallocate, fd, zero, (1 << 63) - 4096, 8192)
                self.assert_errno(errno.EINVAL, fallocate, fd, hole | keep, 0, 0)
                os.posix_fallocate(fd, 0, SIZE)  # by the node, or by the C library
                self.assertEqual(os.pread(fd, SIZE, 0), bytes(model))
                os.close(fd)
                at.daemon.stop()
                self.assertEqual(self.contents(at.image, form), bytes(model))
                self.check_image(at.image, form)

    def test_holes_are_those_of_the_image(self):
        image = self.raw_image("i", 16 * MIB, lambda n: text_block(n) if n % 7 in (1, 2, 5) else None)
        with open(image, "r+b") as file:
            wanted = extents(file.fileno())
            at = self.mount(image=image)
            fd = at.open()
            self.assertGreater(len(wanted), 60)
            self.assertEqual(extents(fd), wanted)
            rng = random.Random(2)
            # (At the end the reference finds a hole, which no other file system does.)
            ends = [16 * MIB, 16 * MIB + 1] if IS_GANTRY else []
            for offset in [rng.randrange(16 * MIB) for _ in range(300)] + [0, 1, 65535, 65536, 16 * MIB - 1, *ends]:
                for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                    answers = []
                    for of in (file.fileno(), fd):
                        try:
                            answers.append(os.lseek(of, offset, whence))
                        except OSError as error:
                            answers.append(errno.errorcode[error.errno])
                    self.assertEqual(answers[1], answers[0], (offset, whence))
            punch(fd, 0, 8 * MIB)
            os.pwrite(fd, b"x" * MIB, 3 * MIB)
            self.assertEqual(extents(fd), extents(file.fileno()))
            self.assertEqual(extents(fd)[0], (3 * MIB, 4 * MIB))

    def test_holes_of_qcow2(self):
        at = self.mount("qcow2", 64 * MIB)
        fd = at.open()
        self.assertEqual(extents(fd), [])
        self.assert_errno(errno.ENXIO, os.lseek, fd, 0, os.SEEK_DATA)
        self.assertEqual(os.lseek(fd, 5, os.SEEK_HOLE), 5)
        os.pwrite(fd, b"x" * 65536, MIB)
        os.pwrite(fd, b"x" * 65536, 32 * MIB)
        self.assertEqual(extents(fd), [(MIB, MIB + 65536), (32 * MIB, 32 * MIB + 65536)])
        self.assertEqual(os.lseek(fd, MIB + 5, os.SEEK_DATA), MIB + 5)
        self.assertEqual(os.lseek(fd, MIB + 5, os.SEEK_HOLE), MIB + 65536)
        punch(fd, MIB, 65536)
        self.assertEqual(extents(fd), [(32 * MIB, 32 * MIB + 65536)])
        self.assertEqual(os.lseek(fd, 33 * MIB, os.SEEK_HOLE), 33 * MIB)
        for whence in (os.SEEK_DATA, os.SEEK_HOLE) if IS_GANTRY else (os.SEEK_DATA,):
            self.assert_errno(errno.ENXIO, os.lseek, fd, 64 * MIB, whence)

    def test_a_backing_file_shows_through(self):
        require("qemu-img")
        base = self.raw_image("base", SIZE, text_block)
        image = self.path("top.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
        at = self.mount("qcow2", image=image)
        self.assertEqual(checksum(at.path), checksum(base))
        before = checksum(base)
        fd = at.open()
        os.pwrite(fd, b"x" * 1000, 100)
        punch(fd, 65536, 65536)
        self.assertEqual(os.pread(fd, 3 * 65536, 0),
                         text_block(0)[:100] + b"x" * 1000 + text_block(0)[1100:] + bytes(65536) + text_block(2))
        self.assertEqual(checksum(base), before)

    def test_resize_from_outside(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, lambda n: b"d" * 65536),
                                mountpoint=self.path("f" + form))
                fd, direct = at.open(), at.open(os.O_RDWR | os.O_DIRECT)
                for size in (6 * MIB, 8 * MIB, 5 * MIB, 12 * MIB):
                    self.assertEqual(os.fstat(fd).st_size, os.stat(at.path).st_size)  # remembered by the kernel now
                    at.qmp.cmd("block_resize", {"node-name": "disk", "size": size})
                    if not IS_GANTRY:
                        wait_for(lambda size=size: os.fstat(fd).st_size == size, "the reference's attributes to expire")
                    self.assertEqual((os.fstat(fd).st_size, os.stat(at.path).st_size), (size, size), "at once")
                    self.assertEqual(os.lseek(fd, 0, os.SEEK_END), size)
                    self.assertEqual(os.pread(fd, 1024, size - 512), bytes(512))
                    self.assertEqual(os.pread(direct, 4096, size), b"")
                    self.assertEqual(os.pwrite(fd, b"n" * 512, size - 512), 512)
                with mmap.mmap(fd, 12 * MIB) as view:
                    view[12 * MIB - 1:] = b"!"
                    view.flush()
                self.assertEqual(os.pread(direct, 512, 12 * MIB - 512), b"n" * 511 + b"!")

    def test_resize_of_a_mapped_file(self):
        require_gantry("the kernel learns of it at once")
        at = self.mount("raw", SIZE)
        fd = at.open()
        with mmap.mmap(fd, SIZE) as view:
            view[:4096] = b"m" * 4096
            view[SIZE - 4096:] = b"n" * 4096
            at.qmp.cmd("block_resize", {"node-name": "disk", "size": MIB})
            self.assertEqual(os.fstat(fd).st_size, MIB)
            at.qmp.cmd("block_resize", {"node-name": "disk", "size": SIZE})
            self.assertEqual(os.fstat(fd).st_size, SIZE)  # pages beyond the end the kernel knows of are SIGBUS
            self.assertEqual(view[:4096], b"m" * 4096)
            self.assertEqual(view[SIZE - 4096:], bytes(4096))


class Together(FuseCase):
    """Several doors to one node."""

    def test_two_files_of_one_node(self):
        require_gantry("the reference lets the kernel keep pages of each")
        one = self.mount("qcow2", SIZE)
        two = self.add_export(one)
        a, b = one.open(), two.open()
        self.assertNotEqual(os.fstat(a).st_dev, os.fstat(b).st_dev)
        rng = random.Random(4)
        model = bytearray(SIZE)
        for _ in range(300):
            fd, other = (a, b) if rng.random() < 0.5 else (b, a)
            length = rng.choice((1, 512, 4096, 70000))
            offset = rng.randrange(SIZE - length)
            model[offset:offset + length] = data = rng.randbytes(length)
            os.pwrite(fd, data, offset)
            self.assertEqual(os.pread(other, length, offset), data)
        self.assertEqual(os.pread(a, SIZE, 0), bytes(model))
        self.assertEqual(os.pread(b, SIZE, 0), bytes(model))
        os.ftruncate(a, 2 * MIB)
        self.assertEqual(os.fstat(b).st_size, 2 * MIB)

    def test_a_file_and_nbd(self):
        require_gantry("the reference allows one of them")
        nbd = gantry_test.libnbd()
        at = self.mount("qcow2", SIZE)
        socket = self.start_nbd(at.qmp)
        at.qmp.cmd("block-export-add", {"type": "nbd", "id": "n", "node-name": "disk", "name": "disk", "writable": True})
        client = nbd.NBD()
        client.connect_uri(self.uri(socket, "disk"))
        fd = at.open()
        os.pwrite(fd, b"from the file", 65530)
        self.assertEqual(client.pread(13, 65530), b"from the file")
        client.pwrite(b"n" * 1024, 65536)
        self.assertEqual(os.pread(fd, 1030, 65530), b"from t" + b"n" * 1024)
        client.trim(65536, 65536)
        self.assertEqual(os.pread(fd, 65536, 65536), bytes(65536))
        client.shutdown()

    def test_queries(self):
        at = self.mount("raw", SIZE)
        (export,) = at.qmp.cmd("query-block-exports")
        self.assertEqual((export["id"], export["type"], export["node-name"], export["shutting-down"]),
                         ("e", "fuse", "disk", False))
        if IS_GANTRY:
            self.assertEqual((export["transport"], export["transport-reason"]), ("classic", "classic: as asked"))

    def test_closes_by_thousands(self):
        at = self.mount("raw", SIZE)
        for i in range(2000):
            fd = os.open(at.path, (os.O_RDONLY, os.O_RDWR, os.O_WRONLY)[i % 3])
            if i % 3:
                os.pwrite(fd, b"x", i)
            os.close(fd)
        self.assertEqual(at.size(), SIZE)
        # The last of them may still be on its way.
        at.qmp.delete_export("e")
        wait_for(lambda: not at.is_mounted(), "the mount to go")


if __name__ == "__main__":
    gantry_test.main()
