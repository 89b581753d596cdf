"""What the tests of NBD over TLS share: certificates made once for a file of tests, a raw client with TLS, a server with it."""

import os
import random
import shutil
import ssl
import tempfile

import nbd_raw as nbd
import pki
from gantry_test import MIB, Case, wait_for
from nbd_raw import Closed, Raw

SIZE = 4 * MIB
PSK_KEY = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
shared = {}


def set_up():
    shared["dir"] = tempfile.mkdtemp(prefix="gt-pki-", dir="/tmp")
    ca = shared["ca"] = pki.Authority(os.path.join(shared["dir"], "ca"))
    other = shared["other"] = pki.Authority(os.path.join(shared["dir"], "other"), "Other CA")
    shared["server"] = ca.issue("server", "server", "server", ["localhost", "127.0.0.1"])
    shared["alice"] = ca.issue("alice", "alice")
    shared["bob"] = ca.issue("bob", "bob")
    shared["mallory"] = other.issue("mallory", "mallory")


def tear_down():
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
