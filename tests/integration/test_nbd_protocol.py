#!/usr/bin/env python3
"""The NBD protocol, byte by byte, against a daemon: GANTRYD=qemu-storage-daemon runs the same tests against the reference.

Where the reference deviates from the protocol text, `ours()` names what the text asks for and what the reference does.
"""

import os
import pathlib
import random
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
from gantry_test import IS_GANTRY, KIB, MIB, require_gantry
from nbd_case import RawCase

SIZE = 2 * MIB


def ours(expected, reference):
    return expected if IS_GANTRY else reference


# The reference answers EINVAL to everything it refuses before it reaches the disk.
NO_SPACE = ours(nbd.ENOSPC, nbd.EINVAL)
PERM = ours(nbd.EPERM, nbd.EINVAL)


class Protocol(RawCase):
    def setUp(self):
        super().setUp()
        self.image = self.raw_image("disk.raw", SIZE)
        with open(self.image, "r+b") as file:
            file.seek(256 * KIB)
            file.write(bytes(random.Random(1).randbytes(256 * KIB)))
        self.socket = self.path("nbd.sock")
        self.server = self.daemon(
            "--blockdev", f"driver=file,node-name=disk,filename={self.image},discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=20",
            "--export", "type=nbd,id=rw,node-name=disk,name=disk,writable=on,description=a disk",
            "--export", "type=nbd,id=ro,node-name=disk,name=ro")

    def alive(self):
        """The server still serves others."""
        self.assertEqual(self.entered().read(0, 512), self.contents()[:512])


class Handshake(Protocol):
    def test_options_echo_their_number_and_unknown_ones_are_unsupported(self):
        client = self.greeted()
        for number in (0, nbd.OPT_PEEK, 12, 999, 0xFFFFFFFF):
            self.assertEqual(client.final(number, b"some payload"), nbd.UNSUP)
        self.assertEqual(client.final(nbd.OPT_ABORT), nbd.ACK)
        self.assertTrue(client.ends())

    def test_list(self):
        client = self.greeted()
        replies = client.option(nbd.OPT_LIST)
        names = {}
        for kind, payload in replies[:-1]:
            self.assertEqual(kind, nbd.SERVER)
            size = struct.unpack(">I", payload[:4])[0]
            names[payload[4 : 4 + size]] = payload[4 + size :]
        self.assertEqual(names, {b"disk": b"a disk", b"ro": b""})
        self.assertEqual(client.final(nbd.OPT_LIST, b"x"), nbd.INVALID)

    def test_export_name(self):
        for flags, length in ((3, 10), (1, 134), (0, 134)):
            client = self.raw()
            client.greet(flags)
            client.send(struct.pack(">QII4s", nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, 4, b"disk"))
            answer = client.receive(length)
            self.assertEqual(struct.unpack(">Q", answer[:8])[0], SIZE)
            self.assertEqual(answer[10:], bytes(length - 10))
            client.read(0, 512)

    def test_export_name_of_nothing_closes(self):
        for name in (b"", b"nope", b"d" * 4097):
            client = self.greeted()
            client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, len(name)) + name)
            self.assertTrue(client.ends())
        self.alive()

    def test_info_then_go_agree_and_info_has_no_effect(self):
        client = self.greeted()
        request = nbd.info("disk", 3, 1, 2)
        self.assertEqual(client.final(nbd.OPT_INFO, nbd.info("nope")), nbd.UNKNOWN)
        first = client.option(nbd.OPT_INFO, request)
        self.assertEqual(client.option(nbd.OPT_INFO, request), first)
        client.option(nbd.OPT_INFO, nbd.info("ro", 3))
        self.assertEqual(client.final(nbd.OPT_GO, nbd.info("nope", 3)), nbd.UNKNOWN)
        self.assertEqual(client.option(nbd.OPT_GO, request), first)
        client.read(0, 512)

    def test_what_go_says(self):
        size, flags, blocks = self.greeted().go("disk", 3)
        self.assertEqual((size, blocks), (SIZE, (1, 4096, 32 * MIB)))
        self.assertEqual(flags & 0xD7F, 0x0D6D & 0xD7F)
        client = self.greeted()
        client.final(nbd.OPT_STRUCTURED)
        size, flags, _ = client.go("ro", 3)
        self.assertTrue(flags & nbd.T_READ_ONLY and flags & nbd.T_DF and flags & nbd.T_MULTI_CONN)
        self.assertFalse(flags & 0x860)

    def test_malformed_go_is_refused_and_forgotten(self):
        client = self.greeted()
        good = nbd.info("disk", 3)
        for payload in (b"", b"\0", struct.pack(">IH", 0xFFFFFFFF, 0), good + b"\0", good[:-1], struct.pack(">I", 5) + good[4:],
                        nbd.info("n" * 4097)):
            self.assertEqual(client.final(nbd.OPT_GO, payload), nbd.INVALID, payload[:20])
        self.assertEqual(client.final(nbd.OPT_GO, good), nbd.ACK)

    def test_a_long_name_in_an_error_text_is_cut(self):
        client = self.greeted()
        kind, text = client.option(nbd.OPT_GO, nbd.info(b"\xff" * 4096, 3))[-1]
        self.assertEqual(kind, nbd.UNKNOWN)
        self.assertLessEqual(len(text), 4096)
        if IS_GANTRY:
            text.decode("utf-8")

    def test_structured_replies_twice(self):
        client = self.greeted()
        self.assertEqual(client.final(nbd.OPT_STRUCTURED, b"x"), nbd.INVALID)
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
        self.assertIn(client.final(nbd.OPT_STRUCTURED), (nbd.INVALID,))

    def test_starttls_without_credentials(self):
        client = self.greeted()
        self.assertIn(client.final(nbd.OPT_STARTTLS), (nbd.POLICY, nbd.UNSUP, nbd.PLATFORM))
        self.assertEqual(client.final(nbd.OPT_GO, nbd.info("disk", 3)), nbd.ACK)

    def test_extended_headers_are_offered_once(self):
        require_gantry("the installed reference has no extended headers")
        client = self.greeted()
        self.assertEqual(client.final(nbd.OPT_EXTENDED, b"x"), nbd.INVALID)
        self.assertEqual(client.final(nbd.OPT_EXTENDED), nbd.ACK)
        self.assertEqual(client.final(nbd.OPT_EXTENDED), nbd.INVALID)
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.EXT_HEADER_REQD)
        client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, 4) + b"disk")
        self.assertTrue(client.ends())

    def test_meta_contexts(self):
        client = self.greeted()
        self.assertEqual(client.final(nbd.OPT_SET_META, nbd.contexts("disk", "base:allocation")), nbd.INVALID)
        client.final(nbd.OPT_STRUCTURED)
        for queries, names in (((), [b"base:allocation"]), (("base:",), [b"base:allocation"]), (("qemu:nope",), []),
                               (("base:allocation", "base:", "base:allocation"), [b"base:allocation"]), (("x:y",), [])):
            replies = client.option(nbd.OPT_LIST_META, nbd.contexts("disk", *queries))
            self.assertEqual([payload[4:] for kind, payload in replies if kind == nbd.META], names, queries)
            self.assertEqual(replies[-1][0], nbd.ACK)
        replies = client.option(nbd.OPT_SET_META, nbd.contexts("disk", "base:allocation", "base:allocation", "base:"))
        self.assertEqual([payload[4:] for kind, payload in replies if kind == nbd.META], [b"base:allocation"])
        self.assertEqual(client.final(nbd.OPT_SET_META, nbd.contexts("nope", "base:allocation")), nbd.UNKNOWN)
        client.go("disk", 3)
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, 512), nbd.EINVAL)  # the failed one dropped the selection

    def test_contexts_are_bound_to_their_export(self):
        client = self.greeted()
        client.final(nbd.OPT_STRUCTURED)
        client.option(nbd.OPT_SET_META, nbd.contexts("ro", "base:allocation"))
        client.go("disk", 3)
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, 512), nbd.EINVAL)

    def test_malformed_meta_contexts(self):
        client = self.greeted()
        client.final(nbd.OPT_STRUCTURED)
        for payload in (b"", struct.pack(">I4sI", 4, b"disk", 0xFFFFFFFF), struct.pack(">I4sII", 4, b"disk", 1, 99) + b"base:",
                        struct.pack(">II", 0xFFFFFFFF, 0)):
            self.assertEqual(client.final(nbd.OPT_LIST_META, payload), nbd.INVALID)
        if IS_GANTRY:  # the reference runs into an assertion with bytes left over
            self.assertEqual(client.final(nbd.OPT_LIST_META, nbd.contexts("disk", "base:") + b"xx"), nbd.INVALID)
        client.go("disk", 3)

    def test_client_flags(self):
        client = self.raw()
        client.greet(0x80000003)
        if IS_GANTRY:
            self.assertTrue(client.ends())
        client = self.raw()
        client.greet(0)
        client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_LIST, 0))
        self.assertTrue(client.ends())
        self.alive()

    def test_protocol_violations_end_the_connection(self):
        client = self.greeted()
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        self.assertTrue(client.ends())
        client = self.greeted()
        client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_GO, 0xFFFFFFFF))
        self.assertTrue(client.ends())
        self.alive()

    def test_long_unknown_options_are_skipped(self):
        client = self.greeted()
        self.assertEqual(client.final(4711, bytes(MIB)), nbd.UNSUP)
        self.assertEqual(client.final(nbd.OPT_LIST), nbd.ACK)

    def test_clients_that_leave_at_any_byte(self):
        talk = struct.pack(">I", 3)
        for number, payload in ((nbd.OPT_STRUCTURED, b""), (nbd.OPT_SET_META, nbd.contexts("disk", "base:allocation")),
                                (nbd.OPT_INFO, nbd.info("disk", 3)), (nbd.OPT_GO, nbd.info("disk", 3))):
            talk += struct.pack(">QII", nbd.IHAVEOPT, number, len(payload)) + payload
        talk += nbd.request(nbd.READ, 0, 65536) + nbd.request(nbd.WRITE, 0, 600, data=bytes(600)) + nbd.request(nbd.FLUSH)
        for cut in list(range(0, len(talk), 7)) + [len(talk)]:
            client = self.raw()
            client.send(talk[:cut])
            client.close()
        self.alive()


class Transmission(Protocol):
    def test_reads_and_writes_of_all_sizes(self):
        for structured in (False, True):
            client = self.entered(structured=structured)
            rng = random.Random(2)
            for size in (1, 511, 4096, 32768, 32769, 65537, 300000, MIB):
                offset = rng.randrange(SIZE - size)
                data = rng.randbytes(size)
                self.assertEqual(client.ask(nbd.WRITE, offset, size, data=data), 0)
                got = client.read_chunks(offset, size)[0] if structured else client.read(offset, size)
                self.assertEqual(got, data)
        self.assertEqual(client.ask(nbd.FLUSH), 0)
        self.assertEqual(client.read_chunks(0, SIZE)[0], self.contents())

    def test_errors_of_ranges(self):
        client = self.entered()
        far = (1 << 64) - 4096
        no_space, invalid = NO_SPACE, nbd.EINVAL
        for command, error in ((nbd.READ, invalid), (nbd.TRIM, invalid), (nbd.CACHE, invalid), (nbd.WRITE_ZEROES, no_space)):
            for offset, length in ((SIZE, 1), (SIZE - 1, 2), (far, 4096), (SIZE + 1, 0)):
                if length == 0 and not IS_GANTRY:
                    continue
                self.assertEqual(client.ask(command, offset, length), error, (command, offset, length))
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (far, 4096)):
            self.assertEqual(client.ask(nbd.WRITE, offset, length, data=bytes(length)), no_space)
        client.read(0, 512)

    def test_flags_that_are_undefined_or_misplaced(self):
        client = self.entered()
        for command, flags in ((nbd.READ, nbd.DF), (nbd.READ, nbd.NO_HOLE), (nbd.FLUSH, nbd.REQ_ONE), (nbd.TRIM, nbd.NO_HOLE),
                               (nbd.WRITE_ZEROES, nbd.REQ_ONE), (nbd.READ, 0x8000), (nbd.CACHE, nbd.PAYLOAD_LEN)):
            self.assertEqual(client.ask(command, 0, 512, flags), nbd.EINVAL, (command, flags))
        self.assertEqual(client.ask(nbd.WRITE, 0, 512, nbd.NO_HOLE, data=bytes(512)), nbd.EINVAL)
        for command in (nbd.READ, nbd.FLUSH, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES):
            self.assertEqual(client.ask(command, 0, 512, nbd.FUA), 0, command)
        self.assertEqual(client.ask(nbd.WRITE, 0, 512, nbd.FUA, data=bytes(512)), 0)

    def test_unknown_commands(self):
        client = self.entered()
        for command in (nbd.BLOCK_STATUS, nbd.RESIZE, 9, 0xFFFF):
            self.assertEqual(client.ask(command, 0, 512), nbd.EINVAL, command)
        client.read(0, 512)

    def test_empty_requests(self):
        client = self.entered()
        for command in (nbd.READ, nbd.WRITE, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES, nbd.FLUSH):
            self.assertEqual(client.ask(command, 0, 0), 0, command)
        client = self.entered(structured=True, status=True)
        self.assertEqual(client.read_chunks(0, 0), (b"", []))
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, 0), nbd.EINVAL)

    def test_read_only_exports_swallow_what_they_refuse(self):
        before = self.contents()
        for structured in (False, True):
            client = self.entered("ro", structured=structured)
            for size in (1, 4096, 100000, 3 * MIB):
                self.assertEqual(client.ask(nbd.WRITE, 0, size, data=b"\x55" * size), PERM)
            self.assertEqual(client.ask(nbd.TRIM, 0, 4096), PERM)
            self.assertEqual(client.ask(nbd.WRITE_ZEROES, 0, 4096), PERM)
            self.assertEqual(client.ask(nbd.FLUSH), 0)
        self.assertEqual(self.contents(), before)

    def test_payload_limits(self):
        client = self.entered()
        self.assertEqual(client.ask(nbd.READ, 0, 32 * MIB + 1), nbd.EINVAL)
        client.send(nbd.request(nbd.WRITE, 0, 32 * MIB + 1))
        self.assertTrue(client.ends())
        client = self.entered()
        self.assertEqual(client.ask(nbd.WRITE, SIZE, 32 * MIB, data=bytes(32 * MIB)), NO_SPACE)
        client.read(0, 512)

    def test_a_wrong_magic_ends_the_connection(self):
        for magic in (0, 0x21E41C71, 0x12560953):
            client = self.entered()
            client.send(nbd.request(nbd.READ, 0, 512, magic=magic))
            self.assertTrue(client.ends())
        self.alive()

    def test_holes(self):
        client = self.entered(structured=True)
        data, parts = client.read_chunks(0, MIB)
        self.assertEqual(data, self.contents()[:MIB])
        self.assertEqual([kind for kind, _, _ in parts], [nbd.C_HOLE, nbd.C_DATA, nbd.C_HOLE])
        for _, at, size in parts:
            self.assertEqual((at % 512, size % 512), (0, 0))
        data, parts = client.read_chunks(0, MIB, nbd.DF)
        self.assertEqual(data, self.contents()[:MIB])
        self.assertEqual(parts, [(nbd.C_DATA, 0, MIB)])

    def test_block_status(self):
        client = self.entered(structured=True, status=True)
        self.assertEqual(client.status(0, SIZE), [(256 * KIB, 3), (256 * KIB, 0), (SIZE - 512 * KIB, 3)])
        self.assertEqual(client.status(0, SIZE, nbd.REQ_ONE), [(256 * KIB, 3)])
        self.assertEqual(client.status(300 * KIB, 100 * KIB, nbd.REQ_ONE), [(100 * KIB, 0)])
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, SIZE - 1, 2), nbd.EINVAL)

    def test_zeroes_and_trim(self):
        client = self.entered(structured=True, status=True)
        self.assertEqual(client.ask(nbd.WRITE, 0, MIB, data=b"\xaa" * MIB), 0)
        self.assertEqual(client.ask(nbd.WRITE_ZEROES, 1, 100), 0)
        self.assertEqual(client.read_chunks(0, 102)[0], b"\xaa" + bytes(100) + b"\xaa")
        self.assertEqual(client.ask(nbd.WRITE_ZEROES, 64 * KIB, 64 * KIB, nbd.NO_HOLE), 0)
        self.assertEqual(client.ask(nbd.WRITE_ZEROES, 128 * KIB, 64 * KIB), 0)
        self.assertEqual(client.ask(nbd.TRIM, 256 * KIB, 64 * KIB, nbd.FUA), 0)
        self.assertEqual(client.status(256 * KIB, 64 * KIB, nbd.REQ_ONE)[0][1], 3)
        self.assertEqual(client.status(128 * KIB, 64 * KIB, nbd.REQ_ONE)[0][1], 3)
        self.assertFalse(client.status(64 * KIB, 64 * KIB, nbd.REQ_ONE)[0][1] & 1)
        self.assertIn(client.ask(nbd.WRITE_ZEROES, 0, 4096, nbd.FAST_ZERO), (0, nbd.ENOTSUP))
        self.assertEqual(client.ask(nbd.WRITE_ZEROES, 0, SIZE), 0)
        self.assertEqual(client.read_chunks(0, SIZE)[0], bytes(SIZE))

    def test_everything_before_disc_is_done_and_answered(self):
        require_gantry("the reference drops what DISC follows closely")
        client = self.entered()
        count = 100
        client.send(b"".join(nbd.request(nbd.WRITE, i * 4096, 4096, cookie=i, data=bytes([i]) * 4096) for i in range(count))
                    + nbd.request(nbd.DISC, 1 << 60, 1 << 30, 0xFFFF))
        cookies = set()
        for _ in range(count):
            magic, error, cookie = struct.unpack(">IIQ", client.receive(16))
            self.assertEqual((magic, error), (nbd.SIMPLE, 0))
            cookies.add(cookie)
        self.assertEqual(cookies, set(range(count)))
        self.assertEqual(client.socket.recv(1), b"")
        for i in range(count):
            self.assertEqual(self.contents()[i * 4096 : (i + 1) * 4096], bytes([i]) * 4096)

    def test_deep_pipelines(self):
        client = self.entered()
        count = 500
        wanted = self.contents()
        client.send(b"".join(nbd.request(nbd.READ, i * 4096, 512, cookie=i) for i in range(count)))
        seen = set()
        for _ in range(count):
            magic, error, cookie = struct.unpack(">IIQ", client.receive(16))
            self.assertEqual((magic, error), (nbd.SIMPLE, 0))
            self.assertEqual(client.receive(512), wanted[cookie * 4096 : cookie * 4096 + 512])
            seen.add(cookie)
        self.assertEqual(len(seen), count)

    def test_a_stalled_client_disturbs_nobody(self):
        lazy = self.entered()
        lazy.socket.settimeout(0.2)
        try:
            for i in range(200):
                lazy.socket.sendall(nbd.request(nbd.READ, 0, MIB, cookie=i))
        except TimeoutError:
            pass
        half = self.entered()
        half.send(nbd.request(nbd.WRITE, 0, MIB) + bytes(1000))
        other = self.entered()
        for _ in range(50):
            other.read(0, 4096)
        if IS_GANTRY:
            with open(f"/proc/{self.server.process.pid}/statm") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            if not os.environ.get("GANTRY_BUILD", "").endswith(("asan", "tsan")):
                self.assertLess(resident, 120 * MIB)


if __name__ == "__main__":
    gantry_test.main()
