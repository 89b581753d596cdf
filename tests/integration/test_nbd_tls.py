#!/usr/bin/python3
"""NBD over TLS: real clients, modes, and every way in which a certificate can be wrong.

GANTRYD=qemu-storage-daemon runs what the reference has, too.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import ssl
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
import tls_case
from gantry_test import IS_GANTRY, KIB, MIB, libnbd, require, require_gantry
from nbd_raw import Closed, Raw
from tls_case import PSK_KEY, SIZE, TlsCase, shared

setUpModule, tearDownModule = tls_case.set_up, tls_case.tear_down


class Clients(TlsCase):
    def copy_both_ways(self, uri):
        self.run_tool("nbdcopy", uri("ro"), self.path("copy"))
        self.assertEqual(gantry_test.checksum(self.path("copy")), gantry_test.checksum(self.image))
        fresh = self.raw_image("fresh", SIZE)
        with open(fresh, "r+b") as file:
            file.write(random.Random(2).randbytes(SIZE))
        self.run_tool("nbdcopy", "--requests=16", "--connections=3", fresh, uri("disk"))
        self.assertEqual(gantry_test.checksum(fresh), gantry_test.checksum(self.image))

    def test_libnbd_x509(self):
        require("nbdinfo", "nbdcopy")
        self.serve()
        info = json.loads(self.run_tool("nbdinfo", "--json", self.uri()).stdout)
        self.assertEqual((info["protocol"], info["TLS"]), ("newstyle-fixed", True))
        self.copy_both_ways(self.uri)

    def test_libnbd_psk(self):
        require("nbdinfo", "nbdcopy")
        os.mkdir(self.path("psk"))
        pathlib.Path(self.path("psk/keys.psk")).write_text(f"# keys\nalice:{PSK_KEY}\nbob:{PSK_KEY[::-1]}\n")
        self.serve(creds="tls-creds-psk", dir=self.path("psk"))

        def uri(export, user="alice", keys="psk/keys.psk"):
            return f"nbds+unix://{user}@/{export}?socket={self.socket}&tls-psk-file={self.path(keys)}"
        self.copy_both_ways(uri)
        pathlib.Path(self.path("wrong.psk")).write_text(f"alice:{'ab' * 32}\neve:{PSK_KEY}\n")
        for user in ("alice", "eve"):
            self.assertNotEqual(self.run_tool("nbdinfo", uri("disk", user, "wrong.psk"), check=False).returncode, 0)
        if IS_GANTRY:
            self.logged("the client's PSK identity 'eve' is not in keys.psk")
            # The one fast cipher of TLS 1.3 that goes with such a key.
            handle = libnbd().NBD()
            handle.set_uri_allow_local_file(True)
            handle.connect_uri(uri("ro"))
            self.assertEqual(handle.get_tls_negotiated(), True)
            handle.shutdown()

    def test_qemu_img_every_kind(self):
        require("qemu-img")
        os.mkdir(self.path("psk"))
        pathlib.Path(self.path("psk/keys.psk")).write_text(f"qemu:{PSK_KEY}\n")
        kinds = {"tls-creds-x509": (self.server_dir, f"tls-creds-x509,id=c,endpoint=client,dir={self.client_dir()}"),
                 "tls-creds-psk": (self.path("psk"), f"tls-creds-psk,id=c,endpoint=client,dir={self.path('psk')}"),
                 "tls-creds-anon": (self.path("psk"), "tls-creds-anon,id=c,endpoint=client")}
        for kind, (directory, creds) in kinds.items():
            with self.subTest(kind=kind):
                server = self.serve(creds=kind, dir=directory)
                self.run_tool("qemu-img", "convert", "-O", "raw", *self.qemu(creds), self.path("copy"))
                self.assertEqual(gantry_test.checksum(self.path("copy")), gantry_test.checksum(self.image))
                server.stop()

    def test_gnutls_cli_and_tls_1_2(self):
        """TLS 1.2 works, too: with another record layer and another handshake."""
        self.serve()
        context = self.context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        client = self.greeted().starttls(context)
        self.assertEqual(client.socket.version(), "TLSv1.2")
        client.go("ro")
        self.assertEqual(client.read(MIB, 300 * KIB), pathlib.Path(self.image).read_bytes()[MIB:MIB + 300 * KIB])

    def test_ciphers(self):
        """AES-128-GCM first, whatever the client likes more."""
        require_gantry("the reference takes what the client likes most")
        self.serve()
        self.assertEqual(self.secure().socket.cipher()[0], "TLS_AES_128_GCM_SHA256")

    def test_old_versions_are_refused(self):
        self.serve()
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            context = self.context()
            with contextlib.suppress(ssl.SSLError):
                context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version
            if IS_GANTRY:
                with self.assertRaises(Closed):
                    self.greeted().starttls(context)
        if IS_GANTRY:
            self.logged("speaks no version of TLS that is allowed here")


class Modes(TlsCase):
    OPTIONS = [(nbd.OPT_LIST, b""), (nbd.OPT_INFO, nbd.info("disk")), (nbd.OPT_GO, nbd.info("disk")),
               (nbd.OPT_STRUCTURED, b""), (nbd.OPT_EXTENDED, b""), (nbd.OPT_LIST_META, nbd.contexts("disk")),
               (nbd.OPT_SET_META, nbd.contexts("disk", "base:allocation")), (nbd.OPT_PEEK, b""), (12345, b"x" * 100),
               (nbd.OPT_GO, b"malformed")]

    def test_required_tells_nothing(self):
        self.serve()
        client = self.greeted()
        for number, payload in self.OPTIONS:
            replies = client.option(number, payload)
            self.assertEqual([kind for kind, _ in replies], [nbd.TLS_REQD], number)
            self.assertNotIn(b"disk", replies[0][1])
        if IS_GANTRY:
            self.assertEqual(client.final(nbd.OPT_LIST, b"x" * 100000), nbd.TLS_REQD)
        self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.ACK)

    def test_required_export_name_and_old_clients_are_cut_off(self):
        self.serve()
        for flags, number, payload in ((3, nbd.OPT_EXPORT_NAME, b"disk"), (0, nbd.OPT_EXPORT_NAME, b"disk")):
            client = self.raw()
            client.greet(flags)
            with self.assertRaises(Closed):
                client.option(number, payload)

    def test_required_abort(self):
        self.serve()
        client = self.greeted()
        self.assertIn(client.final(nbd.OPT_ABORT), (nbd.ACK, nbd.ACK if IS_GANTRY else nbd.TLS_REQD))
        self.assertTrue(client.ends())

    def test_starttls_with_a_payload_then_without(self):
        self.serve()
        client = self.greeted()
        if IS_GANTRY:  # the reference ends the connection
            self.assertEqual(client.final(nbd.OPT_STARTTLS, b"x"), nbd.INVALID)
            client.starttls(self.context())
            client.go("ro")

    def test_everything_works_inside(self):
        self.serve()
        client = self.secure()
        self.assertEqual(client.final(nbd.OPT_STARTTLS), nbd.INVALID)
        self.assertEqual([kind for kind, _ in client.option(nbd.OPT_LIST)], [nbd.SERVER, nbd.SERVER, nbd.ACK])
        for number, _ in self.OPTIONS:
            self.assertNotEqual(client.final(number, b"nonsense"), nbd.TLS_REQD)
        self.assertEqual(client.final(nbd.OPT_ABORT), nbd.ACK)

    def test_optional(self):
        require_gantry("an extension")
        self.serve(server=",tls-required=off")
        with Raw(self.socket) as plain:
            plain.enter("ro")
            self.assertEqual(plain.read(0, 512), pathlib.Path(self.image).read_bytes()[:512])
        client = self.greeted()
        # What was said in the clear is forgotten inside: no structured replies, no context.
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
        self.assertEqual(client.final(nbd.OPT_SET_META, nbd.contexts("ro", "base:allocation")), nbd.ACK)
        client.starttls(self.context())
        self.assertEqual(client.final(nbd.OPT_SET_META, nbd.contexts("ro", "base:allocation")), nbd.INVALID)
        _, flags, _ = client.go("ro")
        self.assertFalse(flags & nbd.T_DF)
        self.assertEqual(client.read(4096, 512), pathlib.Path(self.image).read_bytes()[4096:4608])

    def test_credentials_in_use_stay(self):
        require_gantry("the reference lets them go")
        server = self.serve()
        self.assertIn("object 'tls' is in use, can not be deleted", server.qmp.error("object-del", id="tls")[1])
        server.qmp.cmd("nbd-server-stop")
        server.qmp.cmd("object-del", id="tls")

    def test_wrong_objects(self):
        server = self.daemon()
        address = {"addr": {"type": "unix", "data": {"path": self.socket}}}
        self.assertEqual(server.qmp.error("nbd-server-start", **address, tls_creds="x")[1], "No TLS credentials with id 'x'")
        server.qmp.cmd("object-add", qom_type="secret", id="s", data="x")
        self.assertEqual(server.qmp.error("nbd-server-start", **address, tls_creds="s")[1],
                         "Object with id 's' is not TLS credentials")
        server.qmp.cmd("object-add", qom_type="tls-creds-anon", id="c", endpoint="client")
        self.assertTrue(server.qmp.error("nbd-server-start", **address, tls_creds="c")[1]
                        .startswith("Expected TLS credentials for a server endpoint"))


class Certificates(TlsCase):
    """A client is let in or not, and the log says why not."""

    def check_refused(self, pair, *words, **options):
        self.serve(**options)
        self.assertFalse(self.admitted(pair))
        if IS_GANTRY:
            self.logged("TLS handshake failed", *words)
        self.assertTrue(self.admitted())

    def test_another_authority(self):
        self.check_refused("mallory", "'O=Example,CN=mallory' does not have a known issuer: it was issued by 'CN=Other CA'",
                           "has 'CN=Test CA'")

    def test_none(self):
        self.check_refused(None, "the client sent no certificate")

    def test_expired(self):
        lines = ['activation_date = "2020-01-01 00:00:00 UTC"', 'expiration_date = "2021-02-03 04:05:06 UTC"']
        self.check_refused(shared["ca"].issue("old", "old", lines=lines),
                           "client certificate 'O=Example,CN=old' expired on 2021-02-03 04:05:06 UTC")

    def test_not_yet_valid(self):
        lines = ['activation_date = "2050-01-01 00:00:00 UTC"', 'expiration_date = "2051-01-01 00:00:00 UTC"']
        self.check_refused(shared["ca"].issue("young", "young", lines=lines), "is not valid before 2050-01-01 00:00:00 UTC")

    def test_of_a_server(self):
        if IS_GANTRY:  # the reference does not look
            self.check_refused(shared["ca"].issue("s2", "s2", "server"), "must not be used by a client; it is for TLS servers")

    def test_issued_by_no_authority(self):
        middle = shared["ca"].issue("middle", "middle")
        leaf = shared["ca"].issue("leaf", "leaf", issuer=middle)
        chain = self.path("chain.pem")
        pathlib.Path(chain).write_text(open(leaf[0]).read() + open(middle[0]).read())
        self.check_refused((chain, leaf[1]), "CN=")

    def test_revoked(self):
        shutil.copy(shared["ca"].revoke(shared["bob"][0]), self.path("server/ca-crl.pem"))
        self.check_refused("bob", "'O=Example,CN=bob' has been revoked")

    def test_unverified(self):
        """verify-peer=off: anybody may come, with any certificate or none."""
        self.serve(properties=",verify-peer=off")
        for pair in ("alice", "mallory", None):
            self.assertTrue(self.admitted(pair), pair)

    def test_client_verifies_the_server(self):
        """libnbd and qemu-img as judges of what we send: the wrong name, the wrong authority."""
        require("nbdinfo", "qemu-img")
        self.serve()
        words = self.qemu(f"tls-creds-x509,id=c,endpoint=client,dir={self.client_dir()}")
        self.run_tool("qemu-img", "info", *words)
        wrong = self.run_tool("qemu-img", "info", *words[:-1], words[-1].replace("localhost", "elsewhere"), check=False)
        self.assertNotEqual(wrong.returncode, 0)
        stranger = self.client_dir("mallory", "other")
        self.assertNotEqual(self.run_tool("nbdinfo", self.uri(directory=stranger), check=False).returncode, 0)
        self.run_tool("nbdinfo", self.uri())


if __name__ == "__main__":
    gantry_test.main()
