#!/usr/bin/python3
"""Extended headers: 64-bit lengths, payloads, and what a server must not get wrong about them. No installed client or server
speaks them: the other side is our own wire client."""

import os
import pathlib
import random
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
import nbd_raw as nbd
from gantry_test import GIB, KIB, MIB
from nbd_case import RawCase

HUGE = 64 * GIB  # lengths that 32 bits cannot hold
SMALL = 2 * MIB
BITMAP = "qemu:dirty-bitmap:b"


class Extended(RawCase):
    def setUp(self):
        super().setUp()
        gt.require_gantry("the installed reference has no extended headers")
        self.image = self.raw_image("huge.raw", HUGE)
        with open(self.image, "r+b") as file:
            file.seek(40 * GIB)
            file.write(b"x" * MIB)
        self.small = self.raw_image("small.raw", SMALL)
        with open(self.small, "r+b") as file:
            file.write(random.Random(1).randbytes(MIB))
        self.socket = self.path("nbd.sock")
        self.server = self.daemon(
            "--blockdev", f"driver=file,node-name=huge,filename={self.image},discard=unmap",
            "--blockdev", f"driver=file,node-name=small,filename={self.small},discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0")
        self.q = self.server.qmp
        self.q.cmd("block-dirty-bitmap-add", {"node": "huge", "name": "b", "granularity": MIB})
        for node, more in (("huge", {"bitmaps": ["b"], "allocation-depth": True}), ("small", {})):
            self.q.cmd("block-export-add", {"type": "nbd", "id": node, "node-name": node, "writable": True, **more})
        self.q.cmd("block-export-add", {"type": "nbd", "id": "ro", "node-name": "small", "name": "ro"})

    def entered(self, name="small", *queries):
        client = self.raw()
        self.about = client.enter(name, extended=True, queries=queries or None)
        return client

    def contents(self, path=None):
        with open(path or self.small, "rb") as file:
            return file.read()

    def alive(self):
        """The server still serves others, and holds no client that is gone."""
        client = self.raw()
        client.enter("small")
        self.assertEqual(client.read(0, 512), self.contents()[:512])


class Negotiation(Extended):
    def test_the_payload_flag_needs_a_context_of_this_export(self):
        for queries, expected in (((), 0), (("base:allocation",), nbd.T_STATUS_PAYLOAD)):
            self.entered("huge", *queries)
            self.assertEqual(self.about[1] & (nbd.T_STATUS_PAYLOAD | nbd.T_DF), expected | nbd.T_DF)
        client = self.raw()
        client.greet()
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
        self.assertEqual(len(client.select("small", "base:allocation")), 1)
        self.assertEqual(client.final(nbd.OPT_EXTENDED), nbd.ACK)
        # Contexts may be chosen before; INFO says what GO will say.
        for export, expected in (("small", nbd.T_STATUS_PAYLOAD), ("huge", 0)):
            for payload in (payload for kind, payload in client.option(nbd.OPT_INFO, nbd.info(export, 3))
                            if kind == nbd.INFO and payload[:2] == b"\0\0"):
                self.assertEqual(struct.unpack(">HQH", payload)[2] & nbd.T_STATUS_PAYLOAD, expected)
        self.assertEqual(client.go("small", 3)[1] & nbd.T_STATUS_PAYLOAD, nbd.T_STATUS_PAYLOAD)

    def test_compact_mode_never_shows_the_payload_flag(self):
        client = self.raw()
        self.assertFalse(client.enter("small", structured=True, status=True)[1] & nbd.T_STATUS_PAYLOAD)
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, 12, nbd.PAYLOAD_LEN), nbd.EINVAL)
        self.assertEqual(client.ask(nbd.READ, 0, 512), 0)


class Requests(Extended):
    def test_every_command_is_answered_by_chunks_that_echo_the_offset(self):
        client = self.entered("small", "base:allocation")
        data = random.Random(2).randbytes(300_000)
        for at in (0, 1, 511, 4096, SMALL - len(data)):
            self.assertEqual(client.ask(nbd.WRITE, at, len(data), data=data, flags=nbd.FUA), 0)
            self.assertEqual(client.read_chunks(at, len(data))[0], data)
            self.assertEqual(client.read_chunks(at, len(data), nbd.DF)[0], data)
        # Small ones, which are read where they are sent from, and many at once.
        for i in range(64):
            client.request(nbd.READ, i * 4096, 4096, cookie=i)
        expected = self.contents()
        for _ in range(64):
            done, error, kind, payload = client.reply()
            at = struct.unpack(">Q", payload[:8])[0]
            self.assertEqual((done, error, kind, payload[8:]), (True, 0, nbd.C_DATA, expected[at : at + 4096]))
        for command, length in ((nbd.FLUSH, 0), (nbd.TRIM, 64 * KIB), (nbd.CACHE, SMALL), (nbd.WRITE_ZEROES, 64 * KIB)):
            client.request(command, 64 * KIB, length if command != nbd.CACHE else MIB, cookie=9)
            self.assertEqual(client.reply(9), (True, 0, nbd.C_NONE, b""))
        client.request(nbd.READ, 5, 0)
        self.assertEqual(client.reply(1), (True, 0, nbd.C_NONE, b""))
        client.request(nbd.WRITE, SMALL, 0)
        self.assertEqual(client.reply(1), (True, 0, nbd.C_NONE, b""))

    def test_lengths_of_64_bits(self):
        client = self.entered("huge", "base:allocation", "qemu:allocation-depth", BITMAP)
        self.assertEqual(client.ask(nbd.CACHE, 0, 8 * GIB), 0)
        self.assertEqual(client.ask(nbd.WRITE_ZEROES, 0, HUGE - 12345), 0)
        self.assertEqual(os.stat(self.image).st_blocks * 512 < MIB, True)
        answer = client.statuses(0, HUGE)
        self.assertEqual(answer[client.contexts["base:allocation"]], [(HUGE, 3)])
        self.assertEqual(answer[client.contexts["qemu:allocation-depth"]], [(HUGE, 1)])
        self.assertEqual(answer[client.contexts[BITMAP]], [(HUGE, 1)])
        self.assertEqual(client.ask(nbd.TRIM, 4096, HUGE - 4096), 0)
        self.assertEqual(client.ask(nbd.WRITE, 50 * GIB, 4096, data=b"d" * 4096), 0)
        extents = client.statuses(5 * GIB, HUGE - 5 * GIB)[client.contexts["base:allocation"]]
        self.assertEqual(extents, [(45 * GIB, 3), (4096, 0), (14 * GIB - 4096, 3)])
        self.assertEqual(client.statuses(5 * GIB, 5 * GIB, nbd.REQ_ONE)[client.contexts["base:allocation"]], [(5 * GIB, 3)])

    def test_ranges_are_checked_in_64_bits(self):
        client = self.entered("small", "base:allocation")
        before = self.contents()
        for command in (nbd.TRIM, nbd.CACHE, nbd.BLOCK_STATUS, nbd.WRITE_ZEROES, nbd.READ):
            error = nbd.ENOSPC if command == nbd.WRITE_ZEROES else nbd.EINVAL
            for offset, length in ((0, 1 << 32), (0, SMALL + 1), (1, SMALL), (4096, (1 << 64) - 4096),
                                   (SMALL, (1 << 64) - 1), ((1 << 64) - 4096, 8192), (0, (1 << 63) + 512)):
                self.assertEqual(client.ask(command, offset, length), error, (command, offset, length))
        self.assertEqual(self.contents(), before)

    def test_reads_above_the_maximum_payload_are_refused(self):
        client = self.entered("huge")
        for length in (32 * MIB + 1, 1 << 32, (1 << 32) + 512):
            self.assertEqual(client.ask(nbd.READ, 0, length), nbd.EOVERFLOW)
        data, parts = client.read_chunks(40 * GIB - MIB, 4 * MIB)
        self.assertEqual(data, bytes(MIB) + b"x" * MIB + bytes(2 * MIB))
        self.assertEqual([kind for kind, _, _ in parts], [nbd.C_HOLE, nbd.C_DATA, nbd.C_HOLE])

    def test_errors_carry_text(self):
        client = self.entered("ro", "base:allocation")
        for command, flags, text in ((nbd.WRITE, 0, "read-only"), (nbd.READ, 0x8000, "flag"), (77, 0, "unknown command"),
                                     (nbd.RESIZE, 0, "unknown command")):
            self.assertNotEqual(client.ask(command, 0, 512, flags, data=bytes(512) if command == nbd.WRITE else b""), 0)
            self.assertIn(text, client.error_text)


class Payloads(Extended):
    def test_a_write_without_its_flag_is_taken_all_the_same(self):
        client = self.entered()
        client.send(nbd.extended_request(nbd.WRITE, 4096, 512, data=b"w" * 512))
        client.offset_of = {1: 4096}
        self.assertEqual(client.reply(1), (True, 0, nbd.C_NONE, b""))
        self.assertEqual(client.read_chunks(4096, 512)[0], b"w" * 512)

    def test_payloads_where_none_belongs_are_consumed(self):
        client = self.entered("small", "base:allocation")
        before = self.contents()
        for command in (nbd.READ, nbd.FLUSH, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES, nbd.RESIZE, 99):
            for size in (0, 1, 32, 5000, 300_000):
                # What a server that does not consume it would take for requests.
                data = (nbd.extended_request(nbd.WRITE_ZEROES, 0, SMALL, cookie=7) * 10000)[:size]
                self.assertEqual(client.ask(command, 0, size, nbd.PAYLOAD_LEN, data=data), nbd.EINVAL, (command, size))
        self.assertEqual(self.contents(), before)
        self.assertEqual(client.ask(nbd.READ, 0, 512), 0)

    def test_a_payload_above_the_maximum_ends_the_connection_at_once(self):
        for command in (nbd.WRITE, nbd.READ, nbd.BLOCK_STATUS, nbd.FLUSH):
            for length in (32 * MIB + 1, 1 << 32, (1 << 64) - 1):
                client = self.entered("small", "base:allocation")
                client.send(nbd.extended_request(command, 0, length, nbd.PAYLOAD_LEN))
                self.assertTrue(client.ends())
        self.alive()

    def test_status_of_the_contexts_that_the_payload_names(self):
        client = self.entered("huge", "base:allocation", "qemu:allocation-depth", BITMAP)
        ids = list(client.contexts.values())
        for chosen in ([ids[0]], [ids[2], ids[0]], ids, ids[::-1]):
            answer = client.statuses(0, 0, data=nbd.status_payload(HUGE, *chosen))
            self.assertEqual(sorted(answer), sorted(chosen))
            for extents in answer.values():
                self.assertEqual(sum(length for length, _ in extents), HUGE)
        answer = client.statuses(40 * GIB, 0, nbd.REQ_ONE, data=nbd.status_payload(4096, ids[0]))
        self.assertEqual(answer, {ids[0]: [(4096, 0)]})

    def test_status_payloads_that_are_wrong(self):
        client = self.entered("huge", "base:allocation", BITMAP)
        one, two = client.contexts.values()
        cases = (b"", b"1234567", bytes(8), nbd.status_payload(HUGE), nbd.status_payload(4096, one, one),
                 nbd.status_payload(4096, two, one, two), nbd.status_payload(4096, 0), nbd.status_payload(4096, 99, one),
                 nbd.status_payload(4096, one) + b"x", nbd.status_payload(HUGE + 1, one), nbd.status_payload(0, one),
                 nbd.status_payload((1 << 64) - 1, one), nbd.status_payload(4096, *[one] * 100),
                 nbd.status_payload(4096, *range(200_000)))
        for data in cases:
            self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, len(data), nbd.PAYLOAD_LEN, data=data), nbd.EINVAL, data[:32])
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 4096, 12, nbd.PAYLOAD_LEN, data=nbd.status_payload(HUGE, one)), nbd.EINVAL)
        self.assertEqual(len(client.statuses(0, 0, data=nbd.status_payload(4096, two))), 1)

    def test_status_payload_without_a_context(self):
        client = self.entered("huge")
        data = nbd.status_payload(4096, 1)
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, len(data), nbd.PAYLOAD_LEN, data=data), nbd.EINVAL)
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, 4096), nbd.EINVAL)
        self.assertEqual(client.ask(nbd.READ, 0, 512), 0)


class Violations(Extended):
    def test_the_other_magic_ends_the_connection(self):
        for make, options in ((nbd.request, {"extended": True}), (nbd.extended_request, {}),
                              (nbd.extended_request, {"structured": True})):
            client = self.raw()
            client.enter("small", **options)
            client.send(make(nbd.READ, 0, 512) + bytes(64))
            self.assertTrue(client.ends())
        self.alive()

    def test_the_client_may_leave_at_every_byte(self):
        before = self.contents()
        small = nbd.extended_request(nbd.READ, 0, 65536) + nbd.extended_request(
            nbd.BLOCK_STATUS, 0, 12, nbd.PAYLOAD_LEN, data=nbd.status_payload(SMALL, 1))
        # What is written is what is there: a torn request would be seen.
        talk = small + nbd.extended_request(nbd.WRITE, 4096, 600, nbd.PAYLOAD_LEN, data=before[4096:4696])
        for cut in range(len(talk)):
            with nbd.Raw(self.socket) as client:
                client.enter("small", extended=True, queries=["base:allocation"])
                client.send(talk[:cut])
        self.assertEqual(self.contents(), before)
        gt.wait_for(lambda: not self.q.cmd("query-nbd-servers")[0]["clients"], "the clients to be gone")
        self.alive()

    def test_requests_and_disconnect_in_any_pieces(self):
        for step in (1, 7, 31, 33, 4096):
            client = self.entered()
            talk = b"".join(nbd.extended_request(nbd.WRITE, i * 512, 512, nbd.PAYLOAD_LEN, i, bytes([i]) * 512) for i in range(8))
            talk += nbd.extended_request(nbd.DISC, 1, (1 << 64) - 1, 0xFFFF)
            client.offset_of = {i: i * 512 for i in range(8)}
            for at in range(0, len(talk), step):
                client.send(talk[at : at + step])
            self.assertEqual(sorted(client.reply()[1] for _ in range(8)), [0] * 8)
            self.assertTrue(client.ends())
            self.assertEqual(self.contents()[:4096], b"".join(bytes([i]) * 512 for i in range(8)))


if __name__ == "__main__":
    gt.main()
