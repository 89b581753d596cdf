#!/usr/bin/python3
# One configuration: what is tried is done by threads of their own.
"""Encrypted qcow2 images between the daemon and qemu-img: every cipher and mode read and written, secrets, key slots, refusals."""

import atexit
import base64
import ctypes
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import KIB, MIB, Case, IS_GANTRY, checksum, missing, require, require_gantry

SIZE = 3 * MIB + 5 * 512
PASSPHRASE = "correct horse battery staple"
SECRET = f"secret,id=s,data={PASSPHRASE}"

# Options of qemu-img create after "encrypt."; each row tries several things at once.
LUKS = {
    "default": "cipher-alg=aes-256",
    "aes128": "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5,hash-alg=sha1",
    "aes192": "cipher-alg=aes-192,ivgen-alg=essiv",
    "ctr": "cipher-mode=ctr,hash-alg=sha512",
    "ecb": "cipher-mode=ecb",
    "serpent": "cipher-alg=serpent-256,ivgen-alg=plain",
    "serpentessiv": "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha384",
    "twofish": "cipher-alg=twofish-128,cipher-mode=cbc,hash-alg=ripemd160",
    "twofishxts": "cipher-alg=twofish-192,hash-alg=sha224",
    "cast5": "cipher-alg=cast5-128,cipher-mode=cbc",
    "cast5ctr": "cipher-alg=cast5-128,cipher-mode=ctr,ivgen-alg=plain",
}
# The reference measures its own speed for seconds at each creation: it makes these, the others are ours, and it fills them.
MADE_BY_REFERENCE = {"default", "aes128", "serpentessiv"}
SHAPES = {
    "c512": "cluster_size=512", "c2m": "cluster_size=2M,extended_l2=on", "v2": "compat=0.10,cluster_size=4k",
    "subclusters": "extended_l2=on,refcount_bits=64", "meta": "preallocation=metadata",
}


def encrypt_options(words):
    return ",".join("encrypt." + word for word in words.split(","))


class Encrypted(Case):
    empty = {}  # (options, kind) -> an image that the reference made

    def setUp(self):
        super().setUp()
        require("qemu-img", "qemu-io")

    # -- the reference's tools

    @classmethod
    def shared(cls):
        if not hasattr(Encrypted, "folder"):
            Encrypted.folder = tempfile.mkdtemp(prefix="gantry-encrypted.")
            atexit.register(shutil.rmtree, Encrypted.folder, True)
        return Encrypted.folder

    def create(self, name, options="", kind="luks"):
        """An image made by the reference; made once and copied."""
        if (options, kind) not in self.empty:
            image = os.path.join(self.shared(), str(len(self.empty)))
            encrypt = f"encrypt.format={kind},encrypt.key-secret=s" + (",encrypt.iter-time=10" if kind == "luks" else "")
            self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "--object", SECRET,
                          "-o", encrypt + (f",{options}" if options else ""), image, SIZE)
            self.empty[options, kind] = image
        return shutil.copyfile(self.empty[options, kind], self.path(name))

    def ours(self, name, options="", secret=SECRET, backing=None):
        """An image made by our own tool (by the reference where another daemon is tested), encrypted with LUKS."""
        if not IS_GANTRY and secret == SECRET and not backing:
            return self.create(name, options)
        words = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10" + (f",{options}" if options else "")
        command = [gantry_test.GANTRY, "image", "create"] if IS_GANTRY else ["qemu-img", "create", "-q"]
        self.run_tool(*command, "-f", "qcow2", "--object", secret, *(["-u", "-F", "qcow2", "-b", backing] if backing else []),
                      "-o", words, self.path(name), SIZE)
        return self.path(name)

    @staticmethod
    def opts(path, kind="luks", **more):
        words = {"driver": "qcow2", "file.filename": path, **({"encrypt.format": kind, "encrypt.key-secret": "s"} if kind else {}), **more}
        return ",".join(f"{key}={value}" for key, value in words.items())

    def io(self, path, *commands, kind="luks", secret=SECRET, check=True, **more):
        words = [word for command in commands for word in ("-c", command)]
        return self.run_tool("qemu-io", "--object", secret, "--image-opts", *words, self.opts(path, kind, **more), check=check)

    def fill(self, path, seed=1, **more):
        rng = random.Random(seed)
        commands = ["write -z 1M 64k"]
        for _ in range(12):
            at, length = rng.randrange(SIZE - 200 * KIB), rng.randrange(1, 200 * KIB)
            commands.append(f"write -P {rng.randrange(1, 255)} {at} {length}")
        self.io(path, *commands, "write -z 2M 100k", **more)
        return path

    def expected(self, path, kind="luks", **more):
        target = path + ".raw"
        self.run_tool("qemu-img", "convert", "--object", SECRET, "--image-opts", "-O", "raw", self.opts(path, kind, **more), target)
        return target

    # -- the daemon

    @staticmethod
    def node(name, path, kind="luks", secret="s", read_only=True, **more):
        encrypt = {"format": kind, "key-secret": secret}
        return {"driver": "qcow2", "node-name": name, "read-only": read_only, "encrypt": encrypt,
                "file": {"driver": "file", "filename": path}, **more}

    def serve(self, nodes, *secrets):
        """A daemon that exports each node by its name; (daemon, socket)."""
        sock = self.path("nbd.sock")
        arguments = [word for secret in secrets or (SECRET,) for word in ("--object", secret)]
        arguments += ["--nbd-server", f"addr.type=unix,addr.path={sock}"]
        for node in nodes:
            name = node["node-name"]
            arguments += ["--blockdev", json.dumps(node)]
            arguments += ["--export", f"type=nbd,id=e-{name},node-name={name},name={name},writable={'off' if node['read-only'] else 'on'}"]
        return self.daemon(*arguments), sock

    def contents(self, sock, name):
        target = self.path(f"{name}.read")
        self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(sock, name), target)
        return target

    def assert_same(self, images):
        """`images`: node name -> (path, kind)."""
        _, sock = self.serve([self.node(name, path, kind) for name, (path, kind) in images.items()])
        for name, (path, kind) in images.items():
            with self.subTest(name):
                self.assertEqual(checksum(self.contents(sock, name)), checksum(self.expected(path, kind)))


class Reading(Encrypted):
    def test_ciphers(self):
        images = {}
        for name, options in LUKS.items():
            make = self.create if name in MADE_BY_REFERENCE else self.ours
            images[name] = (self.fill(make(f"{name}.q", encrypt_options(options))), "luks")
        self.assert_same(images)

    def test_shapes(self):
        images = {name: (self.fill(self.ours(f"{name}.q", options)), "luks") for name, options in SHAPES.items()}
        # That the reference makes one of them shows where it puts the payload of a data file.
        images["data"] = (self.fill(self.create("data.q", f"data_file={self.path('data.raw')}")), "luks")
        self.assert_same(images)

    def test_legacy(self):
        images = {}
        for name, options in {"aes": "", "aes512": "cluster_size=512", "aesv2": "compat=0.10"}.items():
            images[name] = (self.fill(self.create(f"{name}.q", options, kind="aes"), kind="aes"), "aes")
        self.assert_same(images)

    def test_chain_of_two_passphrases(self):
        base = self.fill(self.ours("base.q"))
        other = "secret,id=o,data=another one"
        top = self.ours("top.q", secret="secret,id=s,data=another one", backing=base)
        alone = {"driver": "qcow2", "backing": None, "encrypt": {"format": "luks", "key-secret": "s"}, "file": {"driver": "file", "filename": top}}
        self.run_tool("qemu-io", "--object", "secret,id=s,data=another one", "-c", "write -P 77 704k 320k", "json:" + json.dumps(alone))
        node = self.node("n", top, secret="o", backing=self.node("b", base))
        _, sock = self.serve([node], SECRET, other)
        read = self.contents(sock, "n")
        with open(self.expected(base), "rb") as file:
            model = bytearray(file.read())
        model[704 * KIB : 1024 * KIB] = bytes([77]) * (320 * KIB)
        with open(read, "rb") as file:
            self.assertEqual(file.read(), bytes(model))

    def test_facts(self):
        image = self.create("i.q", encrypt_options(LUKS["aes128"]))
        legacy = self.create("l.q", kind="aes")
        daemon, _ = self.serve([self.node("n", image), self.node("l", legacy, "aes")])
        nodes = {n["node-name"]: n for n in daemon.qmp.cmd("query-named-block-nodes")}
        for name, path, kind in (("n", image, "luks"), ("l", legacy, "aes")):
            info = json.loads(self.run_tool("qemu-img", "info", "--output=json", path).stdout)
            self.assertTrue(nodes[name]["encrypted"])
            self.assertTrue(nodes[name]["image"]["encrypted"])
            self.assertEqual(nodes[name]["image"]["format-specific"]["data"]["encrypt"], info["format-specific"]["data"]["encrypt"], kind)


class Writing(Encrypted):
    def setUp(self):
        super().setUp()
        probe = self.create("probe.q", kind="aes")
        daemon = self.daemon("--object", SECRET)
        try:
            daemon.qmp.cmd("blockdev-add", self.node("p", probe, "aes", read_only=False))
        except gantry_test.QmpError as error:
            if "not in this build" in error.desc:
                missing("this build does not write qcow2 images", installable=False)
            raise
        daemon.stop()

    def write_and_compare(self, images, rounds=60):
        """Random requests through the daemon against a plain file; then the reference reads the image."""
        nbd = gantry_test.libnbd()
        daemon, sock = self.serve([self.node(name, path, kind, read_only=False) for name, (path, kind) in images.items()])
        models = {}
        for name, (path, kind) in images.items():
            rng = random.Random(name)
            model = bytearray(SIZE)
            client = nbd.NBD()
            client.set_strict_mode(client.get_strict_mode() & ~nbd.STRICT_ALIGN)  # parts of sectors, too
            client.connect_uri(self.uri(sock, name))
            for _ in range(rounds):
                at = rng.randrange(SIZE)
                length = min(SIZE - at, rng.choice([1, 511, 512, 4096, 70000, 300000]))
                if rng.random() < 0.2:
                    client.zero(length, at, nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.5 else 0)
                    model[at : at + length] = bytes(length)
                else:
                    data = rng.randbytes(length)
                    client.pwrite(data, at)
                    model[at : at + length] = data
                at = rng.randrange(SIZE)
                length = min(SIZE - at, rng.randrange(1, 200000))
                self.assertEqual(bytes(client.pread(length, at)), bytes(model[at : at + length]), name)
            client.flush()
            client.shutdown()
            models[name] = model
        daemon.stop()
        for name, (path, kind) in images.items():
            with self.subTest(name):
                with open(self.path("model.raw"), "wb") as file:
                    file.write(models[name])
                self.run_tool("qemu-img", "check", "-q", "--object", SECRET, "--image-opts", self.opts(path, kind))
                self.assertEqual(checksum(self.expected(path, kind)), checksum(self.path("model.raw")))
                # Nothing of what was written is in the file in the clear.
                at = next(i for i in range(0, SIZE, 4096) if any(models[name][i : i + 64]))
                with open(path, "rb") as file:
                    self.assertEqual(file.read().find(bytes(models[name][at : at + 64])), -1)

    def test_ciphers(self):
        names = LUKS if IS_GANTRY else ("default", "cast5")
        images = {n: (self.ours(f"{n}.q", encrypt_options(LUKS[n])), "luks") for n in names}
        self.write_and_compare({**images, "legacy": (self.create("legacy.q", kind="aes"), "aes")})

    def test_shapes(self):
        self.write_and_compare({n: (self.ours(f"{n}.q", SHAPES[n]), "luks") for n in SHAPES if n != "meta"}, 40)  # what lies under metadata alone is noise


class Creating(Encrypted):
    def setUp(self):
        super().setUp()
        self.running = self.daemon("--object", SECRET)
        self.qmp = self.running.qmp

    def job(self, path, encrypt, **options):
        """blockdev-create of an image over the file `path`; "" or the job's error."""
        with open(path, "wb"):
            pass
        self.qmp.cmd("blockdev-add", {"driver": "file", "node-name": "f", "filename": path})
        try:
            self.qmp.cmd("blockdev-create", {"job-id": "j", "options": {"driver": "qcow2", "file": "f", "size": SIZE // 512 * 512,
                                                                          "encrypt": encrypt, **options}})
            self.qmp.event("JOB_STATUS_CHANGE", id="j", status="concluded")
            error = self.qmp.cmd("query-jobs")[0].get("error", "")
            self.qmp.cmd("job-dismiss", id="j")
            return error
        finally:
            self.qmp.cmd("blockdev-del", node_name="f")

    def test_what_we_make_others_open(self):
        require_gantry("the reference measures its own speed for seconds")
        shapes = [{}, {"cluster-size": 512}, {"cluster-size": 2 << 20}, {"version": "v2"}, {"extended-l2": True},
                  {"preallocation": "metadata"}, {"preallocation": "full"}]
        for number, (name, words) in enumerate(LUKS.items()):
            options = shapes[number % len(shapes)]
            with self.subTest(name, options=options):
                path = self.path(f"{name}.q")
                encrypt = {"format": "luks", "key-secret": "s", "iter-time": 10, **dict(word.split("=") for word in words.split(","))}
                self.assertEqual(self.job(path, encrypt, **options), "")
                self.run_tool("qemu-img", "check", "-q", "--object", SECRET, "--image-opts", self.opts(path))
                done = self.io(path, "read -P 0 0 3M", "write -P 9 100k 300k", "read -P 9 100k 300k", "read -P 0 1M 1M")
                self.assertNotIn("verification failed", done.stdout)
                daemon_view = self.path("view.raw")
                self.qmp.cmd("blockdev-add", self.node("n", path))
                if number == 0:
                    self.sock = self.start_nbd(self.qmp)
                self.qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "name": "n"})
                self.run_tool("qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(self.sock, "n"), daemon_view)
                self.assertEqual(checksum(daemon_view), checksum(self.expected(path)))
                self.qmp.delete_export("e")
                self.qmp.cmd("blockdev-del", node_name="n")

    def test_refusals(self):
        path = self.path("i.q")
        rows = [
            ({"format": "luks"}, "Parameter 'encrypt.key-secret' is required for cipher"),
            ({"format": "luks", "key-secret": "none"}, "No secret with id 'none'"),
            ({"format": "luks", "key-secret": "s", "cipher-alg": "cast5-128"}, "Unsupported cipher mode xts"),
            ({"format": "luks", "key-secret": "s", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"}, "No AES cipher with key size 20 available"),
        ]
        for encrypt, text in rows:
            with self.subTest(text):
                error = self.job(path, encrypt)
                self.assertTrue(error.startswith(text), error)
        if IS_GANTRY:
            self.assertIn("not secure", self.job(path, {"format": "qcow", "key-secret": "s"}))

    def test_tool(self):
        require_gantry("our own tool")
        path = self.path("i.q")
        self.run_tool(gantry_test.GANTRY, "image", "create", "-f", "qcow2", "--object", SECRET,
                      "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", path, "4M")
        self.io(path, "write -P 5 0 1M", "read -P 5 0 1M")
        self.run_tool("qemu-img", "check", "-q", "--object", SECRET, "--image-opts", self.opts(path))
        # What only looks at metadata needs no passphrase.
        ours = json.loads(self.run_tool(gantry_test.GANTRY, "image", "info", "--json", path).stdout)
        theirs = json.loads(self.run_tool("qemu-img", "info", "--output=json", path).stdout)
        self.assertEqual(ours["format-specific"]["data"]["encrypt"], theirs["format-specific"]["data"]["encrypt"])
        self.assertIn("encrypted: true", self.run_tool(gantry_test.GANTRY, "image", "info", path).stdout)
        self.run_tool(gantry_test.GANTRY, "image", "check", path)
        self.run_tool(gantry_test.GANTRY, "image", "map", path)
        # Key slots by the tool; the reference opens with what was put in and not with what was taken out.
        amend = [gantry_test.GANTRY, "image", "amend", "--object", SECRET, "--object", "secret,id=n,data=a new one", "--image-opts", "-o"]
        opts = self.opts(path) + ",file.driver=file"
        self.run_tool(*amend, "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10", opts)
        self.io(path, "read -P 5 0 1M", secret="secret,id=s,data=a new one")
        self.run_tool(*amend, "encrypt.state=inactive,encrypt.old-secret=s", opts)
        self.io(path, "read -P 5 0 1M", secret="secret,id=s,data=a new one")
        self.assertIn("Invalid password, cannot unlock any keyslot", self.io(path, "read 0 512", check=False).stderr)
        done = self.run_tool(*amend, "encrypt.state=inactive,encrypt.old-secret=n",
                             opts.replace("key-secret=s", "key-secret=n"), check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("All the active keyslots match the (old) password", done.stderr)


class Refusals(Encrypted):
    def test_texts(self):
        luks, legacy = self.create("luks.q"), self.create("legacy.q", kind="aes")
        plain = self.path("plain.q")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", plain, SIZE)
        daemon = self.daemon("--object", SECRET, "--object", "secret,id=w,data=wrong-passphrase", "--object", "iothread,id=t",
                             "--object", "secret,id=b,format=base64,data=//79")
        without = {key: value for key, value in self.node("n", luks).items() if key != "encrypt"}
        rows = [
            (without, "Parameter 'encrypt.key-secret' is required for cipher"),
            ({**without, "encrypt": {"format": "luks"}}, "Parameter 'encrypt.key-secret' is required for cipher"),
            ({**without, "encrypt": {"key-secret": "s"}}, "Parameter 'encrypt.format' is missing"),
            (self.node("n", luks, "qcow"), "Parameter 'format' does not accept value 'qcow'"),
            (self.node("n", luks, secret="none"), "No secret with id 'none'"),
            (self.node("n", luks, secret="t"), "Object with id 't' is not a secret"),
            (self.node("n", luks, secret="b"), "Data from secret b is not valid UTF-8"),
            (self.node("n", luks, secret="w"), "Invalid password, cannot unlock any keyslot"),
            (self.node("n", luks, "aes"), "Header reported 'luks' encryption format but options specify 'aes'"),
            (self.node("n", legacy, "luks"), "Header reported 'aes' encryption format but options specify 'luks'"),
            (self.node("n", plain), "No encryption in image header, but options specified format 'luks'"),
        ]
        for node, text in rows:
            with self.subTest(text):
                kind, desc = daemon.qmp.error("blockdev-add", node)
                self.assertEqual(kind, "GenericError")
                self.assertTrue(desc.startswith(text), desc)
        self.assertEqual(daemon.qmp.cmd("query-named-block-nodes"), [])
        daemon.qmp.cmd("blockdev-add", self.node("n", luks))
        self.assertNotIn(PASSPHRASE, daemon.stderr())
        self.assertNotIn("wrong-passphrase", daemon.stderr())

    def test_a_wrong_passphrase_on_the_command_line(self):
        luks = self.create("luks.q")
        done = self.run_daemon("--object", "secret,id=s,data=not-this-one", "--blockdev", json.dumps(self.node("n", luks)))
        self.assertEqual(done.returncode, 1)
        self.assertIn("Invalid password, cannot unlock any keyslot", done.stderr)

    def test_damaged_headers(self):
        luks = self.create("luks.q")
        with open(luks, "rb") as file:
            good = file.read()
        area = int.from_bytes(good[good.index(b"\x05\x37\xbe\x77") + 8 :][:8], "big")
        rows = [
            ("magic", 0, b"X", "Volume is not in LUKS format"), ("version", 6, b"\0\2", "LUKS version 2 is not supported"),
            ("cipher", 8, b"a" * 32, "LUKS header cipher name is not NUL terminated"),
            ("mode", 40, b"gcm-plain64\0", "Cipher mode 'gcm' not supported"),
            ("vector", 40, b"xts-random\0", "IV generator 'random' not supported"),
            ("hash", 72, b"foo\0", "Hash algorithm 'foo' not supported"),
            ("payload", 104, bytes(4), "LUKS payload is overlapping with the header"),
            ("state", 208, bytes(4), "Keyslot 0 state (active/disable) is corrupted"),
            ("iterations", 212, bytes(4), "Keyslot 0 iteration count is zero"),
            ("material", 248, bytes(4), "Keyslot 0 is overlapping with the LUKS header"),
            ("stripes", 252, b"\x7f" * 4, "Keyslot 0 is corrupted (stripes 2139062143 != 4000)"),
            ("overlap", 256 + 40, b"\0\0\0\x09", "Keyslots 0 and 1 are overlapping in the header"),
            ("digest", 112, b"abc", "Invalid password, cannot unlock any keyslot"),
            ("no slot", 208, b"\0\0\xde\xad", "Invalid password, cannot unlock any keyslot"),
        ]
        if IS_GANTRY:
            rows.append(("endless", 212, b"\xff" * 4, "Keyslot 0 asks for 4294967295 iterations of key derivation"))
        daemon = self.daemon("--object", SECRET)
        for name, at, data, text in rows:
            with self.subTest(name):
                with open(self.path("bad.q"), "wb") as file:
                    file.write(good[: area + at] + data + good[area + at + len(data) :])
                _, desc = daemon.qmp.error("blockdev-add", self.node("n", self.path("bad.q")))
                self.assertTrue(desc.startswith(text), desc)


class Secrets(Encrypted):
    def test_kinds(self):
        image = self.create("i.q")
        with open(self.path("pw"), "w") as file:
            file.write(PASSPHRASE)
        encoded = base64.b64encode(PASSPHRASE.encode()).decode()
        daemon = self.daemon()
        kinds = [{"data": PASSPHRASE}, {"file": self.path("pw")}, {"data": encoded, "format": "base64"}]
        for number, kind in enumerate(kinds):
            daemon.qmp.cmd("object-add", {"qom-type": "secret", "id": "s", **kind})
            daemon.qmp.cmd("blockdev-add", self.node("n", image))
            daemon.qmp.cmd("object-del", id="s")  # used: it may go
            if number == 0:
                self.assertEqual(daemon.qmp.error("object-del", id="s"), ("GenericError", "object 's' not found"))
            daemon.qmp.cmd("blockdev-del", node_name="n")

    def test_wrapped(self):
        require("openssl")
        key, vector = bytes(range(32)), bytes([9] * 16)
        wrapped = self.path("wrapped")
        with open(self.path("plain"), "w") as file:
            file.write(PASSPHRASE)
        self.run_tool("openssl", "enc", "-aes-256-cbc", "-K", key.hex(), "-iv", vector.hex(), "-base64", "-in", self.path("plain"), "-out", wrapped)
        image = self.create("i.q")
        daemon = self.daemon("--object", f"secret,id=master,format=base64,data={base64.b64encode(key).decode()}",
                             "--object", f"secret,id=s,format=base64,file={wrapped},keyid=master,iv={base64.b64encode(vector).decode()}")
        daemon.qmp.cmd("blockdev-add", self.node("n", image))

    def test_keyring(self):
        libc = ctypes.CDLL(None, use_errno=True)
        add_key, session_keyring = 248, -3  # of x86-64
        if os.uname().machine != "x86_64":
            missing("the numbers of system calls are those of x86-64", installable=False)
        # The session's keyring: the daemon, our child, can read it.
        serial = libc.syscall(add_key, b"user", b"gantry-test", PASSPHRASE.encode(), len(PASSPHRASE), session_keyring)
        if serial < 0:
            missing(f"no kernel keyring here: {os.strerror(ctypes.get_errno())}", installable=False)
        image = self.create("i.q")
        daemon = self.daemon("--object", f"secret_keyring,id=s,serial={serial}")
        daemon.qmp.cmd("blockdev-add", self.node("n", image))
        _, desc = daemon.qmp.error("object-add", {"qom-type": "secret_keyring", "id": "z", "serial": 0})
        self.assertEqual(desc, "'serial' should not be equal to 0")

    def test_refusals(self):
        daemon = self.daemon("--object", "secret,id=short,data=x")
        gone = self.path("gone")
        rows = [
            ({}, "Either 'file' or 'data' must be provided"),
            ({"data": "x", "file": "y"}, "'file' and 'data' are mutually exclusive"),
            ({"file": gone}, f"Unable to read {gone}: Failed to open file"),
            ({"data": "YW#j", "format": "base64"}, "Base64 data contains invalid characters"),
            ({"data": "x", "format": "hex"}, "Parameter 'format' does not accept value 'hex'"),
            ({"data": "x", "keyid": "none", "iv": "AAAAAAAAAAAAAAAAAAAAAA=="}, "No secret with id 'none'"),
            ({"data": "x", "keyid": "short", "iv": "AAAAAAAAAAAAAAAAAAAAAA=="}, "Key should be 32 bytes in length"),
        ]
        for options, text in rows:
            with self.subTest(text):
                _, desc = daemon.qmp.error("object-add", {"qom-type": "secret", "id": "s", **options})
                self.assertTrue(desc.startswith(text), desc)
        _, desc = daemon.qmp.error("object-add", {"qom-type": "secret", "id": "short", "data": "y"})
        self.assertEqual(desc, "attempt to add duplicate property 'short' to object (type 'container')")
        _, desc = daemon.qmp.error("object-add", {"qom-type": "iothread", "id": "short"})
        self.assertEqual(desc, "attempt to add duplicate property 'short' to object (type 'container')")

    def test_credentials(self):
        require_gantry("others do not know the service manager's credentials")
        image = self.create("i.q")
        with open(self.path("disk-passphrase"), "w") as file:
            file.write(PASSPHRASE)
        daemon = self.daemon("--object", "secret,id=s,file=credential:disk-passphrase", environment={"CREDENTIALS_DIRECTORY": self.dir})
        daemon.qmp.cmd("blockdev-add", self.node("n", image))


if __name__ == "__main__":
    gantry_test.main()
