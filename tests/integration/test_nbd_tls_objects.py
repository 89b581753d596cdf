#!/usr/bin/python3
# One configuration: back end and loops have no part in what files and rules say.
"""TLS credentials and authorization as objects, reload, and `gantry tls`.

GANTRYD=qemu-storage-daemon runs what the reference has, too.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
import pki
import tls_case
from gantry_test import GANTRY, IS_GANTRY, MIB, Case, QmpError, require, require_gantry, wait_for
from tls_case import PSK_KEY, TlsCase, shared

setUpModule, tearDownModule = tls_case.set_up, tls_case.tear_down


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

    def test_rules_that_nobody_would_be_held_to(self):
        """A server that asks only some of its clients, or an object without a name, would be an open door."""
        require_gantry("the reference lets everybody, or nobody, in")
        server = self.serve("authz-list,id=az")
        address = {"id": "other", "addr": {"type": "unix", "data": {"path": self.path("other.sock")}}, "tls-creds": "tls"}
        self.assertEqual(server.qmp.error("nbd-server-start", {**address, "tls-authz": "az", "tls-required": False})[1],
                         "'tls-authz' is of no use with tls-required=off: clients without TLS would not be asked for a name")
        self.assertEqual(server.qmp.error("nbd-server-start", {**address, "tls-authz": ""})[1],
                         "Parameter 'tls-authz' expects the id of an authorization object, not ''")
        self.assertFalse(os.path.exists(self.path("other.sock")))

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

    def test_a_certificate_without_a_name_is_nobody(self):
        require_gantry("the reference lets it in")
        ca = shared["ca"]
        nameless = ca._new("nameless", ["signing_key", "tls_www_client"], (ca.cert, ca.key))
        self.serve("authz-list,id=az,policy=allow", server=",tls-authz=az")
        self.check(True, True)
        self.assertFalse(self.admitted(nameless))
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

    def serve(self, *words):
        """A running `gantry serve`; its URI."""
        process = subprocess.Popen([GANTRY, "serve", *gantry_test.gantryd_options(), *words], stdout=subprocess.PIPE, text=True,
                                   cwd=self.dir, env={**os.environ, "XDG_RUNTIME_DIR": self.dir})
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, gantry_test.DEADLINE)
        self.addCleanup(process.send_signal, signal.SIGINT)
        for line in process.stdout:
            if line.startswith("    nbds"):
                return line.strip()
        self.fail("gantry serve ended")

    def test_serve(self):
        require("nbdinfo")
        image = self.raw_image("disk.raw", MIB)
        self.run_tool(GANTRY, "tls", "init", "pki", "--server-name", "localhost")
        self.run_tool(GANTRY, "tls", "init", "keys", "--psk")
        port = gantry_test.free_port()
        for words in (["--tls", "pki", "--tcp", f"127.0.0.1:{port}"], ["--tls", "pki"], ["--tls", "keys"]):
            uri = self.serve(*words, image)
            if "127.0.0.1" in uri:  # its certificate has a name alone
                self.assertNotEqual(self.run_tool("nbdinfo", "--size", uri, check=False).returncode, 0)
                uri = uri.replace("127.0.0.1", "localhost")
            self.assertEqual(self.run_tool("nbdinfo", "--size", uri).stdout, f"{MIB}\n")
            self.assertNotEqual(self.run_tool("nbdinfo", "--size", uri.replace("nbds", "nbd", 1).split("tls-")[0],
                                              check=False).returncode, 0)
        done = self.run_tool(GANTRY, "serve", "--tls", self.dir, image, check=False)
        self.assertIn("has neither server-cert.pem nor keys.psk; 'gantry tls init", done.stderr)

    def test_wrong_words(self):
        for words in (["init"], ["make", "x"], ["init", "x", "--days", "0"], ["client", "x", "y"],
                      ["init", "x", "--psk", "--user", "a:b"], ["init", "x", "--client-name", "n" * 65]):
            done = self.run_tool(GANTRY, "tls", *words, check=False)
            self.assertEqual(done.returncode, 2, words)
            self.assertTrue(done.stderr.startswith("gantry tls: "), done.stderr)
            self.assertFalse(os.path.exists(self.path("x/ca-key.pem")))


if __name__ == "__main__":
    gantry_test.main()
