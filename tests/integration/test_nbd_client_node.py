#!/usr/bin/python3
"""The block driver nbd against the servers there are: qemu-nbd, nbdkit, nbd-server, qemu-storage-daemon, gantryd.

Every client here is a gantryd whose node `n` is an export of another server, and which exports that node again: what libnbd and
nbdcopy read and write goes through our server, our node and the other server.
"""

import json
import os
import pathlib
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as raw
import pki
from gantry_test import GANTRY, MIB, Daemon, free_port, libnbd, missing, require, text_block, wait_for
from nbd_node_case import NodeCase

SIZE = 6 * MIB
PSK_KEY = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"


class Servers(NodeCase):
    """A model test of random operations against every server."""

    def check(self, server, size=SIZE, unit=1, image=None, seed=1, **options):
        self.client(server, **options)
        h = self.connect()
        self.assertEqual(h.get_size(), size)
        model = self.model(h, size, seed, unit=unit)
        h.shutdown()
        self.node_daemon.stop()
        if image:
            with open(image, "rb") as file:
                self.assertEqual(file.read()[:size], model)

    def image(self, size=SIZE):
        return self.raw_image("disk.raw", size, text_block)

    def test_nbdkit_file(self):
        image = self.image()
        self.check(self.nbdkit("file", image), image=image)

    def test_nbdkit_without_structured_replies(self):
        image = self.image()
        self.check(self.nbdkit("--no-sr", "file", image), image=image)

    def test_nbdkit_without_fixed_newstyle(self):
        """Neither options nor flags: EXPORT_NAME, and the 124 zeroes."""
        image = self.image()
        self.check(self.nbdkit("--mask-handshake=0", "file", image), image=image)

    def test_nbdkit_with_few_abilities(self):
        self.check(self.nbdkit("--filter=noextents", "--filter=nozero", "--filter=fua", "memory", str(SIZE)))

    def test_nbdkit_sparse_memory_with_an_odd_size(self):
        self.check(self.nbdkit("memory", str(SIZE + 123)), size=SIZE + 123)

    def test_nbdkit_with_block_sizes(self):
        """The node keeps to them; its clients need not."""
        image = self.image()
        server = self.nbdkit("--filter=blocksize-policy", "file", image, "blocksize-minimum=4096", "blocksize-preferred=4096",
                             "blocksize-maximum=65536", "blocksize-error-policy=error")
        self.check(server, image=image)

    def test_qemu_nbd(self):
        image = self.image()
        self.check(self.qemu_nbd(image, "-e", "8", "--discard=unmap"), image=image)

    def test_qemu_storage_daemon(self):
        require("qemu-storage-daemon")
        image, path = self.image(), self.path("qsd.sock")
        process = self.process("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={image},discard=unmap",
                               "--nbd-server", f"addr.type=unix,addr.path={path}", "--export",
                               "type=nbd,id=e,node-name=d,name=disk,writable=on", socket_path=path)
        process.socket = path
        self.check(process, image=image, export="disk")

    def test_nbd_server(self):
        require("nbd-server")
        image, path = self.image(), self.path("ns.sock")
        config = self.path("config")
        with open(config, "w") as file:
            file.write(f"[generic]\n    unixsock = {path}\n    port = {free_port()}\n    listenaddr = 127.0.0.1\n"
                       f"[disk]\n    exportname = {image}\n    flush = true\n    fua = true\n    trim = true\n")
        self.run_tool("nbd-server", "-C", config, "-p", self.path("pid"))  # goes into the background
        pid = int(wait_for(lambda: os.path.exists(self.path("pid")) and open(self.path("pid")).read().strip(), "nbd-server"))
        self.addCleanup(os.kill, pid, signal.SIGTERM)
        self.check(self.unix(path), image=image, export="disk", open_timeout=10)

    def test_gantryd(self):
        image = self.image()
        self.check(self.gantry_server(image), image=image, export="disk")

    def test_gantryd_over_four_connections(self):
        image = self.image()
        self.check(self.gantry_server(image), image=image, export="disk", multi_conn=4)

    def test_tcp(self):
        require("nbdkit")
        port, image = free_port(), self.image()
        self.process("nbdkit", "-f", "-i", "127.0.0.1", "-p", port, "file", image, port=port)
        self.check({"type": "inet", "host": "127.0.0.1", "port": str(port)}, image=image)

    def test_vsock(self):
        """A machine talks to itself through CID 1, where the kernel has the loopback transport."""
        if not hasattr(socket, "AF_VSOCK"):
            missing("no vsock in this Python", installable=False)
        try:
            probe = socket.socket(socket.AF_VSOCK)
            probe.bind((1, 0xffffffff))
            probe.close()
        except OSError as error:
            missing(f"no vsock loopback here: {error}", installable=False)
        require("nbdkit")
        port, image = free_port(), self.image()
        process = subprocess.Popen(["nbdkit", "-f", "--vsock", "-p", str(port), "file", image])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.check({"type": "vsock", "cid": "1", "port": str(port)}, image=image, open_timeout=10)


class Behaviour(NodeCase):
    def test_qcow2_over_nbd(self):
        require("qemu-img")
        image = self.path("disk.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
        # The image grows: its container has room.
        os.truncate(image, 80 * MIB)
        server = self.gantry_server(image)
        daemon = self.daemon(
            "--blockdev", json.dumps({"driver": "qcow2", "node-name": "n", "file": {
                "driver": "nbd", "export": "disk", "server": self.unix(server.socket)}}),
            "--nbd-server", f"addr.type=unix,addr.path={self.path('out.sock')}",
            "--export", "type=nbd,id=out,node-name=n,name=out,writable=on")
        self.out = self.path("out.sock")
        h = self.connect()
        model = self.model(h, 8 * MIB, 3)
        h.shutdown()
        daemon.stop()
        server.stop()
        self.run_tool("qemu-img", "check", "-f", "qcow2", image)
        self.run_tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, self.path("plain.raw"))
        with open(self.path("plain.raw"), "rb") as file:
            self.assertEqual(file.read(8 * MIB), model)

    def test_raw_window_over_nbd(self):
        image = self.raw_image("disk.raw", SIZE, text_block)
        server = self.nbdkit("file", image)
        self.empty_client()
        self.q.cmd("blockdev-add", {"driver": "raw", "node-name": "w", "offset": MIB, "size": MIB,
                                    "file": self.add(server) | {"node-name": "inner"}})
        self.out = self.start_nbd(self.q, "out.sock")
        self.q.cmd("block-export-add", type="nbd", id="out", node_name="w", name="out")
        h = self.connect()
        with open(image, "rb") as file:
            file.seek(MIB)
            self.assertEqual(h.pread(MIB, 0), file.read(MIB))

    def test_maps_are_those_of_the_server(self):
        require("nbdinfo")
        image = self.raw_image("disk.raw", SIZE, text_block)
        server = self.gantry_server(image)
        self.client(server, export="disk")
        direct = self.run_tool("nbdinfo", "--map", "--json", self.uri(server.socket, "disk")).stdout
        self.assertEqual(self.run_tool("nbdinfo", "--map", "--json", self.uri(self.out, "out")).stdout, direct)

    def test_copies_in_both_directions(self):
        require("nbdcopy")
        image = self.raw_image("disk.raw", 32 * MIB, text_block)
        server = self.nbdkit("file", image)
        self.client(server)
        self.run_tool("nbdcopy", self.uri(self.out, "out"), self.path("copy.raw"))
        self.assertEqual(gantry_test.checksum(self.path("copy.raw")), gantry_test.checksum(image))
        with open(self.path("new.raw"), "wb") as file:
            file.write(random.Random(9).randbytes(32 * MIB))
        self.run_tool("nbdcopy", "--flush", self.path("new.raw"), self.uri(self.out, "out"))
        self.assertEqual(gantry_test.checksum(self.path("new.raw")), gantry_test.checksum(image))

    def test_errors_of_the_server_reach_the_client(self):
        nbd = libnbd()
        server = self.nbdkit("--filter=error", "memory", str(SIZE), "error-pread-rate=100%", "error-pread=EIO",
                             "error-pwrite-rate=100%", "error-pwrite=ENOSPC")
        self.client(server)
        h = self.connect()
        for wanted, request in (("EIO", lambda: h.pread(512, 0)), ("ENOSPC", lambda: h.pwrite(bytes(512), 0))):
            with self.assertRaises(nbd.Error) as caught:
                request()
            self.assertEqual(caught.exception.errno, wanted)
        h.flush()

    def test_requests_are_under_way_together(self):
        nbd = libnbd()
        server = self.nbdkit("--filter=delay", "memory", str(SIZE), "rdelay=500ms")
        self.client(server)
        h = self.connect()
        begin = time.monotonic()
        buffers = [nbd.Buffer(4096) for _ in range(16)]
        cookies = [h.aio_pread(buffer, i * 4096) for i, buffer in enumerate(buffers)]
        done = set()
        while len(done) < len(cookies):
            h.poll(-1)
            done |= {cookie for cookie in cookies if cookie not in done and h.aio_command_completed(cookie)}
        self.assertLess(time.monotonic() - begin, 4)  # one by one: 8 s

    def test_several_connections_are_made_when_the_server_allows_them(self):
        image = self.raw_image("disk.raw", SIZE, text_block)
        server = self.gantry_server(image)

        def clients():
            return [client for one in server.qmp.cmd("query-nbd-servers") for client in one["clients"]]
        self.empty_client()
        for asked, wanted in ((3, 3), (0, 1), (1, 1), (16, 16)):
            self.q.cmd("blockdev-add", self.add(server, export="disk", multi_conn=asked))
            wait_for(lambda: len(clients()) >= wanted, f"{wanted} connections")
            self.assertEqual(len(clients()), wanted)
            self.q.cmd("blockdev-del", node_name="n")
            wait_for(lambda: not clients(), "the clients to leave")
        single = self.nbdkit("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable")
        self.q.cmd("blockdev-add", self.add(single, multi_conn=8))

    def test_refusals_have_their_sentence(self):
        image = self.raw_image("disk.raw", SIZE)
        server = self.gantry_server(image)
        self.empty_client()
        self.assertIn("Requested export not available; the server has no export 'nope'",
                      self.q.error("blockdev-add", self.add(server, export="nope"))[1])
        none = self.path("none.sock")
        self.assertEqual(self.q.error("blockdev-add", self.add(self.unix(none)))[1],
                         f"Failed to connect to '{none}': No such file or directory")
        port = free_port()
        self.assertEqual(self.q.error("blockdev-add", self.add({"type": "inet", "host": "127.0.0.1", "port": str(port)}))[1],
                         f"Failed to connect to '127.0.0.1:{port}': Connection refused")
        self.assertIn("requested x-dirty-bitmap qemu:dirty-bitmap:x not found",
                      self.q.error("blockdev-add", self.add(server, export="disk", x_dirty_bitmap="qemu:dirty-bitmap:x"))[1])
        self.assertIn("No TLS credentials with id 'x'",
                      self.q.error("blockdev-add", self.add(server, export="disk", tls_creds="x"))[1])
        read_only = self.nbdkit("-r", "file", image)
        self.assertIn("is read-only; open the node with read-only=on", self.q.error("blockdev-add", self.add(read_only))[1])
        self.q.cmd("blockdev-add", self.add(read_only) | {"auto-read-only": True})
        self.assertTrue([n["ro"] for n in self.q.cmd("query-named-block-nodes") if n["node-name"] == "n"][0])
        self.q.cmd("blockdev-del", node_name="n")
        old = self.nbdkit("-o", "file", image, name="old.sock")
        self.assertIn("the server speaks the oldstyle protocol", self.q.error("blockdev-add", self.add(old))[1])

    def test_uris_name_exports(self):
        image = self.raw_image("disk.raw", SIZE, text_block)
        server = self.gantry_server(image)
        self.empty_client()
        self.q.cmd("blockdev-add", self.add(server, export="disk"))
        (node,) = [n for n in self.q.cmd("query-named-block-nodes") if n["node-name"] == "n"]
        self.assertEqual(node["file"], f"nbd+unix:///disk?socket={server.socket}")
        # The tool for images takes them.
        about = json.loads(self.run_tool(GANTRY, "image", "info", "--json", node["file"]).stdout)
        self.assertEqual((about["format"], about["virtual-size"]), ("raw", SIZE))
        wrong = self.run_tool(GANTRY, "image", "info", "gopher://x/y", check=False)
        self.assertIn("Unknown protocol 'gopher'", wrong.stderr)
        # A backing file of that name, as the reference writes it.
        require("qemu-img")
        overlay = self.path("top.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", node["file"], "-F", "raw", overlay)
        self.q.cmd("blockdev-add", {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": overlay}})
        self.out = self.start_nbd(self.q, "out.sock")
        self.q.cmd("block-export-add", type="nbd", id="out", node_name="top", name="out")
        with open(image, "rb") as file:
            self.assertEqual(self.connect().pread(MIB, 0), file.read(MIB))

    def test_a_dirty_bitmap_shows_as_holes(self):
        image = self.raw_image("disk.raw", SIZE)
        server = self.gantry_server(image)
        q = server.qmp
        q.delete_export("e")
        q.cmd("block-dirty-bitmap-add", node="disk", name="b")
        q.cmd("block-export-add", type="nbd", id="w", node_name="disk", name="w", writable=True)
        h = libnbd().NBD()
        h.connect_uri(self.uri(server.socket, "w"))
        h.pwrite(b"x" * 65536, MIB)
        h.shutdown()
        q.delete_export("w")
        q.cmd("block-dirty-bitmap-disable", node="disk", name="b")
        q.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "bitmaps": ["b"],
                                   "allocation-depth": True})
        self.client(server, export="disk", writable=False, auto_read_only=True, x_dirty_bitmap="qemu:dirty-bitmap:b")
        entries = []
        self.connect().block_status(SIZE, 0, lambda _, at, found, error: entries.extend(found) or 0)
        # A dirty range is "no data": 1, HOLE.
        self.assertEqual(entries[:6], [MIB, 0, 65536, 1, SIZE - MIB - 65536, 0])

    def test_a_descriptor_is_a_server(self):
        image = self.raw_image("disk.raw", SIZE, text_block)
        server = self.gantry_server(image)
        inherited = socket.socket(socket.AF_UNIX)
        inherited.connect(server.socket)
        number = inherited.fileno()
        daemon = self.daemon(pass_fds=(number,))
        inherited.close()
        self.q = daemon.qmp
        self.q.cmd("blockdev-add", self.add({"type": "fd", "str": str(number)}, export="disk"))
        self.assertIn("File descriptor named 'x'", self.q.error("blockdev-add",
                      self.add({"type": "fd", "str": "x"}) | {"node-name": "m"})[1])


class Tls(NodeCase):
    @classmethod
    def setUpClass(cls):
        cls.pki_dir = tempfile.TemporaryDirectory(prefix="gt-pki-", dir="/tmp")
        ca = cls.ca = pki.Authority(os.path.join(cls.pki_dir.name, "ca"))
        cls.server_pair = ca.issue("server", "server", "server", ["localhost", "127.0.0.1"])
        cls.client_pair = ca.issue("alice", "alice")

    @classmethod
    def tearDownClass(cls):
        cls.pki_dir.cleanup()

    def serve(self, objects, creds="tls"):
        image = self.raw_image("disk.raw", SIZE, text_block)
        directory = tempfile.mkdtemp(prefix="s-", dir=self.dir)
        path = os.path.join(directory, "nbd.sock")
        daemon = Daemon(directory, "--object", objects, "--blockdev", f"driver=file,node-name=disk,filename={image}",
                        "--nbd-server", f"addr.type=unix,addr.path={path},tls-creds={creds}",
                        "--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on")
        self.addCleanup(self._end, daemon)
        daemon.socket = path
        return daemon

    def x509(self):
        server = pki.install(self.path("server"), self.ca.cert, self.server_pair)
        client = pki.install(self.path("client"), self.ca.cert, None, self.client_pair)
        return (f"tls-creds-x509,id=tls,endpoint=server,dir={server}", f"tls-creds-x509,id=c,endpoint=client,dir={client}")

    def works(self, server, client_object, **options):
        self.client(server, "--object", client_object, export="disk", tls_creds="c", **options)
        h = self.connect()
        self.model(h, SIZE, 5, operations=60)
        h.shutdown()
        self.node_daemon.stop()

    def test_x509(self):
        server_object, client_object = self.x509()
        self.works(self.serve(server_object), client_object, tls_hostname="localhost", multi_conn=2)

    def test_psk(self):
        keys = self.path("keys")
        os.mkdir(keys)
        with open(os.path.join(keys, "keys.psk"), "w") as file:
            file.write(f"joe:{PSK_KEY}\n")
        server = self.serve(f"tls-creds-psk,id=tls,endpoint=server,dir={keys}")
        self.works(server, f"tls-creds-psk,id=c,endpoint=client,dir={keys},username=joe")

    def test_nbdkit_and_qemu_nbd(self):
        _, client_object = self.x509()
        image = self.raw_image("disk.raw", SIZE, text_block)
        server = self.nbdkit("--tls=require", f"--tls-certificates={self.path('server')}", "file", image)
        self.works(server, client_object, tls_hostname="localhost")
        other = self.qemu_nbd(image, "-x", "disk", "--object",
                              f"tls-creds-x509,id=t,endpoint=server,dir={self.path('server')}", "--tls-creds=t")
        self.works(other, client_object, tls_hostname="localhost")

    def test_what_is_not_secure_is_refused(self):
        """libnbd CVE-2019-14842 (downgrade), CVE-2024-7383 (a unix socket is no reason not to verify)."""
        server_object, client_object = self.x509()
        server = self.serve(server_object)
        plain = self.nbdkit("memory", "1M")
        self.empty_client("--object", client_object)

        def refused(address, **options):
            return self.q.error("blockdev-add", self.add(address, export="disk", **options))[1]
        self.assertIn("; give this node tls-creds", refused(server))
        self.assertIn("the server refuses STARTTLS", refused(plain, tls_creds="c", tls_hostname="localhost"))
        self.assertIn("No hostname for certificate validation", refused(server, tls_creds="c"))
        wrong = refused(server, tls_creds="c", tls_hostname="example.org")
        self.assertIn("example.org", wrong)
        self.assertIn("tls-hostname needs tls-creds", refused(server, tls_hostname="localhost"))

    def test_bytes_behind_starttls_are_not_believed(self):
        """nbdkit CVE-2021-3716, from the other side: a man in the middle answers options before TLS begins."""
        _, client_object = self.x509()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path("mitm.sock"))
        listener.listen(1)

        def attack():
            peer, _ = listener.accept()
            with peer:
                peer.sendall(struct.pack(">QQH", raw.NBDMAGIC, raw.IHAVEOPT, 3))
                peer.recv(4, socket.MSG_WAITALL)
                peer.recv(16, socket.MSG_WAITALL)
                ack = struct.pack(">QIII", raw.REPLY_MAGIC, raw.OPT_STARTTLS, raw.ACK, 0)
                injected = struct.pack(">QIII", raw.REPLY_MAGIC, raw.OPT_EXTENDED, raw.ACK, 0)
                peer.sendall(ack + injected)
                while peer.recv(4096):
                    pass
        thread = threading.Thread(target=attack)
        thread.start()
        self.empty_client("--object", client_object)
        error = self.q.error("blockdev-add", self.add(self.unix(self.path("mitm.sock")), tls_creds="c", tls_hostname="localhost"))
        self.assertIn("TLS", error[1])
        thread.join()
        listener.close()


if __name__ == "__main__":
    gantry_test.main()
