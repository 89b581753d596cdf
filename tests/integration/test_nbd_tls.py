#!/usr/bin/python3
"""NBD over TLS: credentials, verification, authorization, and everything that may go wrong in a TLS handshake.

GANTRYD=qemu-storage-daemon runs what the reference has, too.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import ssl
import struct
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
import pki
from gantry_test import GANTRY, IS_GANTRY, KIB, MIB, Case, QmpError, libnbd, require, require_gantry, wait_for
from nbd_raw import Closed, Raw

SIZE = 4 * MIB
PSK_KEY = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
shared = {}


def setUpModule():
    shared["dir"] = tempfile.mkdtemp(prefix="gt-pki-", dir="/tmp")
    ca = shared["ca"] = pki.Authority(os.path.join(shared["dir"], "ca"))
    other = shared["other"] = pki.Authority(os.path.join(shared["dir"], "other"), "Other CA")
    shared["server"] = ca.issue("server", "server", "server", ["localhost", "127.0.0.1"])
    shared["alice"] = ca.issue("alice", "alice")
    shared["bob"] = ca.issue("bob", "bob")
    shared["mallory"] = other.issue("mallory", "mallory")


def tearDownModule():
    shutil.rmtree(shared["dir"], ignore_errors=True)


class TlsRaw(Raw):
    """The raw client, which can put TLS over what it has."""

    def starttls(self, context, hostname="localhost"):
        assert self.final(nbd.OPT_STARTTLS) == nbd.ACK
        self.wrap(context, hostname)
        return self

    def wrap(self, context, hostname="localhost"):
        try:
            self.socket = context.wrap_socket(self.socket, server_hostname=hostname, suppress_ragged_eofs=False)
        except (ssl.SSLError, ConnectionError, OSError) as error:
            raise Closed(str(error)) from None

    def receive(self, size):
        try:
            return super().receive(size)
        except (ssl.SSLError, BrokenPipeError) as error:
            raise Closed(str(error)) from None


class TlsCase(Case):
    def setUp(self):
        super().setUp()
        self.image = self.raw_image("disk.raw", SIZE)
        with open(self.image, "r+b") as file:
            file.write(random.Random(1).randbytes(SIZE))
        self.socket = self.path("nbd.sock")
        self.server_dir = pki.install(self.path("server"), shared["ca"].cert, shared["server"])

    def serve(self, *objects, server="", creds="tls-creds-x509", dir=None, extra=(), **more):
        """A daemon with credentials `tls`, the exports `disk` (writable) and `ro`."""
        self.server = self.daemon(
            "--object", f"{creds},id=tls,endpoint=server,dir={dir or self.server_dir}{more.pop('properties', '')}",
            *(word for o in objects for word in ("--object", o)),
            "--blockdev", f"driver=file,node-name=disk,filename={self.image},discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},tls-creds=tls,max-connections=50{server}",
            "--export", "type=nbd,id=rw,node-name=disk,name=disk,writable=on",
            "--export", "type=nbd,id=ro,node-name=disk,name=ro", *extra, **more)
        return self.server

    def client_dir(self, pair="alice", ca="ca", name=None):
        pair = shared[pair] if isinstance(pair, str) else pair
        return pki.install(self.path(name or "client-" + os.path.basename(pair[0] if pair else "none")), shared[ca].cert,
                           client=pair)

    def context(self, pair="alice", ca="ca", **versions):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(shared[ca].cert)
        if pair:
            context.load_cert_chain(*(shared[pair] if isinstance(pair, str) else pair))
        return context

    def raw(self):
        client = TlsRaw(self.socket)
        self.addCleanup(client.close)
        return client

    def greeted(self):
        client = self.raw()
        self.assertEqual(client.greet(), 3)
        return client

    def secure(self, pair="alice"):
        return self.greeted().starttls(self.context(pair))

    def admitted(self, pair="alice"):
        """Whether a client may talk. A TLS 1.3 client learns of the server's no after its own handshake."""
        client = self.greeted()
        try:
            client.starttls(self.context(pair))
            client.go("ro")
            client.close()
            return True
        except (Closed, ssl.SSLError, OSError):
            return False

    def uri(self, export="disk", directory=None, **more):
        query = "".join(f"&{key.replace('_', '-')}={value}" for key, value in more.items())
        return (f"nbds+unix:///{export}?socket={self.socket}&tls-certificates={directory or self.client_dir()}"
                f"&tls-hostname=localhost{query}")

    def qemu(self, creds, export="disk"):
        """Words for qemu-img: the export over TLS."""
        return ["--object", creds, "--image-opts", f"driver=nbd,server.type=unix,server.path={self.socket},export={export},"
                                                   "tls-creds=c,tls-hostname=localhost"]

    def logged(self, *words):
        return wait_for(lambda: all(word in self.server.stderr() for word in words), f"{words} in the log")


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


class Loading(TlsCase):
    """object-add looks at the files before anybody depends on them."""

    def add(self, directory, **more):
        return self.server.qmp.error("object-add", {"qom-type": "tls-creds-x509", "id": "x", "endpoint": "server",
                                                    "dir": directory, **more})[1]

    def setUp(self):
        super().setUp()
        self.server = self.daemon()

    def variant(self, name, **files):
        directory = self.path(name)
        pki.install(directory, files.pop("ca", shared["ca"].cert), files.pop("server", shared["server"]))
        return directory

    def test_missing_files(self):
        for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
            directory = self.variant("without-" + name)
            os.unlink(os.path.join(directory, name))
            self.assertEqual(self.add(directory),
                             f"Unable to access credentials {directory}/{name}: No such file or directory")

    def test_expired(self):
        lines = ['activation_date = "2020-01-01 00:00:00 UTC"', 'expiration_date = "2021-02-03 04:05:06 UTC"']
        directory = self.variant("expired", server=shared["ca"].issue("olds", "old", "server", lines=lines))
        self.assertTrue(self.add(directory).startswith(f"The server certificate {directory}/server-cert.pem has expired"))
        if IS_GANTRY:
            self.assertIn("until 2021-02-03 04:05:06 UTC", self.add(directory))
        self.server.qmp.cmd("object-add", {"qom-type": "tls-creds-x509", "id": "x", "endpoint": "server", "dir": directory,
                                           "sanity-check": False})

    def test_not_yet_active(self):
        lines = ['activation_date = "2050-01-01 00:00:00 UTC"', 'expiration_date = "2051-01-01 00:00:00 UTC"']
        directory = self.variant("young", server=shared["ca"].issue("youngs", "young", "server", lines=lines))
        self.assertTrue(self.add(directory).startswith(
            f"The server certificate {directory}/server-cert.pem is not yet active"))

    def test_no_authority(self):
        directory = self.variant("noca", ca=shared["alice"][0])
        self.assertIn("basic constraints do not show a CA", self.add(directory))

    def test_an_authority_as_server(self):
        authority = (shared["ca"].cert, shared["ca"].key)
        directory = self.variant("caserver", server=authority)
        self.assertIn("basic constraints show a CA, but we need one for a server", self.add(directory))

    def test_another_authority(self):
        directory = self.variant("foreign", ca=shared["other"].cert)
        self.assertTrue(self.add(directory).startswith(
            f"Our own certificate {directory}/server-cert.pem failed validation against {directory}/ca-cert.pem"))
        if IS_GANTRY:
            self.assertIn("issued by 'CN=Test CA', and", self.add(directory))

    def test_key_of_another_certificate(self):
        directory = self.variant("mixed", server=(shared["server"][0], shared["alice"][1]))
        self.assertIn("Cannot load certificate", self.add(directory))

    def test_garbage(self):
        directory = self.variant("garbage")
        for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
            kept = open(os.path.join(directory, name)).read()
            for text in ("", "rubbish", kept[:200], "x" * 3 * MIB):
                pathlib.Path(directory, name).write_text(text)
                self.assertIn(directory, self.add(directory))
            pathlib.Path(directory, name).write_text(kept)

    def test_encrypted_key(self):
        pair = shared["ca"].issue("sealed", "sealed", "server", password="tell nobody")
        directory = self.variant("sealed", server=pair)
        self.assertIn("Cannot load certificate", self.add(directory))
        self.server.qmp.cmd("object-add", {"qom-type": "secret", "id": "wrong", "data": "nobody"})
        self.assertIn("Cannot load certificate", self.add(directory, passwordid="wrong"))
        self.server.qmp.cmd("object-add", {"qom-type": "secret", "id": "right", "data": "tell nobody"})
        self.server.qmp.cmd("object-add", {"qom-type": "tls-creds-x509", "id": "x", "endpoint": "server",
                                           "dir": directory, "passwordid": "right"})

    def test_priority(self):
        require_gantry("the reference notices at the first handshake")
        self.assertIn("Unable to set TLS session priority", self.add(self.server_dir, priority="NONSENSE"))

    def test_psk_files(self):
        require_gantry("the reference reads the file at the first handshake")
        os.mkdir(self.path("psk"))
        for text, words in (("", "holds no key"), ("alice\n", "line 1 has no identity"), ("a:b:xy\n", "not hexadecimal"),
                            ("# x\na:123\n", "line 2 has a key of a bad length"), (":11\n", "line 1 has no identity")):
            pathlib.Path(self.path("psk/keys.psk")).write_text(text)
            self.assertIn(words, self.server.qmp.error("object-add", {
                "qom-type": "tls-creds-psk", "id": "x", "endpoint": "server", "dir": self.path("psk")})[1])

    def test_single_files(self):
        require_gantry("an extension")
        self.server.qmp.cmd("object-add", {
            "qom-type": "tls-creds-x509", "id": "x", "endpoint": "server", "ca-cert": shared["ca"].cert,
            "cert": shared["server"][0], "key": shared["server"][1]})
        self.server.qmp.cmd("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.socket}}, "tls-creds": "x"})
        self.assertEqual([kind for kind, _ in self.secure().option(nbd.OPT_LIST)], [nbd.ACK])


class Authorization(TlsCase):
    def check(self, alice, bob):
        self.assertEqual((self.admitted("alice"), self.admitted("bob")), (alice, bob))

    def test_simple_and_resolved_at_use(self):
        server = self.serve(server=",tls-authz=az")
        self.check(False, False)  # there is no such object yet
        if IS_GANTRY:
            self.logged("Cannot find QAuthZ object ID az")
        server.qmp.cmd("object-add", {"qom-type": "authz-simple", "id": "az", "identity": "O=Example,CN=alice"})
        self.check(True, False)
        if IS_GANTRY:
            self.logged("TLS authz check for 'O=Example,CN=bob' is denied")
        server.qmp.cmd("object-del", id="az")
        self.check(False, False)
        server.qmp.cmd("object-add", {"qom-type": "authz-simple", "id": "az", "identity": "O=Example,CN=bob"})
        self.check(False, True)
        server.qmp.cmd("object-del", id="az")
        server.qmp.cmd("object-add", {"qom-type": "secret", "id": "az", "data": "x"})
        self.check(False, False)

    def test_list(self):
        server = self.serve(server=",tls-authz=az")

        def rules(*rules, **more):
            with contextlib.suppress(QmpError):
                server.qmp.cmd("object-del", id="az")
            server.qmp.cmd("object-add", {"qom-type": "authz-list", "id": "az", "rules": [
                {"match": m, "policy": p, "format": f} for m, p, f in rules], **more})
        rules()
        self.check(False, False)
        rules(policy="allow")
        self.check(True, True)
        rules(("O=Example,CN=alice", "allow", "exact"))
        self.check(True, False)
        rules(("*,CN=b?b", "deny", "glob"), ("O=Example,*", "allow", "glob"))
        self.check(True, False)
        rules(("O=Example,*", "allow", "glob"), ("*", "deny", "glob"))
        self.check(True, True)
        rules(("O=Example,CN=ali*", "allow", "exact"))
        self.check(False, False)

    def test_list_file(self):
        path = self.path("authz.json")
        if not IS_GANTRY:
            gantry_test.missing("the reference's type is in its schema and cannot be made", installable=False)

        def write(text):
            pathlib.Path(path + ".new").write_text(text if isinstance(text, str) else json.dumps(text))
            os.rename(path + ".new", path)

        def only(name):
            return {"rules": [{"match": f"*CN={name}", "policy": "allow", "format": "glob"}], "policy": "deny"}
        write(only("alice"))
        server = self.serve(f"authz-list-file,id=az,filename={path}", server=",tls-authz=az")
        self.check(True, False)
        write(only("bob"))
        self.check(False, True)
        for broken in ("", "{", "[]", '{"rules": 3}', '{"rules": [{"match": "x"}]}', '{"polixy": "allow"}'):
            write(broken)
            self.check(False, False)
        os.unlink(path)
        self.check(False, False)
        # Warnings are few in a second.
        wait_for(lambda: not self.admitted() and "by 'az': Unable to read" in self.server.stderr(), "the reason in the log")
        write({"policy": "allow"})
        self.check(True, True)
        self.assertIn("Unable to read", server.qmp.error("object-add", {"qom-type": "authz-listfile", "id": "b",
                                                                        "filename": self.path("none")})[1])
        server.qmp.cmd("object-add", {"qom-type": "authz-listfile", "id": "fixed", "filename": path, "refresh": False})

    def test_pam(self):
        require_gantry("the reference of this system has no PAM")
        service = f"gantry-test-{os.getpid()}"
        try:
            file = open(f"/etc/pam.d/{service}", "x")
        except OSError as error:
            gantry_test.missing(f"cannot make a PAM service: {error}", installable=False)
        self.addCleanup(os.unlink, f"/etc/pam.d/{service}")
        with file:
            file.write("account requisite pam_succeed_if.so user = O=Example,CN=alice\naccount required pam_permit.so\n")
        server = self.serve(server=",tls-authz=az")
        with open(f"/etc/pam.d/{service}", "w") as file:
            file.write(f"account requisite pam_listfile.so item=user sense=allow file={self.path('users')} onerr=fail\n"
                       "account required pam_permit.so\n")
        pathlib.Path(self.path("users")).write_text("O=Example,CN=alice\n")
        os.chmod(self.path("users"), 0o600)
        server.qmp.cmd("object-add", {"qom-type": "authz-pam", "id": "az", "service": service})
        self.check(True, False)

    def test_psk_identities(self):
        require_gantry("the reference asks about certificates alone")
        require("nbdinfo")
        os.mkdir(self.path("psk"))
        pathlib.Path(self.path("psk/keys.psk")).write_text(f"alice:{PSK_KEY}\nbob:{PSK_KEY}\n")
        self.serve("authz-simple,id=az,identity=alice", creds="tls-creds-psk", dir=self.path("psk"), server=",tls-authz=az")
        for user, status in (("alice", 0), ("bob", 1)):
            uri = f"nbds+unix://{user}@/disk?socket={self.socket}&tls-psk-file={self.path('psk/keys.psk')}"
            self.assertEqual(self.run_tool("nbdinfo", uri, check=False).returncode, status)

    def test_a_name_that_nobody_verified_counts_nothing(self):
        require_gantry("the reference lets them in")
        self.serve("authz-list,id=az,policy=allow", server=",tls-authz=az", properties=",verify-peer=off")
        self.check(False, False)
        self.logged("needs a client whose name was verified")


class Reload(TlsCase):
    def served_name(self):
        client = self.secure()
        subject = dict(pair[0] for pair in client.socket.getpeercert()["subject"])
        return subject["commonName"]

    def setUp(self):
        super().setUp()
        require_gantry("an extension")
        self.serve()

    def replace(self, name):
        pki.install(self.server_dir, server=shared["ca"].issue("next-" + name, name, "server", ["localhost"]))

    def test_command(self):
        old = self.secure()
        old.go("disk")
        self.assertEqual(self.served_name(), "server")
        self.replace("second")
        self.assertEqual(self.served_name(), "server")
        self.server.qmp.cmd("tls-creds-reload")
        self.assertEqual(self.served_name(), "second")
        # A connection that exists lives on.
        self.assertEqual(old.read(0, 4096), pathlib.Path(self.image).read_bytes()[:4096])
        self.replace("third")
        self.server.qmp.cmd("tls-creds-reload", id="tls")
        self.assertEqual(self.served_name(), "third")

    def test_broken_files_change_nothing(self):
        pathlib.Path(self.server_dir, "server-cert.pem").write_text("rubbish")
        desc = self.server.qmp.error("tls-creds-reload")[1]
        self.assertIn("TLS credentials stay as they were: object 'tls': ", desc)
        self.assertEqual(self.served_name(), "server")
        self.assertEqual(self.server.qmp.error("tls-creds-reload", id="x")[1], "No TLS credentials with id 'x'")

    def test_revoked_meanwhile(self):
        self.assertTrue(self.admitted("bob"))
        shutil.copy(shared["ca"].revoke(shared["bob"][0]), os.path.join(self.server_dir, "ca-crl.pem"))
        self.server.qmp.cmd("tls-creds-reload")
        self.assertFalse(self.admitted("bob"))
        self.assertTrue(self.admitted("alice"))

    def test_sighup(self):
        self.replace("after")
        self.server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.served_name() == "after", "the new certificate")
        pathlib.Path(self.server_dir, "server-key.pem").write_text("rubbish")
        self.server.process.send_signal(signal.SIGHUP)
        self.logged("TLS credentials stay as they were")
        self.assertEqual(self.served_name(), "after")


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
        clients = self.server.qmp.cmd("query-nbd-servers")[0]["clients"]
        self.assertEqual([c["tls-subject"] for c in clients], ["O=Example,CN=bob"])


class Tool(Case):
    """gantry tls."""

    def setUp(self):
        super().setUp()
        require_gantry()

    def test_init_serves(self):
        require("certtool", "nbdinfo")
        done = self.run_tool(GANTRY, "tls", "init", "pki", "--server-name", "localhost", "--server-name", "127.0.0.1",
                             "--client-name", "carol", "--days", "10")
        for name in ("ca", "server", "client"):
            self.assertIn(f"pki/{name}-cert.pem", done.stdout)
            self.assertEqual(os.stat(self.path(f"pki/{name}-key.pem")).st_mode & 0o777, 0o600)
            self.run_tool("certtool", "--verify", "--load-ca-certificate", "pki/ca-cert.pem", "--infile",
                          f"pki/{name}-cert.pem")
        before = gantry_test.checksum(self.path("pki/server-key.pem"))
        again = self.run_tool(GANTRY, "tls", "init", "pki", check=False)
        self.assertEqual(again.returncode, 1)
        self.assertIn("exists already", again.stderr)
        self.assertEqual(gantry_test.checksum(self.path("pki/server-key.pem")), before)
        self.run_tool(GANTRY, "tls", "client", "pki", "dave", "--client-name", "dave")
        port = gantry_test.free_port()
        server = self.daemon("--object", f"tls-creds-x509,id=t,endpoint=server,dir={self.path('pki')}",
                             "--object", "authz-list,id=az,rules.0.match=CN=dave,rules.0.policy=allow",
                             "--blockdev", "driver=null-co,node-name=n,size=1048576",
                             "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=t,tls-authz=az",
                             "--export", "nbd,id=e,node-name=n,name=x")
        uri = f"nbds://localhost:{port}/x?tls-certificates="
        self.run_tool("nbdinfo", uri + self.path("dave"))
        self.assertNotEqual(self.run_tool("nbdinfo", uri + self.path("pki"), check=False).returncode, 0)
        wait_for(lambda: "'CN=carol' is denied" in server.stderr(), "the reason in the log")

    def test_psk(self):
        self.run_tool(GANTRY, "tls", "init", "keys", "--psk", "--user", "ann", "--user", "bo")
        lines = pathlib.Path(self.path("keys/keys.psk")).read_text().splitlines()
        self.assertEqual([line.split(":")[0] for line in lines], ["ann", "bo"])
        self.assertEqual({len(line.split(":")[1]) for line in lines}, {64})
        self.assertEqual(os.stat(self.path("keys/keys.psk")).st_mode & 0o777, 0o600)

    def test_wrong_words(self):
        for words in (["init"], ["make", "x"], ["init", "x", "--days", "0"], ["client", "x", "y"],
                      ["init", "x", "--psk", "--user", "a:b"], ["init", "x", "--client-name", "n" * 65]):
            done = self.run_tool(GANTRY, "tls", *words, check=False)
            self.assertEqual(done.returncode, 2, words)
            self.assertTrue(done.stderr.startswith("gantry tls: "), done.stderr)
            self.assertFalse(os.path.exists(self.path("x/ca-key.pem")))


if __name__ == "__main__":
    gantry_test.main()
