"""A raw NBD client for tests: says exactly what it is told to. Numbers and names are those of the protocol."""

import socket
import struct

NBDMAGIC, IHAVEOPT, REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST, SIMPLE, STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_PEEK, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED = range(1, 9)
OPT_LIST_META, OPT_SET_META, OPT_EXTENDED = 9, 10, 11
ACK, SERVER, INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN = (0x80000000 + i for i in range(1, 7))
SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT_HEADER_REQD = (0x80000000 + i for i in range(7, 11))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << i for i in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
T_READ_ONLY, T_DF, T_MULTI_CONN, T_CACHE, T_FAST_ZERO = 1 << 1, 1 << 7, 1 << 8, 1 << 10, 1 << 11
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


class Raw:
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

    def enter(self, name, structured=False, status=False):
        self.greet()
        if structured:
            assert self.final(OPT_STRUCTURED) == ACK
        if status:
            replies = self.option(OPT_SET_META, contexts(name, "base:allocation"))
            assert [kind for kind, _ in replies] == [META, ACK], replies
        return self.go(name, 3)

    # -- transmission

    def ask(self, command, offset=0, length=0, flags=0, data=b"", cookie=1):
        """Sends one request; the error of its answer (of the last chunk). Data of a successful simple READ is read and dropped."""
        self.send(request(command, offset, length, flags, cookie, data))
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
        if magic == SIMPLE:
            error, got = struct.unpack(">IQ", self.receive(12))
            assert cookie in (None, got), got
            return True, error, None, b""
        assert magic == STRUCTURED, hex(magic)
        flags, kind, got, size = struct.unpack(">HHQI", self.receive(16))
        assert cookie in (None, got), got
        payload = self.receive(size)
        error = struct.unpack(">I", payload[:4])[0] if kind & 0x8000 else 0
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
        self.send(request(READ, offset, length, cookie=cookie))
        done, error, kind, _ = self.reply(cookie)
        assert done and kind is None and not error, error
        return self.receive(length)

    def read_chunks(self, offset, length, flags=0):
        """A structured READ: (data, [(type, offset, length)])."""
        self.send(request(READ, offset, length, flags))
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
        self.send(request(BLOCK_STATUS, offset, length, flags))
        (chunk,) = self.chunks(1)
        assert chunk[0] == C_STATUS
        words = struct.unpack(f">{(len(chunk[1]) - 4) // 4}I", chunk[1][4:])
        return list(zip(words[::2], words[1::2]))
