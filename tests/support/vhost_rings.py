"""The driver's side of virtio rings in memory that is shared with a device: guest memory, split and packed rings (VIRTIO 1.2,
sections 2.7 and 2.8). Chains are lists of (guest address, length, device writes); nothing is checked, hostile ones are welcome.
"""

import bisect
import mmap
import os
import struct
import threading

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
PAGE = 4096
_lock = threading.Lock()


def fence():
    """Stores before it are seen before loads after it: taking a lock is a full barrier."""
    with _lock:
        pass


def crossed(event, new, old):
    """Whether the index `event` was passed on the way from old to new (16 bits each)."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class Full(Exception):
    """The ring has no room for the chain."""


class Region:
    """`size` bytes of a file of its own, `offset` into it, for the guest at `guest`, for the front end at `user`."""

    def __init__(self, guest, size, user=None, offset=0, fd=None):
        self.guest, self.size, self.offset = guest, size, offset
        self.user = user if user is not None else 0x7E00_0000_0000 + guest
        self.fd = fd if fd is not None else os.memfd_create(f"guest-{guest:x}")
        if fd is None:
            os.ftruncate(self.fd, -(-(offset + size) // PAGE) * PAGE)
        self.map = mmap.mmap(self.fd, offset + size)
        self.view = memoryview(self.map)[offset:offset + size]

    @property
    def end(self):
        return self.guest + self.size

    def wire(self):
        return struct.pack("=QQQQ", self.guest, self.size, self.user, self.offset)

    def __del__(self):
        os.close(self.fd)


class GuestMemory:
    """Regions, and which of their bytes are free."""

    def __init__(self, regions):
        self.regions, self.free_ranges = [], []
        for region in regions:
            self.add(region)

    def add(self, region):
        self.regions.append(region)
        self.release(region.guest, region.size)

    def remove(self, region):
        """Nothing of it may be in use."""
        self.regions.remove(region)
        kept = []
        for start, end in self.free_ranges:
            kept += [(start, min(end, region.guest)), (max(start, region.end), end)]
        self.free_ranges = [(start, end) for start, end in kept if start < end]

    def region(self, address):
        for region in self.regions:
            if region.guest <= address < region.end:
                return region
        raise LookupError(f"no guest memory at {address:#x}")

    def view(self, address, length):
        """Of bytes in one region."""
        region = self.region(address)
        start = address - region.guest
        assert start + length <= region.size
        return region.view[start:start + length]

    def parts(self, address, length):
        while length:
            region = self.region(address)
            size = min(length, region.end - address)
            yield self.view(address, size)
            address, length = address + size, length - size

    def read(self, address, length):
        return b"".join(bytes(part) for part in self.parts(address, length))

    def write(self, address, data):
        for part in self.parts(address, len(data)):
            part[:] = data[:len(part)]
            data = data[len(part):]

    def user(self, address):
        region = self.region(address)
        return region.user + address - region.guest

    def alloc(self, size, align=1, within=None):
        """The address of free bytes, in the region `within` if given, else anywhere, also across borders."""
        for index, (start, end) in enumerate(self.free_ranges):
            if within:
                start_in, end_in = max(start, within.guest), min(end, within.end)
            else:
                start_in, end_in = start, end
            address = -(-start_in // align) * align
            if address + size <= end_in:
                self.free_ranges[index:index + 1] = [r for r in ((start, address), (address + size, end)) if r[0] < r[1]]
                return address
        raise MemoryError(f"no {size} bytes of guest memory are free")

    def take(self, address, size):
        """Exactly these, which are free."""
        for index, (start, end) in enumerate(self.free_ranges):
            if start <= address and address + size <= end:
                self.free_ranges[index:index + 1] = [r for r in ((start, address), (address + size, end)) if r[0] < r[1]]
                return address
        raise MemoryError(f"{address:#x} is not free")

    def release(self, address, size):
        ranges = self.free_ranges
        index = bisect.bisect(ranges, (address, 0))
        start, end = address, address + size
        if index < len(ranges) and ranges[index][0] == end:
            end = ranges.pop(index)[1]
        if index and ranges[index - 1][1] == start:
            index -= 1
            start = ranges.pop(index)[0]
        ranges.insert(index, (start, end))


class Ring:
    """What both kinds share: three areas in one region, indirect tables, the chains that the device has."""

    packed = False

    def __init__(self, memory, size, event_idx=False, within=None):
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.areas = []
        for length, align in self.needs():
            address = memory.alloc(length, max(align, 4), within)
            memory.write(address, bytes(length))
            self.areas.append(address)
        self.pending = {}  # id: indirect tables and slots
        self.place()

    def descriptors(self, chain, indirect):
        """The descriptors that go into the ring, and the table that they need."""
        if not indirect:
            return [(address, length, WRITE if write else 0) for address, length, write in chain], None
        table = self.memory.alloc(16 * len(chain), 16)
        self.memory.write(table, self.table(chain))
        return [(table, 16 * len(chain), INDIRECT)], (table, 16 * len(chain))

    def done(self, number):
        """The device has answered chain `number`: what it had, without the table."""
        assert number in self.pending, f"chain {number} is answered, but the device does not have it"
        table, slots = self.pending.pop(number)
        if table:
            self.memory.release(*table)
        return slots

    def free(self):
        for (length, _), address in zip(self.needs(), self.areas):
            self.memory.release(address, length)


class SplitRing(Ring):
    def needs(self):
        return [(16 * self.size, 16), (6 + 2 * self.size, 2), (6 + 8 * self.size, 4)]

    def place(self):
        """Starts from nothing in zeroed areas."""
        lengths = [length for length, _ in self.needs()]
        self.desc, avail, used = (self.memory.view(a, n) for a, n in zip(self.areas, lengths))
        self.avail, self.used = avail.cast("H"), used[:2 * (lengths[2] // 2)].cast("H")
        self.used_entries = used
        self.free_slots = list(range(self.size - 1, -1, -1))
        self.avail_idx = self.published = self.last_used = 0

    def table(self, chain):
        count = len(chain)
        return b"".join(struct.pack("=QIHH", address, length, (WRITE if write else 0) | (NEXT if i + 1 < count else 0),
                                    i + 1 if i + 1 < count else 0) for i, (address, length, write) in enumerate(chain))

    def set_descriptor(self, slot, address, length, flags=0, following=0):
        struct.pack_into("=QIHH", self.desc, 16 * slot, address, length, flags, following)

    def add(self, chain, indirect=False):
        """Makes a chain, which the device sees with publish(); its id."""
        if (1 if indirect else len(chain)) > len(self.free_slots):
            raise Full
        entries, table = self.descriptors(chain, indirect)
        slots = [self.free_slots.pop() for _ in entries]
        for index, (slot, (address, length, flags)) in enumerate(zip(slots, entries)):
            last = index + 1 == len(slots)
            self.set_descriptor(slot, address, length, flags | (0 if last else NEXT), 0 if last else slots[index + 1])
        self.offer(slots[0])
        self.pending[slots[0]] = table, slots
        return slots[0]

    def offer(self, head):
        """Puts any number into the available ring."""
        self.avail[2 + self.avail_idx % self.size] = head
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def publish(self, index=None):
        """True: the device wants to be kicked."""
        old, self.published = self.published, self.avail_idx if index is None else index
        self.avail[1] = self.published
        fence()
        if self.event_idx:
            return crossed(self.used[2 + 4 * self.size], self.published, old)
        return not self.used[0] & 1

    def reap(self):
        """(id, length) of what the device has answered."""
        answers = []
        while self.last_used != self.used[1]:
            number, length = struct.unpack_from("=II", self.used_entries, 4 + 8 * (self.last_used % self.size))
            self.free_slots += reversed(self.done(number))
            self.last_used = (self.last_used + 1) & 0xFFFF
            answers.append((number, length))
        return answers

    def arm(self):
        """The device is to signal from now on. True: it has answered something already."""
        if self.event_idx:
            self.avail[2 + self.size] = self.last_used
        self.avail[0] = 0
        fence()
        return self.last_used != self.used[1]

    def quiet(self):
        """The device need not signal."""
        if self.event_idx:
            self.avail[2 + self.size] = (self.last_used - 1) & 0xFFFF
        self.avail[0] = 1

    def base(self):
        """Where a device goes on that has answered everything."""
        return self.used[1]

    def entry(self, index):
        """(id, length) of an entry of the used ring."""
        return struct.unpack_from("=II", self.used_entries, 4 + 8 * (index % self.size))


class PackedRing(Ring):
    packed = True

    def needs(self):
        return [(16 * self.size, 16), (4, 4), (4, 4)]

    def place(self):
        self.desc = self.memory.view(self.areas[0], 16 * self.size)
        self.flags = self.desc.cast("H")  # the 8 * slot + 7th
        self.driver = self.memory.view(self.areas[1], 4).cast("H")
        self.device = self.memory.view(self.areas[2], 4).cast("H")
        self.ids = list(range(self.size - 1, -1, -1))
        self.room = self.size
        self.next, self.wrap = 0, 1
        self.added = 0  # since publish()
        self.firsts = []
        self.last_used, self.used_wrap = 0, 1

    def table(self, chain):
        return b"".join(struct.pack("=QIHH", address, length, 0, WRITE if write else 0) for address, length, write in chain)

    def add(self, chain, indirect=False):
        if (1 if indirect else len(chain)) > self.room:
            raise Full
        entries, table = self.descriptors(chain, indirect)
        number = self.ids.pop()
        self.pending[number] = table, len(entries)
        self.put(entries, number)
        return number

    def put(self, entries, number):
        """Entries (address, length, flags) under any id."""
        for index, (address, length, flags) in enumerate(entries):
            flags |= (0 if index + 1 == len(entries) else NEXT) | (AVAIL if self.wrap else USED)
            struct.pack_into("=QIH", self.desc, 16 * self.next, address, length, number)
            if index:
                self.flags[8 * self.next + 7] = flags
            else:
                self.firsts.append((self.next, flags))
            self.next += 1
            if self.next == self.size:
                self.next, self.wrap = 0, self.wrap ^ 1
        self.room -= len(entries)
        self.added += len(entries)

    def publish(self):
        for slot, flags in self.firsts:
            self.flags[8 * slot + 7] = flags
        self.firsts = []
        added, self.added = self.added, 0
        fence()
        how = self.device[1] & 3
        if how == 2 and self.event_idx:
            event = self.device[0] & 0x7FFF
            if self.device[0] >> 15 != self.wrap:
                event -= self.size
            return crossed(event, self.next, self.next - added)
        return how != 1

    def used_now(self):
        flags = self.flags[8 * self.last_used + 7]
        return bool(flags & AVAIL) == bool(flags & USED) == bool(self.used_wrap)

    def reap(self):
        answers = []
        while self.used_now():
            length, number = struct.unpack_from("=IH", self.desc, 16 * self.last_used + 8)
            slots = self.done(number)
            self.ids.append(number)
            self.room += slots
            self.last_used += slots
            if self.last_used >= self.size:
                self.last_used, self.used_wrap = self.last_used - self.size, self.used_wrap ^ 1
            answers.append((number, length))
        return answers

    def arm(self):
        if self.event_idx:
            self.driver[0] = self.last_used | self.used_wrap << 15
            self.driver[1] = 2
        else:
            self.driver[1] = 0
        fence()
        return self.used_now()

    def quiet(self):
        self.driver[1] = 1

    def base(self):
        half = self.last_used | self.used_wrap << 15
        return half | half << 16
