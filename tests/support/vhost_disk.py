"""virtio-blk on top of vhost_front.py: requests in any layout of descriptors, one at a time or many in flight."""

import random
import struct

from vhost_front import Broken, Closed, Device, Msg, Refused  # noqa: F401 (for those who import this)

IN, OUT, FLUSH, FLUSH_OUT, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 5, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNANSWERED = 0xEE  # status before the device has written one
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = (
    1 << n for n in (2, 5, 6, 9, 10, 11, 12, 13, 14))
UNMAP = 1


def segments(*ranges):
    """The data of DISCARD and WRITE_ZEROES: (sector, sectors, flags) each."""
    return b"".join(struct.pack("=QII", *r) for r in ranges)


def cut(total, rng, most=6):
    """Lengths of 1..most pieces of `total` bytes, none of them empty."""
    borders = sorted({rng.randrange(1, total) for _ in range(rng.randrange(most))} if total > 1 else ())
    return [end - start for start, end in zip([0, *borders], [*borders, total])]


class Request:
    """`readable` and `writable` are the pieces in guest memory, (address, length) each."""

    def __init__(self, kind, sector, readable, writable):
        self.kind, self.sector, self.readable, self.writable = kind, sector, readable, writable
        self.answers = 0
        self.status = self.length = self.data = None

    @property
    def done(self):
        return self.answers > 0


class Disk(Device):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.requests = [{} for _ in self.queues]  # by id of the chain
        self.keep = False  # memory of answered requests is not given back

    def chain(self, kind, sector=0, out=b"", room=0, readable=None, writable=None, ioprio=0, within=None):
        """A request in guest memory. `out`: what follows the header; `room`: writable bytes before the status; `readable` and
        `writable`: lengths of descriptors, else [16, len(out)] and [room, 1]."""
        memory = self.memory
        data = struct.pack("=IIQ", kind, ioprio, sector) + out
        request = Request(kind, sector, [], [])
        for length in readable if readable is not None else [n for n in (16, len(out)) if n]:
            request.readable.append((memory.alloc(length, 1, within), length))
            memory.write(request.readable[-1][0], data[:length])
            data = data[length:]
        for length in writable if writable is not None else [n for n in (room, 1) if n]:
            request.writable.append((memory.alloc(length, 1, within), length))
        if request.writable:
            address, length = request.writable[-1]
            memory.write(address + length - 1, bytes([UNANSWERED]))
        return request

    def add(self, request, queue=0, indirect=False):
        chain = [(a, n, False) for a, n in request.readable] + [(a, n, True) for a, n in request.writable]
        number = self.queues[queue].ring.add(chain, indirect)
        self.requests[queue][number] = request
        return request

    def submit(self, kind, sector=0, out=b"", room=0, queue=0, indirect=False, **layout):
        """Adds, publishes and kicks."""
        request = self.add(self.chain(kind, sector, out, room, **layout), queue, indirect)
        self.queues[queue].publish()
        return request

    def answered(self, queue, number, length):
        request = self.requests[queue.index].pop(number)
        request.answers += 1
        request.length = length
        data = b"".join(self.memory.read(*piece) for piece in request.writable)
        request.status, request.data = data[-1] if data else None, data[:-1]
        if not self.keep:
            for piece in request.readable + request.writable:
                self.memory.release(*piece)

    def finish(self, *requests, deadline=30.0):
        self.wait(lambda: all(request.done for request in requests), f"{len(requests)} requests", deadline)
        return requests[0] if len(requests) == 1 else requests

    def finish_all(self):
        self.wait(lambda: not any(self.requests), "every request")

    def run(self, kind, sector=0, out=b"", room=0, **layout):
        """One request: its status."""
        return self.finish(self.submit(kind, sector, out, room, **layout)).status

    # One at a time; offsets in bytes ----------------------------------------------------------------------------------------------

    def read(self, offset, length, **layout):
        request = self.finish(self.submit(IN, offset // 512, room=length, **layout))
        assert (request.status, request.length) == (OK, length + 1), (offset, request.status, request.length)
        return request.data

    def write(self, offset, data, **layout):
        request = self.finish(self.submit(OUT, offset // 512, data, **layout))
        assert (request.status, request.length) == (OK, 1), (offset, request.status, request.length)

    def flush(self, **layout):
        assert self.run(FLUSH, **layout) == OK

    def get_id(self, room=20, **layout):
        request = self.finish(self.submit(GET_ID, room=room, **layout))
        assert request.status == OK, request.status
        return request.data

    def discard(self, *ranges, **layout):
        """The status; ranges are (sector, sectors, flags)."""
        return self.run(DISCARD, out=segments(*ranges), **layout)

    def write_zeroes(self, *ranges, **layout):
        return self.run(WRITE_ZEROES, out=segments(*ranges), **layout)

    # The configuration ------------------------------------------------------------------------------------------------------------

    def config(self, offset=0, size=96):
        return self.connection.get_config(offset, size)

    def field(self, offset, form):
        # From the beginning: that is all the reference knows.
        return struct.unpack_from("=" + form, self.config(0, 60), offset)[0]

    @property
    def capacity(self):
        return self.field(0, "Q")

    def set_wce(self, on):
        self.connection.tell(Msg.SET_CONFIG, struct.pack("=III", 32, 1, 0) + bytes([on]))


class Model:
    """Random requests, many in flight, on ranges that do not overlap while in flight; compared with a bytearray."""

    def __init__(self, disk, size, seed, block=512, most=64 * 1024, depth=48, ranges=True):
        self.disk, self.rng, self.block, self.most, self.depth = disk, random.Random(seed), block, most, depth
        self.content = bytearray(size)
        self.ranges = ranges
        self.flight = []  # (request, start, end, kind, data)
        self.count = 0

    def add(self):
        """One more request, if there is room for it; its queue."""
        rng, disk = self.rng, self.disk
        blocks = rng.choice((1, 1, 2, 8, rng.randrange(1, self.most // self.block + 1)))
        start = self.block * rng.randrange(len(self.content) // self.block)
        end = min(start + blocks * self.block, len(self.content))
        if any(s < end and start < e for _, s, e, _, _ in self.flight):
            return None
        kind = rng.choice((IN, IN, OUT, OUT, OUT, FLUSH) + ((WRITE_ZEROES, DISCARD) if self.ranges else ()))
        out, room = b"", 0
        data = None
        if kind == OUT:
            out = data = rng.randbytes(end - start)
        elif kind == IN:
            room, data = end - start, bytes(self.content[start:end])
        elif kind in (WRITE_ZEROES, DISCARD):
            out = segments((start // 512, (end - start) // 512, UNMAP if kind == WRITE_ZEROES and rng.random() < 0.5 else 0))
        layout = {}
        if rng.random() < 0.6:
            layout = {"readable": cut(16 + len(out), rng), "writable": cut(room + 1, rng)}
        queue = rng.randrange(len(disk.queues))
        ring = disk.queues[queue].ring
        pieces = sum(len(pieces) for pieces in layout.values()) if layout else 4
        room_left = ring.room if ring.packed else len(ring.free_slots)
        indirect = disk.indirect and rng.random() < 0.5 and pieces <= ring.size
        if room_left < (1 if indirect else pieces):
            return None
        request = disk.chain(kind, start // 512 if kind in (IN, OUT) else 0, out, room, **layout)
        disk.add(request, queue, indirect)
        self.flight.append((request, start, end, kind, data))
        self.count += 1
        return queue

    def fill(self):
        """Adds a random number of requests, then tells each queue once."""
        touched = set()
        for _ in range(self.rng.randrange(1, self.depth)):
            if len(self.flight) >= self.depth:
                break
            queue = self.add()
            if queue is not None:
                touched.add(queue)
        for queue in touched:
            self.disk.queues[queue].publish()

    def check(self):
        """What has been answered, against the model."""
        left = []
        for entry in self.flight:
            request, start, end, kind, data = entry
            if not request.done:
                left.append(entry)
                continue
            assert request.answers == 1, f"{request.answers} answers"
            assert request.status == OK, (kind, start, end, request.status)
            expected = end - start + 1 if kind == IN else 1
            assert request.length == expected, (kind, start, end, request.length)
            if kind == IN:
                assert request.data == data, f"wrong data at [{start}, {end})"
            elif kind == OUT:
                self.content[start:end] = data
            elif kind == WRITE_ZEROES:
                self.content[start:end] = bytes(end - start)
            elif kind == DISCARD:  # undefined until it is read
                self.settle(start, end)
        self.flight = left

    def settle(self, start, end):
        """What a discarded range reads as from now on: zeroes or what it was."""
        disk, content = self.disk, self.content
        request = disk.submit(IN, start // 512, room=end - start, indirect=disk.indirect)
        disk.finish(request)
        assert request.status == OK
        for at in range(0, end - start, 512):
            got = request.data[at:at + 512]
            assert got in (content[start + at:start + at + 512], bytes(512)), f"discarded, at {start + at}"
        content[start:end] = request.data

    def step(self):
        """Adds some, waits for some."""
        self.fill()
        goal = self.rng.randrange(len(self.flight) + 1)
        self.disk.wait(lambda: sum(not entry[0].done for entry in self.flight) <= goal)
        self.check()

    def drain(self):
        self.disk.wait(lambda: all(entry[0].done for entry in self.flight))
        self.check()

    def run(self, requests):
        end = self.count + requests
        while self.count < end:
            self.step()
        self.drain()

    def verify(self, data):
        assert len(data) == len(self.content), (len(data), len(self.content))
        for at in range(0, len(data), 512):
            assert data[at:at + 512] == self.content[at:at + 512], f"wrong data at {at}"
