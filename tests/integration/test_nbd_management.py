#!/usr/bin/env python3
"""NBD servers under management: shapes of addresses, several servers, descriptors, what queries tell, good-byes."""
# One configuration: the control side runs on the main loop alone; what clients do with exports is tested elsewhere

import array
import json
import os
import pathlib
import re
import resource
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
from gantry_test import KIB, MIB, Case, free_port, missing, require, require_gantry, text_block, wait_for
from nbd_raw import Closed, Raw

SIZE = 2 * MIB


class Managed(Case):
    def start(self, *more, **options):
        self.image = self.raw_image("disk.raw", SIZE, text_block)
        self.server = self.daemon("--blockdev", f"driver=file,node-name=disk,filename={self.image}", *more, **options)
        self.qmp = self.server.qmp

    def export(self, id="e", **more):
        self.qmp.cmd("block-export-add", {"type": "nbd", "id": id, "node-name": "disk", **more})

    def connect(self, address):
        client = Raw(address)
        self.addCleanup(client.close)
        return client

    def entered(self, address, name="disk"):
        client = self.connect(address)
        client.enter(name)
        return client

    def check(self, address, name="disk"):
        with open(self.image, "rb") as file, Raw(address) as client:
            client.enter(name)
            assert client.read(0, 65536) == file.read(65536)

    def names(self, address):
        """What LIST shows."""
        with Raw(address) as client:
            client.greet()
            return [payload[4:].decode() for kind, payload in client.option(nbd.OPT_LIST) if kind == nbd.SERVER]

    def servers(self):
        return {server.get("id", ""): server for server in self.qmp.cmd("query-nbd-servers")}


class Addresses(Managed):
    def test_the_shapes_of_an_address(self):
        self.start()
        unix = self.path("n.sock")
        flat = {"type": "unix", "path": unix}
        shapes = [{"type": "unix", "data": {"path": unix}}]
        if gantry_test.IS_GANTRY:
            shapes += [flat, [flat], [{"type": "unix", "data": {"path": unix}}]]
        for shape in shapes:
            self.qmp.cmd("nbd-server-start", {"addr": shape})
            self.export()
            self.check(unix)
            self.qmp.cmd("nbd-server-stop")
            self.qmp.event("BLOCK_EXPORT_DELETED", id="e")
            self.assertFalse(os.path.exists(unix))

    def test_the_command_line(self):
        image = self.raw_image("disk.raw", SIZE, text_block)
        self.image = image
        unix, other, port = self.path("a.sock"), self.path("b.sock"), free_port()
        shapes = [f"addr.type=unix,addr.path={unix}", json.dumps({"addr": {"type": "unix", "path": unix}})]
        if gantry_test.IS_GANTRY:
            shapes += [f"addr.type=unix,addr.data.path={unix}",
                       f"addr.0.type=unix,addr.0.path={unix},addr.1.type=inet,addr.1.host=127.0.0.1,addr.1.port={port}"]
        for shape in shapes:
            more = []
            if gantry_test.IS_GANTRY:
                more = ["--nbd-server", f"id=second,addr.type=unix,addr.path={other}",
                        "--export", "type=nbd,id=s,node-name=disk,server=second,name=disk"]
            daemon = self.daemon("--blockdev", f"driver=file,node-name=disk,filename={image}", "--nbd-server", shape,
                                 "--export", "type=nbd,id=e,node-name=disk", *more)
            self.check(unix)
            if more:
                self.check(other)
            if "addr.1" in shape:
                self.check(("127.0.0.1", port))
            daemon.stop()

    def test_several_addresses_are_all_or_none(self):
        require_gantry("one address a server")
        self.start()
        port, unix = free_port(), self.path("n.sock")
        inet = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
        error = self.qmp.error("nbd-server-start", {"addr": [{"type": "unix", "path": unix}, {**inet, "host": "no.such.host.invalid"}]})
        self.assertIn("no.such.host.invalid", error[1])
        self.assertFalse(os.path.exists(unix))
        self.assertEqual(self.qmp.error("nbd-server-start", {"addr": []})[1], "Parameter 'addr' expects at least one address")
        self.assertEqual(self.servers(), {})
        self.qmp.cmd("nbd-server-start", {"addr": [{"type": "unix", "path": unix}, inet]})
        self.export()
        self.check(unix)
        self.check(("127.0.0.1", port))
        self.assertEqual(self.servers()[""]["addresses"], [f"nbd+unix:///?socket={unix}", f"nbd://127.0.0.1:{port}/"])
        self.qmp.cmd("nbd-server-stop")
        with self.assertRaises(ConnectionRefusedError):
            Raw(("127.0.0.1", port))

    def test_inet_options(self):
        self.start()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            inet = {"host": "127.0.0.1", "port": str(port), "to": min(port + 60, 65535), "ipv6": False}
            if gantry_test.IS_GANTRY:
                inet.update({"numeric": True, "keep-alive": True, "keep-alive-idle": 1000, "keep-alive-count": 3, "keep-alive-interval": 7})
            self.qmp.cmd("nbd-server-start", {"addr": {"type": "inet", "data": inet}})
        self.export()
        if not gantry_test.IS_GANTRY:
            return
        (address,) = self.servers()[""]["addresses"]
        port = int(re.fullmatch(r"nbd://127\.0\.0\.1:(\d+)/", address)[1])
        client = self.entered(("127.0.0.1", port))
        require("ss")
        self.assertRegex(self.timer_of(port, client), r"timer:\(keepalive,16min")
        self.qmp.cmd("nbd-server-stop")
        for bad in ({"host": "localhost", "numeric": True}, {"host": "127.0.0.1", "port": "http", "numeric": True},
                    {"ipv4": False, "ipv6": False}, {"host": "::1", "ipv6": False}):
            data = {"host": "127.0.0.1", "port": "0", **bad}
            self.qmp.error("nbd-server-start", {"addr": {"type": "inet", "data": data}})
        self.qmp.cmd("nbd-server-start", {"addr": {"type": "inet", "host": "::1", "port": str(port), "keep-alive": False}})
        self.export()
        self.assertNotIn("keepalive", self.timer_of(port, self.entered(("::1", port))))

    def timer_of(self, port, client):
        """What the kernel waits for on the server's end of a connection, once everything sent has arrived."""
        return self.timer(f"sport = :{port} and dport = :{client.socket.getsockname()[1]}")

    def timer(self, which):
        def shown():
            line = subprocess.run(["ss", "-Htno", which], capture_output=True, text=True).stdout
            return "timer:(on" not in line and line
        return wait_for(shown, "what was sent to be acknowledged")

    def test_options_of_an_address_that_is_connected_to(self):
        require_gantry("the reference does not know them yet")
        require("ss")
        self.start()
        port = free_port()
        self.qmp.cmd("nbd-server-start", {"addr": {"type": "inet", "host": "127.0.0.1", "port": str(port)}})
        self.export()
        server = {"type": "inet", "host": "127.0.0.1", "port": str(port), "numeric": True}
        add = {"driver": "nbd", "node-name": "far", "export": "disk", "read-only": True}
        for alive, shown in (({"keep-alive-idle": 2000}, "keepalive,33min"), ({"keep-alive": False}, None)):
            self.qmp.cmd("blockdev-add", {**add, "server": {**server, **alive}})
            line = self.timer(f"dport = :{port}")
            self.assertTrue(shown in line if shown else "keepalive" not in line, line)
            self.qmp.cmd("blockdev-del", {"node-name": "far"})
        for bad, text in (({**server, "host": "localhost"}, "address resolution failed"),
                          ({"type": "unix", "path": self.path("x"), "mode": "0600"}, "'mode' and 'group' are for listening")):
            self.assertIn(text, self.qmp.error("blockdev-add", {**add, "server": bad})[1])

    def test_abstract_names(self):
        self.start()
        name = f"gantry-{os.getpid()}"
        for tight in (True, False):
            self.qmp.cmd("nbd-server-start", {"addr": {"type": "unix", "data": {"path": name, "abstract": True, "tight": tight}}})
            self.export()
            address = b"\0" + name.encode() + (b"" if tight else b"\0" * (107 - len(name)))
            self.check(address)
            self.qmp.cmd("nbd-server-stop")
            self.qmp.event("BLOCK_EXPORT_DELETED", id="e")

    def test_mode_and_group_of_the_socket(self):
        require_gantry("gantryd's own")
        self.start()
        unix = self.path("n.sock")
        group = os.getgroups()[-1] if os.getuid() else 12345
        self.qmp.cmd("nbd-server-start", {"addr": {"type": "unix", "path": unix, "mode": "0640", "group": str(group)}})
        found = os.stat(unix)
        self.assertEqual((stat.S_IMODE(found.st_mode), found.st_gid), (0o640, group))
        self.qmp.cmd("nbd-server-stop")
        for bad, text in (({"mode": "rw"}, "mode 'rw' is not an octal number"), ({"mode": "7777"}, "mode '7777'"),
                          ({"mode": ""}, "mode ''"), ({"group": "no-such-group"}, "group 'no-such-group' is not known")):
            error = self.qmp.error("nbd-server-start", {"addr": {"type": "unix", "path": unix, **bad}})[1]
            self.assertTrue(error.startswith(text), error)
            self.assertFalse(os.path.exists(unix))

    def test_vsock(self):
        self.start()
        try:
            probe = socket.socket(socket.AF_VSOCK)
            probe.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
            probe.close()
        except OSError as error:
            missing(f"this kernel has no vsock sockets: {error}", installable=False)
        port = 10809 + os.getpid() % 10000
        self.qmp.cmd("nbd-server-start", {"addr": {"type": "vsock", "data": {"cid": "4294967295", "port": str(port)}}})
        self.export()
        if gantry_test.IS_GANTRY:
            self.assertEqual(self.servers()[""]["addresses"], [f"nbd+vsock://4294967295:{port}/"])
        client = socket.socket(socket.AF_VSOCK)
        self.addCleanup(client.close)
        try:
            client.connect((1, port))
        except OSError as error:
            missing(f"vsock has no loopback here: {error}", installable=False)
        self.assertEqual(client.recv(8, socket.MSG_WAITALL), b"NBDMAGIC")

    def test_bad_vsock_addresses(self):
        require_gantry("other words")
        self.start()
        for bad, text in (({"cid": "x", "port": "1"}, "vsock cid 'x' is not a number"), ({"cid": "-1", "port": "4294967296"}, "vsock port '4294967296'")):
            self.assertTrue(self.qmp.error("nbd-server-start", {"addr": {"type": "vsock", "data": bad}})[1].startswith(text))

    def test_an_inherited_descriptor_by_number(self):
        require_gantry("the reference takes numbers on the command line alone")
        with socket.socket(socket.AF_UNIX) as listener:
            path = self.path("inherited.sock")
            listener.bind(path)
            listener.listen()
            fd = listener.fileno()
            self.start("--nbd-server", f"addr.type=fd,addr.str={fd}", pass_fds=[fd])
        self.export()
        self.check(path)
        self.qmp.cmd("nbd-server-stop")
        self.assertTrue(os.path.exists(path))  # not ours
        self.assertTrue(self.qmp.error("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "99"}}})[1].startswith("File descriptor '99'"))


class Servers(Managed):
    def test_servers_by_name(self):
        require_gantry("gantryd's own")
        self.start()
        first, second = self.path("1.sock"), self.path("2.sock")
        self.qmp.cmd("nbd-server-start", {"addr": {"type": "unix", "path": first}})
        self.qmp.cmd("nbd-server-start", {"id": "b", "addr": {"type": "unix", "path": second}, "max-connections": 1})
        self.export("e1")
        self.export("e2", server="b")
        self.export("e3", server="b", name="only-there")
        self.assertEqual(self.names(first), ["disk"])
        self.assertEqual(self.names(second), ["disk", "only-there"])
        with Raw(second) as client:
            client.greet()
            self.assertFalse(client.go("disk", 3)[1] & nbd.T_MULTI_CONN)
        about = self.servers()
        self.assertEqual(list(about), ["", "b"])
        self.assertEqual((about["b"]["max-connections"], about["b"]["exports"]), (1, ["disk", "only-there"]))
        self.qmp.cmd("nbd-server-stop", {"id": "b"})
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e2")
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e3")
        self.assertFalse(os.path.exists(second))
        self.check(first)
        self.assertEqual([e["id"] for e in self.qmp.cmd("query-block-exports")], ["e1"])
        self.qmp.cmd("nbd-server-start", {"id": "b", "addr": {"type": "unix", "path": second}})
        self.export("e2", server="b")
        self.check(second)

    def test_texts(self):
        require_gantry("gantryd's own")
        self.start()
        unix = {"type": "unix", "path": self.path("n.sock")}
        self.assertEqual(self.qmp.error("nbd-server-stop")[1], "NBD server not running")
        self.assertTrue(self.qmp.error("nbd-server-stop", {"id": "b"})[1].startswith("NBD server not running: there is none with id 'b'"))
        self.assertTrue(self.qmp.error("nbd-server-start", {"id": "1b", "addr": unix})[1].startswith("Parameter 'id' expects an identifier"))
        self.qmp.cmd("nbd-server-start", {"id": "b", "addr": unix})
        self.assertEqual(self.qmp.error("nbd-server-start", {"id": "b", "addr": unix})[1], "NBD server already running: 'b'")
        add = {"type": "nbd", "id": "e", "node-name": "disk"}
        self.assertEqual(self.qmp.error("block-export-add", add)[1], "NBD server not running")
        self.assertTrue(self.qmp.error("block-export-add", {**add, "server": "c"})[1].startswith("NBD server not running: there is none with id 'c'"))
        self.export(server="b")
        self.assertEqual(self.qmp.error("block-export-add", {**add, "id": "f", "server": "b"})[1], "NBD server already has export named 'disk'")

    def test_quit_ends_them_all(self):
        require_gantry("gantryd's own")
        self.start()
        paths = [self.path(f"{i}.sock") for i in range(3)]
        for i, path in enumerate(paths):
            self.qmp.cmd("nbd-server-start", {**({"id": f"s{i}"} if i else {}), "addr": {"type": "unix", "path": path}})
            self.export(f"e{i}", **({"server": f"s{i}"} if i else {}))
        clients = [self.entered(path) for path in paths]
        self.server.stop()
        for client, path in zip(clients, paths):
            self.assertTrue(client.ends())
            self.assertFalse(os.path.exists(path))

    def test_the_old_commands(self):
        self.start()
        self.assertEqual(self.qmp.error("nbd-server-add", {"device": "disk"})[1], "NBD server not running")
        unix = self.start_nbd(self.qmp)
        self.assertEqual(self.qmp.error("nbd-server-add", {"device": "nope"})[1], "Cannot find device='nope' nor node-name='nope'")
        self.qmp.cmd("nbd-server-add", {"device": "disk"})
        self.check(unix)
        self.assertEqual(self.qmp.error("nbd-server-add", {"device": "disk"})[1], "Block export id 'disk' is already in use")
        self.assertEqual(self.qmp.error("nbd-server-add", {"device": "disk", "name": "0x"})[1], "Invalid block export id")
        self.qmp.cmd("nbd-server-add", {"device": "disk", "name": "other", "description": "text", "writable": True})
        with Raw(unix) as client:
            client.greet()
            listed = [payload for kind, payload in client.option(nbd.OPT_LIST) if kind == nbd.SERVER]
            self.assertIn(b"\0\0\0\5othertext", listed)
            self.assertFalse(client.go("other", 3)[1] & nbd.T_READ_ONLY)
            self.assertTrue(self.qmp.error("nbd-server-remove", {"name": "other"})[1].startswith("export 'other' still in use"))
        self.qmp.cmd("blockdev-add", {"driver": "null-co", "node-name": "ro", "size": MIB, "read-only": True, "read-zeroes": True})
        self.qmp.cmd("nbd-server-add", {"device": "ro", "writable": True})  # quietly read-only
        with Raw(unix) as client:
            client.greet()
            self.assertTrue(client.go("ro", 3)[1] & nbd.T_READ_ONLY)
        self.assertEqual({e["id"] for e in self.qmp.cmd("query-block-exports")}, {"disk", "other", "ro"})
        for name in ("disk", "other", "ro"):
            self.qmp.cmd("nbd-server-remove", {"name": name, "mode": "hard"})
            self.qmp.event("BLOCK_EXPORT_DELETED", id=name)
        self.assertEqual(self.qmp.error("nbd-server-remove", {"name": "disk"})[1], "Export 'disk' is not found")

    def test_a_bitmap_by_the_old_command(self):
        self.start()
        unix = self.start_nbd(self.qmp)
        self.qmp.cmd("block-dirty-bitmap-add", {"node": "disk", "name": "b", "disabled": True})
        self.qmp.cmd("nbd-server-add", {"device": "disk", "bitmap": "b"})
        with Raw(unix) as client:
            client.greet()
            self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
            replies = client.option(nbd.OPT_LIST_META, nbd.contexts("disk", "qemu:"))
            self.assertIn(b"qemu:dirty-bitmap:b", b"".join(payload for _, payload in replies))
        self.assertIn("nope", self.qmp.error("nbd-server-add", {"device": "disk", "name": "x", "bitmap": "nope"})[1])


class Clients(Managed):
    def clients(self):
        return self.servers()[""]["clients"]

    def test_what_is_told_of_a_client(self):
        require_gantry("gantryd's own")
        self.start()
        unix = self.start_nbd(self.qmp)
        self.export("e", writable=True)
        self.assertEqual(self.clients(), [])
        client = self.connect(unix)
        client.greet()
        (about,) = self.clients()
        self.assertNotIn("export", about)
        self.assertEqual((about["pid"], about["uid"], about["gid"]), (os.getpid(), os.getuid(), os.getgid()))
        client.go("disk", 3)
        client.read(0, 4096)
        client.read(0, 8192)
        self.assertEqual(client.ask(nbd.WRITE, 0, 512, data=b"x" * 512), 0)
        (about,) = wait_for(lambda: [c for c in self.clients() if c["requests"] == 3 and not c["in-flight"]], "three requests to be counted")
        self.assertEqual((about["export"], about["name"], about["bytes-read"], about["bytes-written"]), ("e", "disk", 12288, 512))
        self.assertLess(about["seconds"], 120)
        client.close()
        wait_for(lambda: not self.clients(), "the client to be gone")

    def test_tcp_clients_have_an_address(self):
        require_gantry("gantryd's own")
        self.start()
        port = free_port()
        self.qmp.cmd("nbd-server-start", {"addr": {"type": "inet", "host": "127.0.0.1", "port": str(port)}})
        self.export()
        client = self.entered(("127.0.0.1", port))
        (about,) = self.clients()
        self.assertEqual(about["address"], "127.0.0.1:%d" % client.socket.getsockname()[1])
        self.assertNotIn("pid", about)

    def test_gantry_status_shows_them(self):
        require_gantry()
        self.start()
        unix = self.start_nbd(self.qmp)
        self.export()
        client = self.entered(unix)
        client.read(0, 65536)
        shown = self.run_tool(gantry_test.GANTRY, "status", "--qmp", self.server.qmp_path).stdout
        self.assertIn(f"nbd+unix:///?socket={unix}", shown)
        self.assertRegex(shown, rf"unix:pid={os.getpid()},uid={os.getuid()}\s+disk\s")
        both = json.loads(self.run_tool(gantry_test.GANTRY, "status", "--json", "--qmp", self.server.qmp_path).stdout)
        self.assertEqual(both[0]["query-nbd-servers"][0]["clients"][0]["export"], "e")

    def test_a_thousand_idle_clients_are_cheap(self):
        require_gantry("the reference is not held to it")
        if gantry_test.BUILD.name in ("asan", "tsan"):
            missing("memory is not measured where sanitizers take some", installable=False)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 2500:
            missing("fewer than 2500 descriptors are allowed", installable=False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (2500, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        self.start()
        unix = self.start_nbd(self.qmp, **{"max-connections": 0})
        self.export()

        def resident():
            with open(f"/proc/{self.server.process.pid}/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * KIB

        self.entered(unix).read(0, 4096)
        before = resident()
        crowd = [self.entered(unix) for _ in range(1000)]
        for client in crowd:
            client.read(0, 4096)
        each = (resident() - before) // 1000
        print(f"{each} bytes for each idle client", file=sys.stderr)
        self.assertLess(each, 64 * KIB)


class Descriptors(Managed):
    def send(self, name, arguments, *fds):
        """A command with descriptors; its reply."""
        request = json.dumps({"execute": name, "arguments": arguments}).encode()
        self.qmp.socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
        return self.qmp.reply()

    def setUp(self):
        super().setUp()
        require_gantry("the reference has no descriptor passing in this program")

    def desc(self, *command):
        return self.send(*command)["error"]["desc"]

    def listener(self, name):
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(self.path(name))
        listener.listen()
        return listener

    def test_a_listening_socket_by_name(self):
        self.start()
        listener = self.listener("passed.sock")
        self.assertEqual(self.send("getfd", {"fdname": "l"}, listener.fileno()), {"return": {}})
        other = self.server.monitor()
        self.addCleanup(other.close)
        addr = {"addr": {"type": "fd", "data": {"str": "l"}}}
        # Names belong to the monitor that passed them.
        self.assertTrue(other.error("nbd-server-start", addr)[1].startswith("File descriptor named 'l' has not been found"))
        self.qmp.cmd("nbd-server-start", addr)
        self.export()
        self.check(self.path("passed.sock"))
        self.qmp.cmd("nbd-server-stop")
        # It was given away.
        self.assertTrue(self.qmp.error("nbd-server-start", addr)[1].startswith("File descriptor named 'l' has not been found"))

    def test_names(self):
        self.start()
        none = "No file descriptor supplied via SCM_RIGHTS"
        self.assertEqual(self.desc("getfd", {"fdname": "a"}), none)
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        error = self.send("getfd", {"fdname": "1a"}, write)["error"]
        self.assertEqual(error["desc"], "Parameter 'fdname' expects a name not starting with a digit")
        self.assertEqual(self.desc("closefd", {"fdname": "a"}), "File descriptor named 'a' not found")
        self.assertEqual(self.send("getfd", {"fdname": "a"}, write), {"return": {}})
        os.close(write)
        os.set_blocking(read, False)
        with self.assertRaises(BlockingIOError):
            os.read(read, 1)
        self.assertEqual(self.send("closefd", {"fdname": "a"}), {"return": {}})
        self.assertEqual(os.read(read, 1), b"")  # the last writer is gone
        self.assertEqual(self.desc("closefd", {"fdname": "a"}), "File descriptor named 'a' not found")

    def test_only_what_came_with_the_command_counts(self):
        self.start()
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.assertEqual(self.send("getfd", {"fdname": "a"}, *[write] * 5), {"return": {}})  # four are closed
        os.close(write)
        self.assertEqual(self.desc("getfd", {"fdname": "b"}), "No file descriptor supplied via SCM_RIGHTS")
        self.assertEqual(self.send("closefd", {"fdname": "a"}), {"return": {}})
        self.assertEqual(os.read(read, 1), b"")

    def test_they_go_with_the_monitor(self):
        self.start()
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        keep, self.qmp = self.qmp, self.server.monitor()
        self.assertEqual(self.send("getfd", {"fdname": "a"}, write), {"return": {}})
        os.close(write)
        self.qmp.close()
        self.qmp = keep
        self.assertEqual(os.read(read, 1), b"")

    def test_sets(self):
        self.start()
        path = self.raw_image("passed.raw", MIB, text_block)
        fds = [os.open(path, mode) for mode in (os.O_RDONLY, os.O_RDWR)]
        for fd in fds:
            self.addCleanup(os.close, fd)
        os.unlink(path)
        self.assertEqual(self.desc("add-fd", {}), "No file descriptor supplied via SCM_RIGHTS")
        self.assertEqual(self.send("add-fd", {"fdset-id": -1}, fds[0])["error"]["desc"], "Parameter 'fdset-id' expects a non-negative value")
        first = self.send("add-fd", {"opaque": "read"}, fds[0])["return"]
        self.assertEqual(first["fdset-id"], 0)
        seventh = self.send("add-fd", {"fdset-id": 7, "opaque": "write"}, fds[1])["return"]
        self.assertEqual(self.send("add-fd", {}, fds[0])["return"]["fdset-id"], 1)
        self.assertEqual(self.send("add-fd", {"fdset-id": 7}, fds[0])["return"]["fdset-id"], 7)
        sets = self.qmp.cmd("query-fdsets")
        self.assertEqual([(s["fdset-id"], [f.get("opaque") for f in s["fds"]]) for s in sets], [(0, ["read"]), (1, [None]), (7, ["write", None])])
        self.assertEqual(sets[0]["fds"][0]["fd"], first["fd"])
        self.assertEqual(self.desc("remove-fd", {"fdset-id": 5, "fd": 999}), "File descriptor named 'fdset-id:5, fd:999' not found")
        self.assertEqual(self.desc("remove-fd", {"fdset-id": 7, "fd": 999}), "File descriptor named 'fdset-id:7, fd:999' not found")
        self.assertEqual(self.desc("remove-fd", {"fdset-id": 77}), "File descriptor named 'fdset-id:77' not found")

        add = {"driver": "file", "node-name": "passed"}
        self.assertTrue(self.qmp.error("blockdev-add", {**add, "filename": "/dev/fdset/99"})[1].startswith(
            "Could not dup FD for /dev/fdset/99 flags 2: No such file or directory"))
        self.assertIn("Permission denied", self.qmp.error("blockdev-add", {**add, "filename": "/dev/fdset/0"})[1])
        self.qmp.cmd("blockdev-add", {**add, "filename": "/dev/fdset/7"})
        unix = self.start_nbd(self.qmp)
        self.qmp.cmd("block-export-add", {"type": "nbd", "id": "p", "node-name": "passed", "writable": True})
        with Raw(unix) as client:
            self.assertEqual(client.enter("passed")[0], MIB)
            self.assertEqual(client.ask(nbd.WRITE, 4096, 512, data=b"w" * 512), 0)
        self.assertEqual(os.pread(fds[0], 512, 4096), b"w" * 512)
        # Removed while in use: the set stays, empty, until the node is gone.
        self.qmp.cmd("remove-fd", {"fdset-id": 7})
        self.assertEqual([s for s in self.qmp.cmd("query-fdsets") if s["fdset-id"] == 7], [{"fdset-id": 7, "fds": []}])
        self.qmp.delete_export("p")
        self.qmp.cmd("blockdev-del", {"node-name": "passed"})
        self.assertEqual([s["fdset-id"] for s in self.qmp.cmd("query-fdsets")], [0, 1])
        self.qmp.cmd("remove-fd", {"fdset-id": 0, "fd": first["fd"]})
        self.assertEqual([s["fdset-id"] for s in self.qmp.cmd("query-fdsets")], [1])
        self.assertEqual(seventh["fdset-id"], 7)

    def test_a_read_only_set(self):
        self.start()
        path = self.raw_image("passed.raw", MIB, text_block)
        with open(path, "rb") as file:
            self.send("add-fd", {"fdset-id": 3}, file.fileno())
        self.qmp.cmd("blockdev-add", {"driver": "file", "node-name": "p", "filename": "/dev/fdset/3", "read-only": True})
        self.qmp.cmd("blockdev-add", {"driver": "file", "node-name": "auto", "filename": "/dev/fdset/3", "auto-read-only": True, "locking": "off"})
        unix = self.start_nbd(self.qmp)
        self.qmp.cmd("block-export-add", {"type": "nbd", "id": "p", "node-name": "p"})
        with Raw(unix) as client, open(path, "rb") as file:
            client.enter("p")
            self.assertEqual(client.read(0, 65536), file.read(65536))


class GoodBye(Managed):
    def test_requests_are_refused_before_the_end(self):
        require_gantry("the reference cuts its clients off")
        self.start()
        unix = self.start_nbd(self.qmp)
        self.export()
        client = self.entered(unix)
        answers = []

        def ask():
            try:
                while len(answers) < 1000000:
                    answers.append(client.ask(nbd.READ, 0, 512))
            except Closed:
                pass

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: len(answers) > 10, "the client to be at work")
        begin = time.monotonic()
        self.qmp.cmd("nbd-server-stop")
        self.assertLess(time.monotonic() - begin, 10)
        self.qmp.event("BLOCK_EXPORT_DELETED", id="e")
        thread.join()
        self.assertEqual(set(answers), {0, nbd.ESHUTDOWN})
        self.assertEqual(answers[answers.index(nbd.ESHUTDOWN):], [nbd.ESHUTDOWN] * (len(answers) - answers.index(nbd.ESHUTDOWN)))
        self.assertFalse(os.path.exists(unix))

    def test_options_are_refused_before_the_end(self):
        require_gantry("the reference waits for clients in the handshake")
        self.start()
        unix = self.start_nbd(self.qmp)
        self.export()
        client, busy = self.connect(unix), self.connect(unix)
        client.greet()
        busy.greet()
        kinds = []

        def list_exports():
            try:
                while len(kinds) < 1000000:
                    kinds.append(busy.final(nbd.OPT_LIST))
            except Closed:
                pass

        thread = threading.Thread(target=list_exports)
        thread.start()
        wait_for(lambda: len(kinds) > 10, "the client to be at work")
        self.qmp.cmd("nbd-server-stop")
        thread.join()
        self.assertEqual(set(kinds), {nbd.ACK, nbd.SHUTDOWN})
        self.assertTrue(client.ends())

    def test_idle_clients_cost_no_time(self):
        self.start()
        require_gantry("the reference waits for clients in the handshake")
        unix = self.start_nbd(self.qmp)
        self.export()
        clients = [self.entered(unix) for _ in range(20)] + [self.connect(unix) for _ in range(20)]
        begin = time.monotonic()
        self.qmp.cmd("nbd-server-stop")
        self.assertLess(time.monotonic() - begin, 5)
        for client in clients:
            self.assertTrue(client.ends())


class Storms(Managed):
    def test_connections_that_want_nothing_disturb_nobody(self):
        self.start()
        port = free_port()
        self.qmp.cmd("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}})
        self.export()
        good = self.entered(("127.0.0.1", port))
        for i in range(600):
            with socket.create_connection(("127.0.0.1", port)) as client:
                if i % 3 == 1:
                    client.sendall(os.urandom(64))
                if i % 3 == 2:  # a reset instead of an end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if i % 50 == 0:
                good.read(0, 4096)
        self.check(("127.0.0.1", port))
        if gantry_test.IS_GANTRY:
            wait_for(lambda: len(self.servers()[""]["clients"]) == 1, "the others to be gone")
        good.read(0, 4096)


class Start(Managed):
    def test_many_exports_on_the_command_line(self):
        image = self.raw_image("disk.raw", SIZE, text_block)
        unix, count = self.path("n.sock"), 500
        options = ["--blockdev", f"driver=file,node-name=disk,filename={image}", "--nbd-server", f"addr.type=unix,addr.path={unix}"]
        for i in range(count):
            options += ["--export", f"type=nbd,id=e{i},node-name=disk,name=n{i}"]
        begin = time.monotonic()
        daemon = self.daemon(*options)
        self.assertLess(time.monotonic() - begin, 20)
        self.assertEqual(len(daemon.qmp.cmd("query-block-exports")), count)
        self.assertEqual(len(self.names(unix)), count)
        self.image = image
        self.check(unix, f"n{count - 1}")


if __name__ == "__main__":
    gantry_test.main()
