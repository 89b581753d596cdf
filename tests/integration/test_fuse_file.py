#!/usr/bin/python3
"""An image as a file: what programs see of it, by every call that works on files."""

import errno
import fcntl
import mmap
import os
import pathlib
import random
import stat
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from fuse_case import FuseCase, punch
from gantry_test import IS_GANTRY, MIB, checksum, require_gantry, text_block, wait_for

FORMATS = ("raw", "qcow2")
SIZE = 4 * MIB


class Attributes(FuseCase):
    def test_stat(self):
        for form in FORMATS:
            for writable in (True, False):
                with self.subTest(form=form, writable=writable):
                    name = f"{form}{writable}"
                    at = self.mount(form, image=self.make_image(form, SIZE, name), mountpoint=self.path("f" + name),
                                    writable=writable)
                    about = os.stat(at.path)
                    self.assertTrue(stat.S_ISREG(about.st_mode))
                    self.assertEqual(stat.S_IMODE(about.st_mode), 0o600 if writable else 0o400)
                    self.assertEqual((about.st_nlink, about.st_size), (1, SIZE))
                    self.assertEqual((about.st_uid, about.st_gid), (os.geteuid(), os.getegid()))
                    if IS_GANTRY:
                        self.assertGreaterEqual(about.st_blksize, 4096)
                        self.assertEqual(about.st_blksize & (about.st_blksize - 1), 0)
                    self.assertNotEqual(about.st_dev, os.stat(self.dir).st_dev)
                    at.daemon.stop()
                    self.assertEqual(os.stat(at.path).st_size, 0, "what it covered is there again")

    def test_blocks_are_what_is_allocated(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, 16 * MIB, form, pattern=lambda n: b"x" * 65536 if n < 16 else None),
                                mountpoint=self.path("f" + form))
                self.assertTrue(MIB // 512 <= at.blocks() < 8 * MIB // 512, at.blocks())
                fd = at.open()
                os.pwrite(fd, b"y" * 4 * MIB, 8 * MIB)
                os.fsync(fd)
                wait_for(lambda: 5 * MIB // 512 <= at.blocks() < 12 * MIB // 512, "the blocks written to count")
                punch(fd, 8 * MIB, 4 * MIB)
                wait_for(lambda: at.blocks() < 4 * MIB // 512, "the blocks punched out to count no more")

    def test_times_tell_of_changes(self):
        require_gantry("the reference answers with the present at each call")
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form), mountpoint=self.path("f" + form), growable=True)
                fd = at.open()

                def changes(what, *arguments):
                    before = [float(number) for number in at.status("%.Y %.Z").split()]

                    def both_later():  # the clock goes on in steps
                        what(*arguments)
                        now = [float(number) for number in at.status("%.Y %.Z").split()]
                        return now[0] > before[0] and now[1] > before[1]
                    wait_for(both_later, "later times")

                changes(os.pwrite, fd, b"x", 5)
                changes(os.ftruncate, fd, 2 * MIB)
                changes(punch, fd, 0, 65536)
                changes(os.pwrite, fd, b"x", 3 * MIB)
                before = at.status("%.Y %.Z")
                os.pread(fd, 4096, 0)
                os.lseek(fd, 0, os.SEEK_DATA)
                os.fsync(fd)
                os.close(at.open(os.O_RDONLY))
                self.assertEqual(at.status("%.Y %.Z"), before, "reading changes nothing")

    def test_chmod_and_chown(self):
        at = self.mount("raw", SIZE, allow_other="on")
        os.chmod(at.path, 0o644)
        self.assertEqual(at.status("%a"), "644")
        os.chmod(at.path, 0o1751)
        self.assertEqual(at.status("%a %F"), "1751 regular file" if at.size() else "")
        os.chown(at.path, 12, 34)
        self.assertEqual(at.status("%u %g"), "12 34")
        os.chown(at.path, -1, 56)
        self.assertEqual(at.status("%u %g"), "12 56")

    def test_chmod_and_chown_of_a_private_mount(self):
        at = self.mount("raw", SIZE, allow_other="off")
        os.chmod(at.path, 0o400)
        os.chmod(at.path, 0o700)
        self.assertEqual(at.status("%a"), "700")
        for mode in (0o640, 0o604, 0o610, 0o701):
            self.assert_errno(errno.EPERM, os.chmod, at.path, mode)
        self.assert_errno(errno.EOPNOTSUPP, os.chown, at.path, 12, -1)
        self.assert_errno(errno.EOPNOTSUPP, os.chown, at.path, -1, 34)
        self.assertEqual(at.status("%a %u %g"), f"700 {os.geteuid()} {os.getegid()}")

    def test_utimes(self):
        require_gantry("the reference refuses them")
        at = self.mount("raw", SIZE)
        os.utime(at.path)
        os.utime(at.path, (1, 2))
        self.run_tool("touch", at.path)
        source = self.raw_image("other", SIZE, text_block)
        self.run_tool("cp", "-p", source, at.path)
        self.assertEqual(checksum(at.path), checksum(source))

    def test_read_only(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, text_block), mountpoint=self.path("f" + form),
                                writable=False)
                if IS_GANTRY:  # the reference lets root open what nobody can write
                    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND):
                        self.assert_errno((errno.EACCES, errno.EROFS), os.open, at.path, flags)
                self.assert_errno((errno.EACCES, errno.EROFS), os.truncate, at.path, 0)
                self.assert_errno(errno.EROFS, os.chmod, at.path, 0o600)
                fd = at.open(os.O_RDONLY)
                self.assert_errno(errno.EBADF, os.pwrite, fd, b"x", 0)
                self.assert_errno((errno.EBADF, errno.EACCES, errno.EROFS), punch, fd, 0, 4096)
                with mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view:
                    self.assertEqual(view[:65536], text_block(0))
                self.assertEqual(os.pread(fd, 65536, 65536), text_block(1))
                self.assertEqual(at.size(), SIZE)

    def test_statfs(self):
        at = self.mount("raw", SIZE)
        about = os.statvfs(at.path)
        self.assertGreater(about.f_bsize, 0)
        if IS_GANTRY:
            self.assertEqual((about.f_bsize, about.f_frsize, about.f_namemax), (4096, 4096, 255))
            self.assertEqual((about.f_blocks, about.f_bavail), (SIZE // 4096, 0))
        self.run_tool("df", at.path)
        self.run_tool("stat", "-f", at.path)

    def test_names_stay(self):
        at = self.mount("raw", SIZE)
        self.assert_errno(errno.EBUSY, os.unlink, at.path)
        self.assert_errno(errno.EBUSY, os.rename, at.path, self.path("elsewhere"))
        pathlib.Path(self.path("other")).touch()
        self.assert_errno(errno.EBUSY, os.rename, self.path("other"), at.path)
        self.assert_errno(errno.EXDEV, os.link, at.path, self.path("elsewhere"))
        self.assert_errno(errno.ENOTDIR, os.stat, at.path + "/x")
        self.assert_errno(errno.EEXIST, os.open, at.path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        self.assertEqual(at.size(), SIZE)

    def test_what_there_is_not(self):
        at = self.mount("raw", SIZE)
        fd = at.open()
        for where in (at.path, fd):
            self.assert_errno(errno.EOPNOTSUPP, os.getxattr, where, "user.a")
            self.assert_errno(errno.EOPNOTSUPP, os.setxattr, where, "user.a", b"b")
            self.assert_errno(errno.EOPNOTSUPP, os.removexattr, where, "user.a")
            self.assert_errno(errno.EOPNOTSUPP, os.listxattr, where)
        for request in (0x80081272, 0x1268, 0x5413):  # BLKGETSIZE64, BLKSSZGET, TIOCGWINSZ
            self.assert_errno(errno.ENOTTY, fcntl.ioctl, fd, request, bytes(8))

    def test_locks(self):
        at = self.mount("raw", SIZE)
        one, two = at.open(), at.open()
        fcntl.flock(one, fcntl.LOCK_EX)
        self.assert_errno(errno.EWOULDBLOCK, fcntl.flock, two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_EX, 100, 0)
        script = "import fcntl, os, sys; fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, {})"
        self.assertIn("BlockingIOError", self.run_tool(sys.executable, "-c", script.format(99), at.path, check=False).stderr)
        self.run_tool(sys.executable, "-c", script.format(100), at.path)


class Contents(FuseCase):
    """Reading and writing within a size that stays."""

    def test_any_alignment(self):
        for form in FORMATS:
            for direct in (0, os.O_DIRECT):
                with self.subTest(form=form, direct=bool(direct)):
                    name = f"{form}{direct}"
                    at = self.mount(form, image=self.make_image(form, SIZE, name), mountpoint=self.path("f" + name))
                    fd = at.open(os.O_RDWR | direct)
                    model, rng = bytearray(SIZE), random.Random(form)
                    # Memory of a page of its own each: what is odd is the place in the file, and in the page.
                    page = mmap.mmap(-1, 2 * MIB)
                    lengths = (1, 2, 511, 512, 513, 4095, 4096, 4097, 65535, 65537, MIB, MIB + 3)
                    for length in lengths if IS_GANTRY or not direct else lengths[:-2]:
                        # (the reference mixes up the data of several large requests that come at a time)
                        for offset in (0, 1, 511, 512, 4095, 65535, rng.randrange(SIZE - length), SIZE - length):
                            begin = rng.randrange(4096)
                            view = memoryview(page)[begin:begin + length]
                            view[:] = data = rng.randbytes(length)
                            self.assertEqual(os.pwrite(fd, view, offset), length)
                            model[offset:offset + length] = data
                            around = max(0, offset - 7)
                            wanted = model[around:offset + length + 7]
                            view = memoryview(page)[begin:begin + len(wanted)]
                            self.assertEqual(os.preadv(fd, [view], around), len(wanted))
                            self.assertEqual(view, wanted)
                    view = None
                    os.close(fd)
                    at.daemon.stop()
                    self.assertEqual(self.contents(at.image, form), bytes(model))
                    self.check_image(at.image, form)

    def test_vectors(self):
        at = self.mount("qcow2", SIZE)
        fd = at.open()
        parts = [bytes([i + 1]) * length for i, length in enumerate((1, 4096, 7, 65536, 512, 300000))]
        self.assertEqual(os.pwritev(fd, parts, 12345), sum(map(len, parts)))
        back = [bytearray(len(part)) for part in reversed(parts)]
        self.assertEqual(os.preadv(fd, back, 12345), sum(map(len, parts)))
        self.assertEqual(b"".join(back), b"".join(parts))
        many = [bytes([i % 256]) * 3 for i in range(1000)]
        self.assertEqual(os.pwritev(fd, many, SIZE - 3000), 3000)
        self.assertEqual(os.pread(fd, 4000, SIZE - 3000), b"".join(many))
        os.lseek(fd, 100, os.SEEK_SET)
        self.assertEqual(os.write(fd, b"abc"), 3)
        self.assertEqual(os.lseek(fd, 0, os.SEEK_CUR), 103)
        self.assertEqual(os.lseek(fd, -3, os.SEEK_END), SIZE - 3)

    def test_the_end(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, text_block), mountpoint=self.path("f" + form))
                fd = at.open()
                last = os.pread(fd, 100, SIZE - 100)
                self.assertEqual(os.pread(fd, 4096, SIZE - 100), last)
                self.assertEqual(os.pread(fd, 2 * MIB, SIZE - 100), last)
                for offset in (SIZE, SIZE + 1, SIZE + 4096, 1 << 40, (1 << 63) - 4097):
                    self.assertEqual(os.pread(fd, 4096, offset), b"")
                # The part that fits is written.
                self.assertEqual(os.pwrite(fd, b"z" * 300, SIZE - 100), 100)
                self.assertEqual(os.pread(fd, 4096, SIZE - 100), b"z" * 100)
                self.assertEqual(os.pwrite(fd, b"y" * 2 * MIB, SIZE - MIB), MIB)
                full = errno.ENOSPC if IS_GANTRY else errno.EIO
                for offset in (SIZE, SIZE + 1, SIZE + MIB, 1 << 40):
                    self.assert_errno(full, os.pwrite, fd, b"x", offset)
                append = at.open(os.O_WRONLY | os.O_APPEND)
                self.assert_errno(full, os.write, append, b"x")
                self.assertEqual(at.size(), SIZE)
                self.assertEqual(os.pread(fd, SIZE, SIZE - MIB), b"y" * MIB)

    def test_every_odd_size(self):
        require_gantry("the reference wants multiples of 512")
        for size in (1, 511, 513, 4095, 4097, 1000003):
            with self.subTest(size=size):
                image = self.raw_image(f"i{size}", size, text_block)
                at = self.mount(image=image, mountpoint=self.path(f"f{size}"))
                self.assertEqual(at.size(), size)
                self.assertEqual(checksum(at.path), checksum(image))
                fd = at.open()
                self.assertEqual(os.pread(fd, 100, size), b"")
                self.assertEqual(os.pwrite(fd, b"END+", size - 1), 1)
                self.assert_errno(errno.ENOSPC, os.pwrite, fd, b"x", size)
                with mmap.mmap(fd, size) as view:
                    self.assertEqual(view[size - 1:], b"E")
                    view[0:1] = b"B"
                    view.flush()
                os.close(fd)
                at.daemon.stop()
                self.assertEqual(os.path.getsize(image), size)
                with open(image, "rb") as file:
                    data = file.read()
                self.assertEqual((data[:1], data[-1:]), (b"B" if size > 1 else b"B", b"E" if size > 1 else b"B"))

    def test_o_trunc_leaves_the_size(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, text_block), mountpoint=self.path("f" + form))
                fd = at.open(os.O_RDWR | os.O_TRUNC)
                self.assertEqual(os.fstat(fd).st_size, SIZE)
                self.assertEqual(os.lseek(fd, 0, os.SEEK_END), SIZE)
                self.assertEqual(os.pread(fd, 65536, 65536), text_block(1))
                self.run_tool("sh", "-c", f"printf abc > {at.path}")
                self.assertEqual(os.pread(fd, 7, 0), b"abc" + text_block(0)[3:7])
                small = self.raw_image("small" + form, 100000, lambda n: b"s" * 65536)
                self.run_tool("cp", small, at.path)
                self.run_tool("dd", f"if={small}", f"of={at.path}", "bs=10000", "count=1")
                self.assertEqual(at.size(), SIZE)
                self.assertEqual(os.pread(fd, 131072, 0), b"s" * 100000 + text_block(1)[100000 - 65536:])

    def test_o_trunc_on_request(self):
        source = self.raw_image("other", 2 * MIB, text_block)
        for form, size in (("raw", 3), ("qcow2", 512)):  # virtual disks consist of sectors
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, text_block), mountpoint=self.path("f" + form),
                                o_trunc="honour", growable=True)
                self.run_tool("sh", "-c", f"printf abc > {at.path}")
                self.assertEqual(at.size(), size)
                self.run_tool("cp", source, at.path)
                self.assertEqual(checksum(at.path), checksum(source))

    def test_tools(self):
        """What people copy with, in and out."""
        pattern = lambda n: random.Random(n).randbytes(65536) if n % 3 else None  # noqa: E731
        source = self.raw_image("source", SIZE, pattern)
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form), mountpoint=self.path("f" + form))
                out = self.path("out" + form)
                for options in (("--sparse=never",), ("--sparse=always",), ("--sparse=auto",), ("--reflink=auto",)):
                    fd = at.open()
                    for begin in range(0, SIZE, MIB):
                        os.pwrite(fd, b"\xa5" * MIB, begin)
                    os.close(fd)
                    # What is sparse in the source cp leaves out of what it has cut; nothing is cut here.
                    self.run_tool("cp", "--sparse=never" if options != ("--sparse=never",) else options[0], source, at.path)
                    self.run_tool("cp", *options, at.path, out)
                    self.assertEqual(checksum(out), checksum(source), options)
                    os.unlink(out)
                for into, outof in ((["bs=64k"], ["bs=64k"]), (["bs=1M", "oflag=direct"], ["bs=1M", "iflag=direct"]),
                                    (["bs=4097"], ["bs=3M"]), (["bs=128k", "conv=notrunc,fsync"], ["bs=128k", "conv=sparse"])):
                    fd = at.open()
                    punch(fd, 0, SIZE)
                    os.close(fd)
                    self.run_tool("dd", f"if={source}", f"of={at.path}", *into)
                    self.run_tool("dd", f"if={at.path}", f"of={out}", *outof)
                    self.assertEqual(checksum(out), checksum(source), (into, outof))
                    os.unlink(out)
                self.run_tool("cmp", source, at.path)
                self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", source, at.path)

    def test_data_that_no_program_touches(self):
        """sendfile, copy_file_range, splice, tee, to and from."""
        source = self.raw_image("source", SIZE, text_block)
        at = self.mount("qcow2", SIZE)
        with open(source, "rb") as data, open(self.path("out"), "w+b") as out:
            fd = at.open()
            sent = 0
            while sent < SIZE:
                sent += os.sendfile(fd, data.fileno(), None, SIZE - sent)
            self.assertEqual(checksum(at.path), checksum(source))
            os.lseek(fd, 0, os.SEEK_SET)
            sent = 0
            while sent < SIZE:
                sent += os.sendfile(out.fileno(), fd, None, SIZE - sent)
            self.assertEqual(checksum(out.name), checksum(source))
            # From another file system is for the caller to do.
            self.assert_errno((errno.EXDEV, errno.EOPNOTSUPP), os.copy_file_range, data.fileno(), fd, SIZE, 0, 0)
            # Within the file: the second half becomes the first.
            copied = 0
            while copied < MIB:
                copied += os.copy_file_range(fd, fd, MIB - copied, copied, 3 * MIB + copied)
            self.assertEqual(os.pread(fd, MIB, 3 * MIB), os.pread(data.fileno(), MIB, 0))
            reader, writer = os.pipe()
            for end in (reader, writer):
                self.addCleanup(os.close, end)
            moved = 0
            while moved < MIB:  # out of the file through a pipe into the file
                n = os.splice(fd, writer, 32768, offset_src=moved)
                m = 0
                while m < n:
                    m += os.splice(reader, fd, n - m, offset_dst=2 * MIB + moved + m)
                moved += n
            self.assertEqual(os.pread(fd, MIB, 2 * MIB), os.pread(data.fileno(), MIB, 0))

    def test_mmap(self):
        for form in FORMATS:
            with self.subTest(form=form):
                at = self.mount(form, image=self.make_image(form, SIZE, form, text_block), mountpoint=self.path("f" + form))
                # (The reference mixes up the data of several requests that come at a time.)
                changes = 200 if IS_GANTRY else 0
                fd, other = at.open(), at.open(os.O_RDWR | os.O_DIRECT)
                with mmap.mmap(fd, SIZE) as view:
                    self.assertEqual(view[65536:131072], text_block(1))
                    view[70000:70005] = b"hello"
                    view.flush()
                    self.assertEqual(os.pread(other, 5, 70000), b"hello")
                    self.assertEqual(os.pread(fd, 7, 69999), text_block(1)[4463:4464] + b"hello" + text_block(1)[4469:4470])
                    os.pwrite(fd, b"HELLO", 70001)  # a write is seen through the mapping
                    self.assertEqual(view[70000:70007], b"hHELLO" + text_block(1)[4470:4471])
                    rng = random.Random(1)
                    model = bytearray(view[:])
                    for _ in range(changes):
                        length = rng.choice((1, 100, 4096, 20000))
                        begin = rng.randrange(SIZE - length)
                        view[begin:begin + length] = model[begin:begin + length] = rng.randbytes(length)
                    view.flush()
                    self.assertEqual(os.pread(other, SIZE, 0), bytes(model))
                with mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE) as view:
                    view[0:5] = b"never"
                    self.assertEqual(view[0:5], b"never")
                self.assertEqual(os.pread(other, SIZE, 0), bytes(model))
                with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:
                    self.assertEqual(len(view), SIZE)
                    self.assertEqual(view[:], bytes(model))
                os.close(fd)
                os.close(other)
                at.daemon.stop()
                self.assertEqual(self.contents(at.image, form), bytes(model))

    def test_a_mapping_is_written_when_it_ends(self):
        at = self.mount("qcow2", SIZE)
        fd = at.open()
        with mmap.mmap(fd, SIZE) as view:
            view[1000:1004] = b"kept"
        os.close(fd)
        fd = at.open(os.O_RDONLY)
        self.assertEqual(os.pread(fd, 4, 1000), b"kept")
        os.close(fd)
        at.daemon.stop()
        self.assertEqual(self.contents(at.image, "qcow2")[1000:1004], b"kept")

    def test_flushes(self):
        """fsync reaches the node, writing does not; what writethrough does is seen when a daemon is killed."""
        require_gantry("the reference does not count these flushes")
        at = self.mount("raw", SIZE)

        def flushes():
            return next(node["stats"]["flush_operations"] for node in at.qmp.cmd("query-blockstats", {"query-nodes": True})
                        if node.get("node-name") == "disk")
        fd, before = at.open(), flushes()
        for i in range(10):
            os.pwrite(fd, b"x" * 4096, i * 8192)
        self.assertEqual(flushes(), before)
        os.fsync(fd)
        self.assertEqual(flushes(), before + 1)
        os.fdatasync(fd)
        os.close(fd)  # nothing was written since
        self.assertGreaterEqual(flushes(), before + 1)
        before = flushes()
        for _ in range(10):
            os.close(at.open(os.O_RDONLY))
            os.close(at.open(os.O_RDWR))
        self.assertEqual(flushes(), before, "who has written nothing flushes nothing")


if __name__ == "__main__":
    gantry_test.main()
