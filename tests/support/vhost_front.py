"""A vhost-user front end for tests: speaks the protocol, whole or as wrongly as it is told to, and drives a device with memory
and rings (vhost_rings.py) that live longer than a connection. Numbers and names are those of the vhost-user specification.
"""

import array
import enum
import mmap
import os
import select
import socket
import struct
import time

from vhost_rings import GuestMemory, PackedRing, Region, SplitRing

DEADLINE = 30.0
MIB = 1 << 20


class Msg(enum.IntEnum):
    (GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_LOG_BASE, SET_LOG_FD, SET_VRING_NUM, SET_VRING_ADDR,
     SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES,
     GET_QUEUE_NUM, SET_VRING_ENABLE, SEND_RARP, NET_SET_MTU, SET_BACKEND_REQ_FD, IOTLB_MSG, SET_VRING_ENDIAN, GET_CONFIG,
     SET_CONFIG, CREATE_CRYPTO_SESSION, CLOSE_CRYPTO_SESSION, POSTCOPY_ADVISE, POSTCOPY_LISTEN, POSTCOPY_END, GET_INFLIGHT_FD,
     SET_INFLIGHT_FD, GPU_SET_SOCKET, RESET_DEVICE, VRING_KICK, GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG, SET_STATUS, GET_STATUS,
     GET_SHARED_OBJECT, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE) = range(1, 44)


# Protocol features.
(P_MQ, P_LOG_SHMFD, P_RARP, P_REPLY_ACK, P_MTU, P_BACKEND_REQ, P_CROSS_ENDIAN, P_CRYPTO, P_PAGEFAULT, P_CONFIG, P_SEND_FD,
 P_HOST_NOTIFIER, P_INFLIGHT, P_RESET_DEVICE, P_INBAND, P_MEM_SLOTS, P_STATUS) = (1 << n for n in range(17))
P_WANTED = P_MQ | P_LOG_SHMFD | P_REPLY_ACK | P_BACKEND_REQ | P_CONFIG | P_INFLIGHT | P_RESET_DEVICE | P_MEM_SLOTS | P_STATUS
# Features of ring and transport.
F_NOTIFY_ON_EMPTY, F_LOG_ALL, F_INDIRECT, F_EVENT_IDX, F_PROTOCOL = 1 << 24, 1 << 26, 1 << 28, 1 << 29, 1 << 30
F_VERSION_1, F_PACKED = 1 << 32, 1 << 34
VERSION, REPLY, NEED_REPLY = 1, 4, 8
CONFIG_CHANGE = 2  # what the back end says
NO_FD = 1 << 8


class Closed(Exception):
    """The back end ended the connection."""


class Refused(Exception):
    """A request was answered with a number other than 0."""


class Broken(Exception):
    """The back end signalled that a ring makes no sense."""


def readable(files, timeout=0):
    """Those that can be read, at least one unless the time is over."""
    poll, names = select.poll(), {}
    for file in files:
        poll.register(file, select.POLLIN)
        names[file if isinstance(file, int) else file.fileno()] = file
    return [names[fd] for fd, _ in poll.poll(max(0, timeout) * 1000)]


class Connection:
    """The socket: any bytes, any descriptors."""

    reply_ack = False

    def __init__(self, path=None, connected=None):
        self.socket = connected or socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        if not connected:
            self.socket.connect(path)

    def close(self):
        self.socket.close()

    def raw(self, data, fds=()):
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.socket.sendmsg([data], control)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def send(self, request, payload=b"", fds=(), flags=VERSION, size=None):
        self.raw(struct.pack("=III", request, flags, len(payload) if size is None else size) + payload, fds)

    def receive(self):
        """(request, flags, payload, descriptors)"""
        header, fds = self._exactly(12)
        request, flags, size = struct.unpack("=III", header)
        payload, more = self._exactly(size)
        return request, flags, payload, fds + more

    def _exactly(self, size):
        data, fds = b"", []
        while len(data) < size:
            try:
                piece, control, _, _ = self.socket.recvmsg(size - len(data), socket.CMSG_SPACE(32))
            except ConnectionResetError:
                raise Closed from None
            for _, _, numbers in control:
                fds += array.array("i", numbers)
            if not piece:
                raise Closed
            data += piece
        return data, fds

    def ended(self):
        """Waits for the end, with nothing before it."""
        try:
            message = self.receive()
        except Closed:
            return True
        raise AssertionError(f"{message} instead of the end of the connection")

    def ask(self, request, payload=b"", fds=(), flags=VERSION):
        """The payload and descriptors of the reply that a request has."""
        self.send(request, payload, fds, flags)
        number, answer_flags, data, got = self.receive()
        assert (number, answer_flags) == (request, VERSION | REPLY), (Msg(request), number, answer_flags)
        return data, got

    def ask_u64(self, request, payload=b"", fds=(), flags=VERSION):
        data, got = self.ask(request, payload, fds, flags)
        assert len(data) == 8 and not got, (Msg(request), data, got)
        return struct.unpack("=Q", data)[0]

    def tell(self, request, payload=b"", fds=()):
        """A request without a reply of its own: acknowledged, if that was agreed on."""
        if not self.reply_ack:
            return self.send(request, payload, fds)
        value = self.ask_u64(request, payload, fds, VERSION | NEED_REPLY)
        if value:
            raise Refused(f"{Msg(request).name}: {value}")

    def tell_u64(self, request, value, fds=()):
        self.tell(request, struct.pack("=Q", value), fds)

    def tell_state(self, request, index, number):
        self.tell(request, struct.pack("=II", index, number))

    def get_config(self, offset, size, flags=0):
        """The bytes; None when the back end says no."""
        data, _ = self.ask(Msg.GET_CONFIG, struct.pack("=III", offset, size, flags) + bytes(size))
        return data[12:] if data else None

    def synchronize(self):
        """What was sent before has been looked at."""
        return self.ask_u64(Msg.GET_FEATURES)


class Queue:
    """A ring with its three eventfds. They stay when the connection ends."""

    def __init__(self, index, ring):
        self.index, self.ring = index, ring
        self.kick, self.call, self.err = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
        self.kicks = self.signals = 0
        self.base = None  # what the back end said at GET_VRING_BASE

    def close(self):
        for fd in (self.kick, self.call, self.err):
            os.close(fd)

    def publish(self, always=False):
        if self.ring.publish() or always:
            self.kicks += 1
            os.eventfd_write(self.kick, 1)

    def take_signals(self):
        try:
            count = os.eventfd_read(self.call)
        except BlockingIOError:
            return 0
        self.signals += count
        return count


class Device:
    """A guest with its device: memory and queues for as long as it lives, one connection after another."""

    def __init__(self, path, regions=None, queues=1, queue_size=128, packed=False, event_idx=True, indirect=True, features=None,
                 protocol=P_WANTED, slots=False, inflight=None):
        self.path, self.wanted_protocol, self.slots = path, protocol, slots
        self.packed, self.event_idx, self.indirect, self.queue_size = packed, event_idx, indirect, queue_size
        self.wanted = features  # None: whatever is offered
        self.memory = GuestMemory(regions or [Region(0, 4 * MIB), Region(1 << 32, 16 * MIB)])
        self.want_inflight = inflight
        self.inflight = None  # (payload, descriptor)
        self.log = None
        self.connection = self.channel = None
        self.log_all = False
        self.enabled = True
        self.queues = []
        for index in range(queues):
            self.queues.append(Queue(index, self.make_ring()))

    def make_ring(self, size=None, within=None):
        kind = PackedRing if self.packed else SplitRing
        return kind(self.memory, size or self.queue_size, self.event_idx, within or self.memory.regions[0])

    # One connection -------------------------------------------------------------------------------------------------------------

    def connect(self, connected=None):
        """Says hello: features, owner, back-end channel, configuration."""
        self.connection = front = Connection(self.path, connected)
        self.offered = front.ask_u64(Msg.GET_FEATURES)
        self.protocol = 0
        if self.offered & F_PROTOCOL and self.wanted_protocol is not None:
            self.protocol = front.ask_u64(Msg.GET_PROTOCOL_FEATURES) & self.wanted_protocol
            front.tell_u64(Msg.SET_PROTOCOL_FEATURES, self.protocol)
            front.reply_ack = bool(self.protocol & P_REPLY_ACK)
        front.tell(Msg.SET_OWNER)
        if self.protocol & P_BACKEND_REQ:
            ours, theirs = socket.socketpair(socket.AF_UNIX)
            front.tell(Msg.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
            theirs.close()
            self.channel = Connection(connected=ours)
        return self

    def features(self):
        """What the driver chooses."""
        chosen = self.offered & ~(F_NOTIFY_ON_EMPTY | F_LOG_ALL | F_PACKED | F_EVENT_IDX | F_INDIRECT)
        for wanted, bit in ((self.packed, F_PACKED), (self.event_idx, F_EVENT_IDX), (self.indirect, F_INDIRECT)):
            if wanted:
                assert self.offered & bit, f"feature {bit:#x} is not offered: {self.offered:#x}"
                chosen |= bit
        if self.wanted is not None:
            chosen &= self.wanted
        if not self.protocol:
            chosen &= ~F_PROTOCOL
        return chosen | (F_LOG_ALL if self.log_all else 0)

    def start(self):
        """The driver is ready: everything up to the rings."""
        front = self.connection
        self.chosen = self.features()
        front.tell_u64(Msg.SET_FEATURES, self.chosen)
        if self.want_inflight is not False and self.protocol & P_INFLIGHT:
            self.share_inflight()
        self.send_memory()
        if self.log:
            self.send_log()
        for queue in self.queues:
            self.start_queue(queue)
        return self

    def open(self):
        return self.connect().start()

    def share_inflight(self):
        front = self.connection
        if not self.inflight:
            data, fds = front.ask(Msg.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, len(self.queues), self.queue_size))
            assert len(fds) == 1 and len(data) >= 20, (data, fds)
            self.inflight = data, fds[0]
        front.tell(Msg.SET_INFLIGHT_FD, self.inflight[0], [self.inflight[1]])

    def send_memory(self):
        front, regions = self.connection, self.memory.regions
        if self.slots:
            for region in regions:
                front.tell(Msg.ADD_MEM_REG, bytes(8) + region.wire(), [region.fd])
        else:
            front.tell(Msg.SET_MEM_TABLE, struct.pack("=II", len(regions), 0) + b"".join(r.wire() for r in regions),
                       [r.fd for r in regions])

    def add_region(self, region):
        self.connection.tell(Msg.ADD_MEM_REG, bytes(8) + region.wire(), [region.fd])
        self.memory.add(region)

    def remove_region(self, region):
        self.memory.remove(region)
        self.connection.tell(Msg.REM_MEM_REG, bytes(8) + region.wire())

    def addresses(self, queue, log=False):
        """The payload of SET_VRING_ADDR."""
        desc, driver, device = (self.memory.user(a) for a in queue.ring.areas)
        log_at = (queue.ring.areas[0] if queue.ring.packed else queue.ring.areas[2]) if log else 0
        return struct.pack("=IIQQQQ", queue.index, int(log), desc, device, driver, log_at)

    def start_queue(self, queue):
        front, index = self.connection, queue.index
        base = queue.base if queue.base is not None else queue.ring.base()
        queue.base = None
        front.tell_state(Msg.SET_VRING_NUM, index, queue.ring.size)
        front.tell_state(Msg.SET_VRING_BASE, index, base)
        front.tell(Msg.SET_VRING_ADDR, self.addresses(queue, self.log_all))
        front.tell_u64(Msg.SET_VRING_ERR, index, [queue.err])
        front.tell_u64(Msg.SET_VRING_KICK, index, [queue.kick])
        front.tell_u64(Msg.SET_VRING_CALL, index, [queue.call])
        if self.chosen & F_PROTOCOL and self.enabled:
            front.tell_state(Msg.SET_VRING_ENABLE, index, 1)

    def stop_queue(self, queue):
        data, _ = self.connection.ask(Msg.GET_VRING_BASE, struct.pack("=II", queue.index, 0))
        index, queue.base = struct.unpack("=II", data)
        assert index == queue.index, data
        return queue.base

    def stop(self):
        for queue in self.queues:
            if self.chosen & F_PROTOCOL:
                self.connection.tell_state(Msg.SET_VRING_ENABLE, queue.index, 0)
            self.stop_queue(queue)

    def disconnect(self):
        """Without a word."""
        if self.channel:
            self.channel.close()
        self.connection.close()
        self.connection = self.channel = None

    def close(self):
        if self.connection:
            self.disconnect()
        for queue in self.queues:
            queue.close()
        self.queues = []
        if self.inflight:
            os.close(self.inflight[1])
            self.inflight = None

    # Running --------------------------------------------------------------------------------------------------------------------

    def wait(self, done, what="answers", deadline=DEADLINE):
        """Reaps until done() is true; sleeps on the call eventfds. Broken: a ring was given up; Closed: the back end is gone."""
        end = time.monotonic() + deadline
        calls = {queue.call: queue for queue in self.queues}
        errors = {queue.err: queue for queue in self.queues}
        while True:
            for queue in self.queues:
                self.reap(queue)
            if done():
                return
            if any([queue.ring.arm() for queue in self.queues]):
                continue
            ready = readable([*calls, *errors, self.connection.socket], end - time.monotonic())
            if not ready:
                raise AssertionError(f"waited {deadline:.0f} s for {what}")
            for fd in ready:
                if fd in calls:
                    calls[fd].take_signals()
                elif fd in errors:
                    raise Broken(f"queue {errors[fd].index}")
            if self.connection.socket in ready:
                self.connection.ended()
                raise Closed

    def taken(self, queue=0):
        """Chains that the inflight region knows: the device has them, and has not answered."""
        fd, ring = self.inflight[1], self.queues[queue].ring
        step = 32 if ring.packed else 16  # header and entries are of one size
        start = queue * (-(-step * (ring.size + 1) // 64) * 64)
        data = os.pread(fd, step * (ring.size + 1), start)
        return sum(data[step * (slot + 1)] for slot in range(ring.size))

    def reap(self, queue):
        for number, length in queue.ring.reap():
            self.answered(queue, number, length)

    def answered(self, queue, number, length):
        """Chain `number` is done."""

    def wait_broken(self, queue=None, deadline=DEADLINE):
        """The back end gives the ring up (and nothing else ends)."""
        queue = queue or self.queues[0]
        ready = readable([queue.err, self.connection.socket], deadline)
        assert queue.err in ready, f"queue {queue.index} was not given up"
        os.eventfd_read(queue.err)

    def config_changed(self):
        """Waits for what the back end says when the configuration has changed."""
        request, flags, payload, fds = self.channel.receive()
        assert (request, payload, fds) == (CONFIG_CHANGE, b"", []), (request, payload, fds)
        assert flags == VERSION, flags

    # Migration ------------------------------------------------------------------------------------------------------------------

    def make_log(self, offset=0):
        """A dirty log for all of memory."""
        end = max(region.end for region in self.memory.regions)
        size = (end // 4096 // 8 // 4096 + 1) * 4096
        fd = os.memfd_create("log")
        os.ftruncate(fd, offset + size)
        self.log = fd, offset, size, mmap.mmap(fd, offset + size)

    def send_log(self):
        fd, offset, size, _ = self.log
        self.connection.ask(Msg.SET_LOG_BASE, struct.pack("=QQ", size, offset), [fd])

    def log_pages(self):
        """Pages that are marked; marks are taken away."""
        _, offset, size, view = self.log
        data = view[offset:offset + size]
        view[offset:offset + size] = bytes(size)
        return {8 * index + bit for index, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}

    def switch_log(self, on):
        """While the rings run, as QEMU does: the log, the feature, the used rings."""
        if on:
            self.make_log()
            self.send_log()
        self.log_all = on
        self.connection.tell_u64(Msg.SET_FEATURES, self.features())
        for queue in self.queues:
            self.connection.tell(Msg.SET_VRING_ADDR, self.addresses(queue, on))
