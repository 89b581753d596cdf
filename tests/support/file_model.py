"""Random operations on a file and on a copy of it in memory, in the way of fsx: whatever is read must be what the copy says."""

import contextlib
import errno
import fcntl
import mmap
import os
import random

import fuse_case

PAGE = mmap.PAGESIZE
KEEP, PUNCH, ZERO = fuse_case.FALLOC_KEEP_SIZE, fuse_case.FALLOC_PUNCH_HOLE, fuse_case.FALLOC_ZERO_RANGE


class FileModel:
    """`path` within [begin, begin + room). Whoever has all of the file may change its size (`resizes`), up to `room`.

    `unit`: offsets and lengths are multiples of it, sizes of `size_unit`, what O_DIRECT takes of
    `direct_unit`, memory too. Errors name the operation, and the seed finds it again.
    """

    def __init__(self, path, seed, *, begin=0, room, resizes=False, growable=False, maps=True, punches=True, unit=1,
                 size_unit=1, direct_unit=1, log_length=30):
        self.path, self.begin, self.room, self.unit, self.size_unit = path, begin, room, unit, max(unit, size_unit)
        self.direct_unit = direct_unit
        self.resizes, self.growable = resizes, growable
        self.rng = random.Random(seed)
        self.seed, self.count, self.log = seed, 0, []
        self.log_length = log_length
        self.fd = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.page = mmap.mmap(-1, room + PAGE)
        size = min(room, max(0, os.fstat(self.fd).st_size - begin))
        self.data = bytearray(os.pread(self.fd, size, begin))
        self.operations = [self.read] * 5 + [self.write] * 5 + [self.punch, self.zero, self.zero_keep, self.sync, self.reopen,
                                                                self.holes, self.read_direct, self.write_direct]
        if maps:
            self.operations += [self.map_read, self.map_write] * 2
        if not punches:
            self.operations.remove(self.punch)
        if resizes:
            self.operations += [self.truncate] * 2
        if growable:
            self.operations += [self.append, self.write_beyond, self.zero_beyond, self.allocate]

    def close(self):
        os.close(self.fd)
        os.close(self.direct)

    # --- what to operate on

    def length(self):
        size = max(len(self.data), self.unit)
        pick = self.rng.randrange(10)
        wanted = self.rng.randrange(1, 5000) if pick < 5 else 4096 if pick == 5 else 65536 if pick == 6 \
            else self.rng.randrange(1, size + 1)
        return max(self.unit, min(wanted, size) // self.unit * self.unit)

    def range(self):
        """(offset, length) within the data; (0, 0) when there is none."""
        length = min(self.length(), len(self.data) // self.unit * self.unit)
        if not length:
            return 0, 0
        offset = self.rng.randrange(len(self.data) - length + 1) // self.unit * self.unit
        if self.rng.randrange(8) == 0:
            offset = len(self.data) // self.unit * self.unit - length
        if self.rng.randrange(4) == 0:
            offset = offset // 4096 * 4096
        return offset, length

    def fresh(self, length):
        kind = self.rng.randrange(8)
        return bytes(length) if kind == 0 else bytes([self.rng.randrange(1, 256)]) * length if kind == 1 \
            else self.rng.randbytes(length)

    def note(self, what, *about):
        self.log = self.log[1 - self.log_length:] + [(self.count, what, *about)]

    def fail(self, text):
        raise AssertionError(f"{text} (seed {self.seed}, operation {self.count}); the last: {self.log}")

    def compare(self, found, offset, length):
        wanted = bytes(self.data[offset:offset + length])
        if found != wanted:
            if len(found) != len(wanted):
                self.fail(f"{len(found)} bytes at {offset} instead of {len(wanted)}")
            bad = next(i for i in range(length) if found[i] != wanted[i])
            last = next(i for i in range(length - 1, -1, -1) if found[i] != wanted[i])
            self.fail(f"bytes [{offset + bad}, {offset + last}] differ: {found[bad:bad + 8].hex()} instead of "
                      f"{wanted[bad:bad + 8].hex()}")

    # --- operations

    def read(self):
        offset, length = self.range()
        self.note("read", offset, length)
        self.compare(os.pread(self.fd, length, self.begin + offset), offset, length)

    def direct_range(self):
        """(offset, length, place in memory) that O_DIRECT takes."""
        offset, length = self.range()
        begin = self.rng.choice((0, 0, 512, self.rng.randrange(PAGE)))
        return tuple(number // self.direct_unit * self.direct_unit for number in (offset, length, begin))

    def read_direct(self):
        offset, length, begin = self.direct_range()
        self.note("read_direct", offset, length)
        with memoryview(self.page)[begin:begin + length] as view:
            count = os.preadv(self.direct, [view], self.begin + offset) if length else 0
            self.compare(bytes(view[:count]), offset, length)

    def put(self, offset, data):
        """Like pwrite on the copy; the hole before it reads as zeroes."""
        if offset > len(self.data):
            self.data += bytes(offset - len(self.data))
        self.data[offset:offset + len(data)] = data

    def written(self, count, length):
        if count != length:
            self.fail(f"{count} of {length} bytes were written")

    def write(self):
        offset, length = self.range()
        self.note("write", offset, length)
        data = self.fresh(length)
        self.written(os.pwrite(self.fd, data, self.begin + offset), length)
        self.put(offset, data)

    def write_direct(self):
        offset, length, begin = self.direct_range()
        self.note("write_direct", offset, length)
        data = self.fresh(length)
        with memoryview(self.page)[begin:begin + length] as view:
            view[:] = data
            self.written(os.pwritev(self.direct, [view], self.begin + offset) if length else 0, length)
        self.put(offset, data)

    @contextlib.contextmanager
    def mapped(self, offset, length, access):
        first = (self.begin + offset) // PAGE * PAGE
        skip = self.begin + offset - first
        with mmap.mmap(self.fd, skip + length, access=access, offset=first) as view:
            yield view, skip

    def map_read(self):
        offset, length = self.range()
        self.note("map_read", offset, length)
        if length:
            with self.mapped(offset, length, mmap.ACCESS_READ) as (view, skip):
                self.compare(view[skip:skip + length], offset, length)

    def map_write(self):
        offset, length = self.range()
        self.note("map_write", offset, length)
        if length:
            data = self.fresh(length)
            with self.mapped(offset, length, mmap.ACCESS_WRITE) as (view, skip):
                view[skip:skip + length] = data
                if self.rng.random() < 0.7:
                    view.flush()
            self.put(offset, data)

    def fallocate(self, mode, offset, length):
        if length:
            fuse_case.fallocate(self.fd, mode, self.begin + offset, length)

    def punch(self):
        offset, length = self.range()
        self.note("punch", offset, length)
        self.fallocate(PUNCH | KEEP, offset, length)
        self.put(offset, bytes(length))

    def zero_keep(self):
        offset, length = self.range()
        self.note("zero_keep", offset, length)
        self.fallocate(ZERO | KEEP, offset, length)
        self.put(offset, bytes(length))

    def zero(self):
        offset, length = self.range()
        self.note("zero", offset, length)
        self.fallocate(ZERO, offset, length)
        self.put(offset, bytes(length))

    def sync(self):
        self.note("sync")
        (os.fsync if self.rng.random() < 0.5 else os.fdatasync)(self.fd)

    def reopen(self):
        self.note("reopen")
        other = os.open(self.path, os.O_RDWR)
        os.close(self.fd)
        self.fd = other

    def holes(self):
        """What is said to be a hole reads as zeroes."""
        offset, length = self.range()
        self.note("holes", offset, length)
        if not length:
            return
        begin, end = self.begin + offset, self.begin + len(self.data)
        try:
            data = os.lseek(self.fd, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end
        hole = os.lseek(self.fd, begin, os.SEEK_HOLE)
        # Between the two calls zeroes that others read may become data: ext4 counts what is in its page cache.
        alone = self.resizes
        if data < begin or hole < begin or (alone and (data > begin) != (hole == begin)):
            self.fail(f"from {begin} on data begins at {data}, and a hole at {hole}")
        part = self.data[offset:min(data, end) - self.begin]
        if part.count(0) != len(part):
            self.fail(f"data at {begin} and beyond; the next is said to be at {data}")

    def truncate(self):
        size = self.rng.randrange(self.room // self.size_unit + 1) * self.size_unit
        self.note("truncate", len(self.data), size)
        os.ftruncate(self.fd, size)
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data += bytes(size - len(self.data))
        self.check_size()

    def beyond(self):
        offset = self.rng.randrange((self.room - self.size_unit) // self.unit) * self.unit
        return offset, self.up_to(offset, min(self.length(), self.room - offset))

    def up_to(self, offset, length):
        """At most `length` bytes at `offset`, of which those beyond the end make a size; at least one."""
        end = offset + length
        if end > len(self.data):
            end = end // self.size_unit * self.size_unit
        if end <= offset:
            end = offset // self.size_unit * self.size_unit + self.size_unit
        return (end - offset) // self.unit * self.unit

    def write_beyond(self):
        offset, length = self.beyond()
        self.note("write_beyond", len(self.data), offset, length)
        data = self.fresh(length)
        self.written(os.pwrite(self.fd, data, offset), length)
        self.put(offset, data)
        self.check_size()

    def append(self):
        length = min(self.length(), self.room - len(self.data)) // self.size_unit * self.size_unit
        self.note("append", len(self.data), length)
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_APPEND)
        data = self.fresh(length)
        if length:
            self.written(os.write(self.fd, data), length)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags)
        self.data += data
        self.check_size()

    def zero_beyond(self):
        offset, length = self.beyond()
        self.note("zero_beyond", len(self.data), offset, length)
        self.fallocate(ZERO, offset, length)
        self.put(offset, bytes(length))
        self.check_size()

    def allocate(self):
        length = min(self.length(), self.room - len(self.data)) // self.size_unit * self.size_unit
        self.note("allocate", len(self.data), length)
        if length:
            self.fallocate(0, len(self.data), length)
            self.data += bytes(length)
        self.check_size()

    def check_size(self):
        size = os.fstat(self.fd).st_size
        if size != len(self.data):
            self.fail(f"the file has {size} bytes instead of {len(self.data)}")

    # ---

    def run(self, operations):
        for _ in range(operations):
            self.count += 1
            try:
                self.rng.choice(self.operations)()
            except OSError as error:
                self.fail(f"errno {errno.errorcode[error.errno]}")
        self.note("all")
        if self.resizes:
            self.check_size()
        self.compare(os.pread(self.fd, len(self.data), self.begin), 0, len(self.data))
