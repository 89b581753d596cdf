"""A raw NBD client for tests: says exactly what it is told to. Numbers and names are those of the protocol."""

import socket
import struct

NBDMAGIC, IHAVEOPT, REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST, SIMPLE, STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
EXTENDED_REQUEST, EXTENDED = 0x21E41C71, 0x6E8A278C
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_PEEK, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED = range(1, 9)
OPT_LIST_META, OPT_SET_META, OPT_EXTENDED = 9, 10, 11
ACK, SERVER, INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN = (0x80000000 + i for i in range(1, 7))
SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT_HEADER_REQD = (0x80000000 + i for i in range(7, 11))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << i for i in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
T_STATUS_PAYLOAD = 1 << 12
T_READ_ONLY, T_DF, T_MULTI_CONN, T_CACHE, T_FAST_ZERO = 1 << 1, 1 << 7, 1 << 8, 1 << 10, 1 << 11
C_STATUS_EXT = 6
C_NONE, C_DATA, C_HOLE, C_STATUS, C_ERROR, C_ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002


class Closed(Exception):
    """The server ended the connection."""


def info(name, *requests):
    name = name if isinstance(name, bytes) else name.encode()
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def contexts(name, *queries):
    out = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(queries))
    for query in queries:
        query = query if isinstance(query, bytes) else query.encode()
        out += struct.pack(">I", len(query)) + query
    return out


def request(command, offset=0, length=0, flags=0, cookie=1, data=b"", magic=REQUEST):
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + data


def extended_request(command, offset=0, length=0, flags=0, cookie=1, data=b"", magic=EXTENDED_REQUEST):
    return struct.pack(">IHHQQQ", magic, flags, command, cookie, offset, length) + data


def status_payload(length, *ids):
    return struct.pack(f">Q{len(ids)}I", length, *ids)


class Raw:
    extended = False  # both sides use 32-byte headers

    def __init__(self, address, timeout=20):
        if isinstance(address, tuple):
            self.socket = socket.create_connection(address, timeout)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(timeout)
            self.socket.connect(address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def receive(self, size):
        data = bytearray()
        while len(data) < size:
            try:
                part = self.socket.recv(size - len(data))
            except ConnectionResetError:
                raise Closed from None
            if not part:
                raise Closed
            data += part
        return bytes(data)

    def ends(self):
        """True once the server has closed; whatever it sends before is dropped."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    # -- handshake

    def greet(self, flags=3):
        magic, option, server_flags = struct.unpack(">QQH", self.receive(18))
        assert (magic, option) == (NBDMAGIC, IHAVEOPT)
        self.send(struct.pack(">I", flags))
        return server_flags

    def option(self, number, payload=b"", length=None):
        """All replies to one option as [(type, payload)]."""
        self.send(struct.pack(">QII", IHAVEOPT, number, len(payload) if length is None else length) + payload)
        return self.replies(number)

    def replies(self, number):
        replies = []
        while True:
            magic, option, kind, size = struct.unpack(">QIII", self.receive(20))
            assert magic == REPLY_MAGIC and option == number, (magic, option)
            replies.append((kind, self.receive(size)))
            if kind == ACK or kind & 0x80000000:
                return replies

    def final(self, number, payload=b""):
        return self.option(number, payload)[-1][0]

    def go(self, name, *requests):
        """(size, flags, (minimum, preferred, maximum))."""
        replies = self.option(OPT_GO, info(name, *requests))
        assert replies[-1][0] == ACK, replies[-1]
        about = {struct.unpack(">H", payload[:2])[0]: payload[2:] for kind, payload in replies if kind == INFO}
        size, flags = struct.unpack(">QH", about[0])
        return size, flags, struct.unpack(">III", about[3]) if 3 in about else None

    def enter(self, name, structured=False, status=False, extended=False, queries=None):
        """Greeting to transmission; `queries` (with `status`: base:allocation) select contexts, see self.contexts."""
        self.greet()
        if extended:
            assert self.final(OPT_EXTENDED) == ACK
        elif structured:
            assert self.final(OPT_STRUCTURED) == ACK
        if status and queries is None:
            queries = ["base:allocation"]
        if queries is not None:
            self.contexts = self.select(name, *queries)
            assert len(self.contexts) == len(queries), self.contexts
        result = self.go(name, 3)
        self.extended = extended
        return result

    def select(self, name, *queries, option=OPT_SET_META):
        """{context: id} of a successful SET_META_CONTEXT."""
        replies = self.option(option, contexts(name, *queries))
        assert replies[-1][0] == ACK and all(kind == META for kind, _ in replies[:-1]), replies
        return {payload[4:].decode(): struct.unpack(">I", payload[:4])[0] for _, payload in replies[:-1]}

    # -- transmission

    def request(self, command, offset=0, length=0, flags=0, cookie=1, data=b""):
        """One request in the form that was negotiated; with extended headers a WRITE says that it has a payload."""
        if not self.extended:
            return self.send(request(command, offset, length, flags, cookie, data))
        if command == WRITE:
            flags |= PAYLOAD_LEN
        self.send(extended_request(command, offset, length, flags, cookie, data))
        self.offset_of = {**getattr(self, "offset_of", {}), cookie: offset}

    def ask(self, command, offset=0, length=0, flags=0, data=b"", cookie=1):
        """Sends one request; the error of its answer (of the last chunk). Data of a successful simple READ is read and dropped."""
        self.request(command, offset, length, flags, cookie, data)
        error = 0
        while True:
            done, failed, kind, _ = self.reply(cookie)
            error = error or failed
            if done:
                if command == READ and kind is None and not error:
                    self.receive(length)
                return error

    def reply(self, cookie=None):
        """(done, error, chunk type or None, payload)."""
        magic = struct.unpack(">I", self.receive(4))[0]
        if self.extended:
            assert magic == EXTENDED, hex(magic)
            flags, kind, got, offset, size = struct.unpack(">HHQQQ", self.receive(28))
            assert offset == self.offset_of[got], (offset, got)
        elif magic == SIMPLE:
            error, got = struct.unpack(">IQ", self.receive(12))
            assert cookie in (None, got), got
            return True, error, None, b""
        else:
            assert magic == STRUCTURED, hex(magic)
            flags, kind, got, size = struct.unpack(">HHQI", self.receive(16))
        assert cookie in (None, got), got
        assert size <= 33 << 20 and not flags & ~1, (size, flags)
        payload = self.receive(size)
        error = struct.unpack(">I", payload[:4])[0] if kind & 0x8000 else 0
        if error:
            text = struct.unpack(">H", payload[4:6])[0]
            assert size == 6 + text + (8 if kind == C_ERROR_OFFSET else 0), size
            self.error_text = payload[6 : 6 + text].decode()
        return bool(flags & 1), error, kind, payload

    def chunks(self, cookie=None):
        all_chunks = []
        while True:
            done, error, kind, payload = self.reply(cookie)
            all_chunks.append((kind, payload))
            assert not error, error
            if done:
                return all_chunks

    def read(self, offset, length, cookie=1):
        """A successful simple READ."""
        self.request(READ, offset, length, cookie=cookie)
        done, error, kind, _ = self.reply(cookie)
        assert done and kind is None and not error, error
        return self.receive(length)

    def read_chunks(self, offset, length, flags=0):
        """A structured READ: (data, [(type, offset, length)])."""
        self.request(READ, offset, length, flags)
        data, seen, parts = bytearray(length), bytearray(length), []
        for kind, payload in self.chunks(1):
            if kind == C_NONE:
                continue
            at = struct.unpack(">Q", payload[:8])[0]
            size = len(payload) - 8 if kind == C_DATA else struct.unpack(">I", payload[8:])[0]
            begin = at - offset
            assert size > 0 and 0 <= begin and begin + size <= length, (at, size)
            assert not any(seen[begin : begin + size]), "chunks overlap"
            seen[begin : begin + size] = b"\1" * size
            if kind == C_DATA:
                data[begin : begin + size] = payload[8:]
            parts.append((kind, at, size))
        assert all(seen), "chunks leave a gap"
        return bytes(data), parts

    def status(self, offset, length, flags=0):
        """[(length, flags)] of the one selected context."""
        (extents,) = self.statuses(offset, length, flags).values()
        return extents

    def statuses(self, offset, length, flags=0, data=b""):
        """{context id: [(length, flags)]}; with `data` the request carries it as its payload."""
        if data:
            flags, length = flags | PAYLOAD_LEN, len(data)
        self.request(BLOCK_STATUS, offset, length, flags, data=data)
        answer = {}
        for kind, payload in self.chunks(1):
            number = struct.unpack(">I", payload[:4])[0]
            assert number not in answer, "two chunks for one context"
            if self.extended:
                assert kind == C_STATUS_EXT, kind
                count = struct.unpack(">I", payload[4:8])[0]
                words = struct.unpack(f">{2 * count}Q", payload[8:])
            else:
                assert kind == C_STATUS, kind
                words = struct.unpack(f">{(len(payload) - 4) // 4}I", payload[4:])
            answer[number] = list(zip(words[::2], words[1::2]))
            assert words and all(words[::2]), "an extent without bytes"
        return answer
