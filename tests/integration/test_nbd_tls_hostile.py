#!/usr/bin/python3
"""NBD over TLS with clients that stall, lie, flood and vanish: nobody else notices.

GANTRYD=qemu-storage-daemon runs what the reference has, too.
"""

import contextlib
import os
import pathlib
import random
import socket
import ssl
import struct
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
import tls_case
from gantry_test import IS_GANTRY, KIB, MIB, require_gantry, wait_for
from gnutls_raw import GnutlsSocket
from nbd_raw import Closed
from tls_case import TlsCase, shared

setUpModule, tearDownModule = tls_case.set_up, tls_case.tear_down


class Robustness(TlsCase):
    def alive(self):
        """Another client is served, soon."""
        begin = time.monotonic()
        client = self.secure()
        client.go("ro")
        self.assertEqual(client.read(0, 4096), pathlib.Path(self.image).read_bytes()[:4096])
        client.send(nbd.request(nbd.DISC))
        client.close()
        self.assertLess(time.monotonic() - begin, 10)

    def test_injected_plaintext_is_not_an_option(self):
        """CVE-2021-3716: options that a man in the middle appends to STARTTLS."""
        self.serve()
        option = struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_STRUCTURED, 0)
        client = self.greeted()
        client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_STARTTLS, 0) + option)
        self.assertEqual(client.replies(nbd.OPT_STARTTLS)[-1][0], nbd.ACK)
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.socket.recv(4096):
                rest += part
        self.assertNotIn(struct.pack(">Q", nbd.REPLY_MAGIC), rest)  # at most a TLS alert
        if IS_GANTRY:
            self.logged("TLS handshake failed")
        self.alive()

    def client_hello(self):
        """The bytes of an honest client's first flight."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        return outgoing.read()

    def test_disconnect_anywhere_in_the_handshake(self):
        self.serve()
        hello = self.client_hello()
        for length in [*range(0, 12), *range(12, len(hello), 37), len(hello)]:
            client = self.greeted()
            self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)
            client.send(hello[:length])
            client.close()
        self.alive()

    def test_damaged_handshakes(self):
        self.serve()
        hello, choice = self.client_hello(), random.Random(7)
        for _ in range(60):
            damaged = bytearray(hello)
            for _ in range(choice.randrange(1, 6)):
                damaged[choice.randrange(len(damaged))] = choice.randrange(256)
            client = self.greeted()
            self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)
            with contextlib.suppress(Closed):
                client.send(bytes(damaged))
            client.close()
        for rubbish in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70000, b"\x00" * 5000):
            client = self.greeted()
            self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)
            with contextlib.suppress(Closed):
                client.send(rubbish)
            self.assertTrue(client.ends())
        self.alive()

    def test_stalled_and_dribbling_handshakes_delay_nobody(self):
        self.serve(server=",handshake-max-seconds=3" if IS_GANTRY else "")
        hello = self.client_hello()
        stalled = []
        for length in (0, 1, 5, 100, len(hello)):
            client = self.greeted()
            self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)
            client.send(hello[:length])
            stalled.append(client)
        self.alive()
        dribble = self.greeted()
        self.assertEqual(dribble.final(nbd.OPT_STARTTLS), nbd.ACK)
        for byte in hello:
            dribble.send(bytes([byte]))
        self.assertEqual(dribble.receive(1), b"\x16")  # the server's hello
        self.alive()
        if IS_GANTRY:  # their time is limited from the accept on
            for client in stalled:
                self.assertTrue(client.ends())

    def test_good_bye(self):
        """After DISC, and after ABORT, the server says close_notify before it closes."""
        require_gantry("the reference just closes")
        self.serve()
        client = self.secure()
        client.go("ro")
        client.send(nbd.request(nbd.DISC))
        self.assertEqual(client.socket.recv(1), b"")  # a ragged end would raise
        client = self.secure()
        self.assertEqual(client.final(nbd.OPT_ABORT), nbd.ACK)
        self.assertEqual(client.socket.recv(1), b"")

    def test_requests_before_a_good_bye_are_answered(self):
        require_gantry("the reference loses the replies")
        self.serve()
        client = self.secure()
        client.go("disk")
        client.send(nbd.request(nbd.WRITE, 0, 100000, data=b"w" * 100000) + nbd.request(nbd.READ, 0, 100000, cookie=2) +
                    nbd.request(nbd.DISC))
        got = client.receive(16 + 16 + 100000)
        self.assertTrue(got.endswith(b"w" * 1000))

    def test_refused_write_leaves_the_session_intact(self):
        """Its payload is skipped inside TLS, not on the raw socket."""
        self.serve()
        client = self.secure()
        client.go("ro")
        for size in (1, 4096, 100 * KIB, 3 * MIB):
            client.send(nbd.request(nbd.WRITE, 0, size, data=b"x" * size, cookie=size))
            error, cookie = struct.unpack(">4xIQ", client.receive(16))
            self.assertNotEqual(error, 0)
            self.assertEqual(cookie, size)
        self.assertEqual(client.read(0, 512), pathlib.Path(self.image).read_bytes()[:512])

    def test_records_of_any_size(self):
        """Requests cut into records at every place, and many in one record."""
        self.serve()
        client = self.secure()
        client.go("disk")
        choice = random.Random(3)
        for round_ in range(20):
            data = choice.randbytes(choice.choice((1, 512, 40000, 200000)))
            message = (nbd.request(nbd.WRITE, 777, len(data), data=data, cookie=5) +
                       nbd.request(nbd.FLUSH, cookie=6))
            while message:
                step = choice.choice((1, 7, 28, 5000, 16384, 100000))
                client.send(message[:step])
                message = message[step:]
            self.assertEqual({struct.unpack(">4xIQ", client.receive(16)) for _ in range(2)}, {(0, 5), (0, 6)})
            self.assertEqual(client.read(777, len(data)), data, round_)

    def gnutls(self):
        client = self.greeted()
        self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)
        client.socket = GnutlsSocket(client.socket, *shared["alice"])
        return client

    def test_what_follows_a_key_update_is_not_lost(self):
        """Records without data (key updates, empty ones) in one piece with requests, in the handshake and after it."""
        self.serve()
        content = pathlib.Path(self.image).read_bytes()
        option = nbd.info("disk")
        for of_peer in (False, True):
            client = self.gnutls()
            client.socket.hold()
            client.socket.update_key(of_peer)
            client.send(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_GO, len(option)) + option)
            client.socket.flush()
            self.assertEqual(client.replies(nbd.OPT_GO)[-1][0], nbd.ACK)
            for offset in (0, 4096, 9999):
                client.socket.hold()
                client.socket.update_key(of_peer)
                client.socket.send_nothing(padding=1 + offset)
                client.send(nbd.request(nbd.READ, offset, 1000))
                client.socket.flush()
                self.assertEqual(client.receive(16 + 1000)[16:], content[offset:offset + 1000])
        self.alive()

    def test_broken_record_ends_the_connection_only(self):
        self.serve()
        for junk in (b"\x17\x03\x03\x00\x20" + b"j" * 32, b"\x17\x03\x03\xff\xff", b"plain", nbd.request(nbd.READ, 0, 512)):
            client = self.secure()
            client.go("disk")
            raw = socket.socket(fileno=os.dup(client.socket.fileno()))
            with raw:
                raw.sendall(junk + b"z" * 100)
                with self.assertRaises(Closed):
                    client.receive(1)
        self.alive()

    def test_cut_off_without_good_bye(self):
        self.serve()
        for sent in (b"", nbd.request(nbd.WRITE, 0, 100000, data=b"x" * 50000), nbd.request(nbd.READ, 0, 4 * MIB) * 4):
            client = self.secure()
            client.go("disk")
            client.send(sent)
            client.close()
        self.alive()
        if IS_GANTRY:
            wait_for(lambda: not self.server.qmp.cmd("query-nbd-servers")[0]["clients"], "the clients to be gone")

    def test_client_that_reads_nothing(self):
        self.serve()
        client = self.secure()
        client.go("ro")
        client.socket.settimeout(0.5)
        with contextlib.suppress(Closed, ssl.SSLError, TimeoutError, OSError):
            for cookie in range(2000):
                client.send(nbd.request(nbd.READ, 0, MIB, cookie=cookie))
        self.alive()
        if IS_GANTRY:
            resident = int(pathlib.Path(f"/proc/{self.server.process.pid}/statm").read_text().split()[1]) * 4 * KIB
            self.assertLess(resident, 600 * MIB)  # with the sanitizers' shadow

    def test_many_handshakes_at_once(self):
        self.serve()
        clients = []
        for _ in range(20):
            client = self.greeted()
            self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)
            clients.append(client)
        for client in reversed(clients):
            client.wrap(self.context())
            client.go("ro")
        for client in clients:
            self.assertEqual(client.read(4096, 4096), pathlib.Path(self.image).read_bytes()[4096:8192])

    def test_stop_with_clients_in_the_handshake(self):
        """CVE-2024-7409."""
        require_gantry("this version of the reference never ends")
        server = self.serve()
        waiting = []
        for length in (0, 3, 50):
            client = self.greeted()
            self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)
            client.send(self.client_hello()[:length])
            waiting.append(client)
        server.qmp.cmd("nbd-server-stop")
        for client in waiting:
            self.assertTrue(client.ends())
        server.qmp.cmd("object-del", id="tls")

    def test_subject_is_told(self):
        require_gantry("an extension")
        self.serve()
        client = self.secure("bob")
        client.go("ro")
        about = self.server.qmp.cmd("query-nbd-servers")[0]
        self.assertEqual([c["tls-subject"] for c in about["clients"]], ["O=Example,CN=bob"])
        self.assertEqual(about["addresses"], [f"nbds+unix:///?socket={self.socket}"])


if __name__ == "__main__":
    gantry_test.main()
