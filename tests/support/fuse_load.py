#!/usr/bin/python3
"""A program that works on a file until it is told to end, or cannot any more; and Load, which runs it.

    fuse_load.py FILE PROGRESS THREADS BLOCK_BYTES COUNT [direct]

Each thread has COUNT blocks of the file for itself and writes numbers into them, one after the other, around and around: its n-th
write puts n into block n % COUNT. Now and then it flushes, or reads back what it has written. PROGRESS holds for each thread, 8
bytes each: writes begun, writes done, the last write that was followed by a flush.
"""

import errno
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading

import gantry_test

FIELDS = 3


def block(thread, number, size):
    return struct.pack("<II", thread + 1, number) * (size // 8)


def work(fd, progress, thread, size, count, stop, fail):
    page = mmap.mmap(-1, size)
    begun = 0

    def note(field, value):
        struct.pack_into("<Q", progress, (thread * FIELDS + field) * 8, value)
    try:
        while not stop.is_set():
            begun += 1
            note(0, begun)
            at = (thread * count + begun % count) * size
            page[:] = data = block(thread, begun, size)
            if os.pwritev(fd, [page], at) != size:
                raise OSError(errno.EIO, "short write")
            note(1, begun)
            if begun % 5 == 0:
                if os.preadv(fd, [page], at) != size or page[:] != data:
                    fail("DIFFERENT")
            if begun % 37 == 0:
                os.fdatasync(fd)
                note(2, begun)
    except OSError as error:
        fail(errno.errorcode.get(error.errno, str(error)))


def main():
    path, progress_path, threads, size, count = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    stop, failures = threading.Event(), []
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with open(progress_path, "r+b") as file:
        progress = mmap.mmap(file.fileno(), 0)
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if "direct" in sys.argv[6:] else 0))

    def fail(text):
        failures.append(text)
        stop.set()
    workers = [threading.Thread(target=work, args=(fd, progress, i, size, count, stop, fail)) for i in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.join(0.05)
    try:
        os.close(fd)
    except OSError as error:
        failures.append("close " + errno.errorcode[error.errno])
    print(json.dumps(failures))


class Load:
    """The program at work on `path` in a test `case`; it ends with the test at the latest."""

    def __init__(self, case, path, threads=3, size=4096, count=64, direct=False):
        self.case, self.threads, self.size, self.count = case, threads, size, count
        self.progress = os.path.join(case.dir, f"progress{os.urandom(4).hex()}")
        with open(self.progress, "wb") as file:
            file.truncate(threads * FIELDS * 8)
        self.process = subprocess.Popen([sys.executable, __file__, path, self.progress, str(threads), str(size), str(count),
                                         *(["direct"] if direct else [])], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        text=True)
        case.addCleanup(self.kill)

    def numbers(self, field):
        with open(self.progress, "rb") as file:
            data = file.read()
        return [struct.unpack_from("<Q", data, (i * FIELDS + field) * 8)[0] for i in range(self.threads)]

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        try:
            self.process.wait(gantry_test.DEADLINE)
        except subprocess.TimeoutExpired:
            self.case.fail("the load does not end although it was killed: a request of it is not answered")
        self.process.stdout.close()

    def under_way(self, writes=100):
        """Returns once each thread has written that much more."""
        before = self.numbers(1)

        def written_enough():
            if self.process.poll() is not None:
                self.case.fail(f"the load ended: {self.process.stdout.read()}")
            return all(last >= then + writes for last, then in zip(self.numbers(1), before))
        gantry_test.wait_for(written_enough, f"{writes} writes by each of {self.threads} threads; now {self.numbers(1)}, before {before}")
        return self

    def result(self):
        """What failed, once it has ended by itself."""
        try:
            out, _ = self.process.communicate(timeout=gantry_test.DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            self.case.fail("the load did not end")
        return json.loads(out)

    def stop(self):
        """Tells it to end; nothing has failed."""
        self.process.send_signal(signal.SIGTERM)
        self.case.assertEqual(self.result(), [])

    def check(self, data, field):
        """`data` has everything that was done (field 1) or flushed (field 2), and nothing that was never written."""
        begun, sure = self.numbers(0), self.numbers(field)
        for thread in range(self.threads):
            for index in range(self.count):
                at = (thread * self.count + index) * self.size
                owner, number = struct.unpack_from("<II", data, at)
                part = data[at:at + self.size]
                last = sure[thread] - (sure[thread] - index) % self.count  # the last sure write to this block
                if number == 0 and last <= 0:
                    continue
                self.case.assertEqual((owner, number % self.count), (thread + 1, index), f"block {index} of thread {thread}")
                self.case.assertEqual(part, block(thread, number, self.size), "all of a block is of one write")
                self.case.assertTrue(last <= number <= begun[thread],
                                     f"block {index} of thread {thread} has write {number}; sure was {last}")


if __name__ == "__main__":
    main()
