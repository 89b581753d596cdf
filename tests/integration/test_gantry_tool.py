#!/usr/bin/python3
"""What a person types: gantry serve, gantry status, gantry qmp, and the demo of ./bootstrap run."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt


class Tool(gt.Case):
    def setUp(self):
        super().setUp()
        gt.require_gantry()
        os.mkdir(self.path("run"), 0o700)
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": self.path("run")}
        self.environment.pop("RUNTIME_DIRECTORY", None)

    def gantry(self, *arguments, check=True, **options):
        done = subprocess.run([gt.GANTRY, *arguments], capture_output=True, text=True, timeout=gt.DEADLINE,
                              env=self.environment, cwd=self.dir, **options)
        if check:
            self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def refused(self, *arguments, status=1, text):
        done = self.gantry(*arguments, check=False)
        self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertRegex(done.stderr, f"^gantry {arguments[0]}: .*{text}")

    def serve(self, *arguments):
        """A running `gantry serve`: (process, its NBD URI, everything it printed up to the last hint)."""
        process = subprocess.Popen([gt.GANTRY, "serve", *gt.gantryd_options(), *arguments], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, env=self.environment, cwd=self.dir)
        self.addCleanup(self.end, process)
        text = ""
        while "Ctrl-C" not in text:
            line = process.stdout.readline()
            if not line:
                self.fail(f"gantry serve ended: {process.stderr.read()}")
            text += line
        return process, re.search(r"^    (nbd\S+)$", text, re.M)[1], text

    def end(self, process, number=signal.SIGINT):
        if process.stdout.closed:
            return  # ended already
        if process.poll() is None:
            process.send_signal(number)
        try:
            status = process.wait(gt.DEADLINE)
        finally:
            process.kill()
            process.stdout.close()
            errors = process.stderr.read()
            process.stderr.close()
        self.assertEqual(status, 0, errors)
        self.assertEqual(errors, "")

    def qcow2(self, name="disk.qcow2"):
        gt.require("qemu-img", "qemu-io")
        path = self.path(name)
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x41 0 64k", path)
        return path

    def read(self, uri, length=4096, offset=0):
        client = gt.libnbd().NBD()
        client.connect_uri(uri)
        data = bytes(client.pread(length, offset))
        client.shutdown()
        return data

    # --- serve

    def test_serve_raw(self):
        image = self.raw_image("disk.raw", gt.MIB, gt.text_block)
        process, uri, text = self.serve(image)
        self.assertIn(f"Serving {image} (read-only) at", text)
        self.assertTrue(uri.startswith("nbd+unix:///?socket="))
        self.assertEqual(self.read(uri, 65536), gt.text_block(0))
        # What it says to try works.
        lines = [line.strip() for line in text.partition("Try:")[2].splitlines() if line.startswith("    ")]
        self.assertGreaterEqual(len(lines), 3)
        os.symlink(gt.GANTRY, self.path("gantry"))
        for line in lines:
            gt.require(line.split()[0] if not line.startswith("gantry") else "sh")
            environment = {**self.environment, "PATH": f"{self.dir}:{os.environ['PATH']}"}
            done = subprocess.run(["sh", "-c", line], cwd=self.dir, env=environment, capture_output=True, text=True,
                                  timeout=gt.DEADLINE)
            self.assertEqual(done.returncode, 0, f"{line}: {done.stderr}")
        self.assertEqual(gt.checksum(self.path("copy.img")), gt.checksum(image))
        client = gt.libnbd().NBD()
        client.connect_uri(uri)
        self.assertTrue(client.is_read_only())
        client.shutdown()
        self.end(process)
        self.assertEqual(os.listdir(self.path("run/gantry")), [])

    def test_serve_for_writing(self):
        image = self.raw_image("disk.raw", gt.MIB)
        before = gt.checksum(image)
        # A probed raw image is never writable: whoever writes it could make it look like another format.
        self.refused("serve", "--write", image, text="--format raw")
        self.assertEqual(gt.checksum(image), before)
        process, uri, text = self.serve("--write", "--format", "raw", image)
        self.assertIn("(read-write)", text)
        client = gt.libnbd().NBD()
        client.connect_uri(uri)
        client.pwrite(b"hello", 1000)
        client.shutdown()
        self.end(process, signal.SIGTERM)
        with open(image, "rb") as file:
            self.assertEqual(file.read()[1000:1005], b"hello")

    def test_serve_probes(self):
        image = self.qcow2()
        before = gt.checksum(image)
        process, uri, _ = self.serve(image)
        self.assertEqual(self.read(uri, 65536), b"A" * 65536)
        self.assertEqual(self.read(uri, 4096, 512 * 1024), bytes(4096))
        self.end(process)
        process, uri, _ = self.serve("--format", "raw", image)  # as said: the container itself
        self.assertEqual(self.read(uri, 4), b"QFI\xfb")
        self.end(process)
        self.refused("serve", "--format", "qcow2", self.raw_image("x.raw", gt.MIB), text="Image is not in qcow2 format")
        self.refused("serve", "--format", "vmdk", image, text="vmdk.*not in this build")
        self.assertEqual(gt.checksum(image), before)

    def test_serve_qcow2_for_writing(self):
        image = self.qcow2()
        process, uri, text = self.serve("--write", image)  # probed: what a guest writes does not change the format
        self.assertIn(f"Serving {image} (read-write) at", text)
        client = gt.libnbd().NBD()
        client.connect_uri(uri)
        client.pwrite(b"QFI\xfb" + b"B" * 65532, 0)
        client.pwrite(b"C" * 4096, 700 * 1024)
        client.shutdown()
        self.end(process)
        self.run_tool("qemu-img", "check", image)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "read -P 0x42 4 65532", "-c", "read -P 0x43 700k 4k",
                      "-c", "read -P 0 704k 320k", image)
        process, uri, _ = self.serve(image)
        self.assertEqual(self.read(uri, 8), b"QFI\xfbBBBB")
        self.end(process)
        # A snapshot is the past: nobody writes it.
        self.run_tool("qemu-img", "snapshot", "-c", "before", image)
        before = gt.checksum(image)
        self.refused("serve", "--write", "--snapshot", "before", image, text="read-only")
        self.assertEqual(gt.checksum(image), before)

    def test_serve_snapshot(self):
        image = self.qcow2()
        self.run_tool("qemu-img", "snapshot", "-c", "before", image)
        self.run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x42 0 64k", image)
        for words, expected in ((["--snapshot", "before"], b"A"), (["--snapshot", "1"], b"A"), ([], b"B")):
            process, uri, _ = self.serve(*words, image)
            self.assertEqual(self.read(uri), expected * 4096)
            self.end(process)
        self.refused("serve", "--snapshot", "never", image, text="never")
        self.refused("serve", "--snapshot", "x", self.raw_image("x.raw", gt.MIB), text="snapshot")

    def test_serve_names_and_sockets(self):
        image = self.raw_image("disk.raw", gt.MIB)
        process, uri, _ = self.serve("--name", "my disk/1", "--description", "a text", "--socket", "here.sock", image)
        self.assertEqual(uri, f"nbd+unix:///my%20disk/1?socket={self.dir}/here.sock")
        self.assertEqual(len(self.read(uri)), 4096)
        info = json.loads(self.run_tool("nbdinfo", "--json", uri).stdout)["exports"][0]
        self.assertEqual((info["export-name"], info["description"]), ("my disk/1", "a text"))
        self.refused("serve", "--socket", self.path("here.sock"), image, text="here.sock")
        self.assertEqual(len(self.read(uri)), 4096)
        self.end(process)
        self.assertFalse(os.path.exists(self.path("here.sock")))

    def test_serve_tcp(self):
        image = self.raw_image("disk.raw", gt.MIB)
        port = gt.free_port()
        process, uri, _ = self.serve("--tcp", str(port), image)
        self.assertEqual(uri, f"nbd://127.0.0.1:{port}/")
        self.assertEqual(len(self.read(uri)), 4096)
        gt.require("ss")
        listening = [line.split()[3] for line in self.run_tool("ss", "-Hltn", f"sport = :{port}").stdout.splitlines()]
        self.assertEqual(listening, [f"127.0.0.1:{port}"])
        self.end(process)
        # Without encryption nothing but the loopback address, unless somebody insists.
        for address in (f"0.0.0.0:{port}", f"[::]:{port}", f"192.0.2.1:{port}"):
            self.refused("serve", "--tcp", address, image, text="--insecure")
        process, uri, _ = self.serve("--tcp", f"0.0.0.0:{port}", "--insecure", image)
        self.assertEqual(len(self.read(f"nbd://127.0.0.1:{port}/")), 4096)
        self.end(process)

    def test_serve_at_several_addresses(self):
        image = self.raw_image("disk.raw", gt.MIB, gt.text_block)
        port, unix = gt.free_port(), [self.path("1.sock"), self.path("2.sock")]
        process, _, text = self.serve("--tcp", str(port), "--socket", unix[0], "--socket", unix[1], image)
        uris = [f"nbd+unix:///?socket={path}" for path in unix] + [f"nbd://127.0.0.1:{port}/"]
        self.assertEqual([line.strip() for line in text.partition("Try:")[0].splitlines() if line.startswith("    ")], uris)
        for uri in uris:
            self.assertEqual(self.read(uri, 65536), gt.text_block(0))
        self.end(process)

    def ask_disk(self, path, request, payload=b""):
        """One request to a vhost-user socket; the payload of the reply."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(gt.DEADLINE)
            s.connect(path)
            s.sendall(struct.pack("=III", request, 1, len(payload)) + payload)
            size = struct.unpack("=III", s.recv(12, socket.MSG_WAITALL))[2]
            return s.recv(size, socket.MSG_WAITALL)

    def test_serve_virtual_machines(self):
        image = self.raw_image("disk.raw", 2 * gt.MIB)
        # A name that every one of the lines writes in its own way.
        path = self.path("a, b & 'c.sock")
        process, uri, text = self.serve("--write", "--format", "raw", "--vhost-user", "a, b & 'c.sock", "--queues", "3", image)
        self.assertEqual(len(self.read(uri)), 4096)
        config = self.ask_disk(path, 24, struct.pack("=III", 0, 60, 0) + bytes(60))[12:]
        self.assertEqual((struct.unpack_from("<Q", config)[0], struct.unpack_from("<H", config, 34)[0]), (4096, 3))
        self.assertFalse(struct.unpack("=Q", self.ask_disk(path, 1))[0] & 1 << 5)  # it is not read-only
        xml = ElementTree.fromstring("<domain>" + text.partition("libvirt:\n")[2].partition("Try:")[0] + "</domain>")
        self.assertEqual(xml.find("disk/source").get("path"), path)
        self.assertEqual((xml.find("disk/driver").get("queues"), xml.find("memoryBacking/access").get("mode")), ("3", "shared"))
        cloud = shlex.split(text.partition("cloud-hypervisor:\n")[2].partition("libvirt:")[0].replace("\\\n", ""))
        self.assertEqual(cloud, ["--memory", "size=4G,shared=on", "--disk",
                                 f"vhost_user=true,socket={path},num_queues=3,queue_size=256"])
        status = self.gantry("status").stdout
        self.assertIn(f"vhost-user-blk export guest on {path}: no virtual machine is connected", status)
        with self.subTest("qemu takes its line"):
            gt.require("qemu-system-x86_64")
            line = text.partition("reconnect=1; the size is that of -m):\n")[2].partition("cloud-hypervisor:")[0].replace("4G", "64M")
            words = shlex.split(line.replace("\\\n", ""))
            qemu = subprocess.Popen(["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-S", *words,
                                     "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.addCleanup(qemu.kill)
            self.assertIn("QMP", qemu.stdout.readline())  # its devices are there
            status = self.gantry("status").stdout
            self.assertRegex(status, f"export guest on .*: unix:pid={qemu.pid},uid=.*; 0 queues run, 0 requests in flight; 0 requests")
            qemu.communicate('{"execute": "qmp_capabilities"}{"execute": "quit"}', timeout=gt.DEADLINE)
        self.end(process)
        self.assertFalse(os.path.exists(path))

        # For reading by several.
        process, _, text = self.serve("--format", "raw", "--vhost-user", "1.sock", "--vhost-user", "2.sock", image)
        for name in ("1.sock", "2.sock"):
            self.assertIn(f"on {self.path(name)}\n", text)
            self.assertTrue(struct.unpack("=Q", self.ask_disk(self.path(name), 1))[0] & 1 << 5)
        self.end(process)
        self.refused("serve", "--write", "--vhost-user", "1", "--vhost-user", "2", image, status=2, text="once with --write")
        self.refused("serve", "--queues", "2", image, status=2, text="--queues goes with --vhost-user")
        for number in ("0", "65", "x", "-1"):
            self.refused("serve", "--vhost-user", "1", "--queues", number, image, status=2, text=f"'{number}' is no number of queues")
        self.assertIn("--vhost-user SOCK", self.gantry("serve", "--help").stdout)

    def test_serve_bad_words(self):
        self.refused("serve", status=2, text="name an image")
        self.refused("serve", "a", "b", status=2, text="one image at a time")
        self.refused("serve", "--bogus", "a", status=2, text="unrecognized option '--bogus'")
        self.refused("serve", "--io-backend", "x", "a", status=2, text="x")
        self.refused("serve", self.path("none"), text="Could not open '.*none': No such file or directory")
        self.assertIn("--write", self.gantry("serve", "--help").stdout)

    # --- status and qmp

    def start_two(self):
        first = self.serve(self.raw_image("one.raw", gt.MIB, gt.text_block))
        second = self.serve("--format", "raw", "--write", self.raw_image("two.raw", 2 * gt.MIB))
        return first, second

    def test_status(self):
        self.assertIn("No running daemon", self.gantry("status").stdout)
        self.assertEqual(json.loads(self.gantry("status", "--json").stdout), [])
        (first, uri, _), (second, _, _) = self.start_two()
        self.read(uri, 65536)
        text = self.gantry("status").stdout
        for process in (first, second):
            self.assertIn(f"{self.path('run/gantry')}/{process.pid}.qmp", text)
        self.assertRegex(text, r"EXPORT +TYPE +NODE +DRIVER +MODE +SIZE +READ +WRITTEN\n")
        self.assertRegex(text, r"disk +nbd +disk +raw +ro +1 MiB \(1048576 bytes\) +64 KiB \(65536 bytes\) +0 B\n")
        self.assertRegex(text, r"disk +nbd +disk +raw +rw +2 MiB \(2097152 bytes\)")
        daemons = json.loads(self.gantry("status", "--json").stdout)
        self.assertEqual(len(daemons), 2)
        self.assertEqual([daemon["query-block-exports"][0]["id"] for daemon in daemons], ["disk", "disk"])
        one = f"{self.path('run/gantry')}/{first.pid}.qmp"
        self.assertEqual(len(json.loads(self.gantry("status", "--json", "--qmp", one).stdout)), 1)
        self.refused("status", "--qmp", self.path("none"), text="none")
        self.end(first)
        self.end(second)
        self.assertIn("No running daemon", self.gantry("status").stdout)

    def test_control_sockets_are_private(self):
        self.serve(self.raw_image("one.raw", gt.MIB))
        folder = self.path("run/gantry")
        self.assertEqual(stat.S_IMODE(os.stat(folder).st_mode) & 0o077, 0)
        for name in os.listdir(folder):
            if name.endswith(".qmp"):
                self.assertEqual(stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode), 0o600)

    def test_qmp(self):
        self.refused("qmp", "query-version", text="No running daemon")
        (first, _, _), (second, _, _) = self.start_two()
        self.refused("qmp", "query-version", text="Several daemons are running; choose one with --qmp: ")
        self.end(second)
        self.assertIn("qemu:\n  ", self.gantry("qmp", "query-version").stdout)
        exports = json.loads(self.gantry("qmp", "--json", "query-block-exports").stdout)
        self.assertEqual(exports[0]["id"], "disk")
        self.assertIn("- id: disk\n  type: nbd\n", self.gantry("qmp", "query-block-exports").stdout)
        done = self.gantry("qmp", "blockdev-add", "driver=null-co", "node-name=n", "size=1048576", "read-zeroes=on")
        self.assertEqual(done.stdout, "")
        self.gantry("qmp", "blockdev-add", '{"driver": "null-co", "node-name": "m", "size": 512}')
        self.gantry("qmp", "block-export-add", "type=nbd", "id=n", "node-name=n", "name=second")
        nodes = json.loads(self.gantry("qmp", "--json", "query-named-block-nodes", "flat=on").stdout)
        self.assertEqual({node["node-name"]: node["image"]["virtual-size"] for node in nodes},
                         {"file": gt.MIB, "disk": gt.MIB, "n": gt.MIB, "m": 512})
        self.refused("qmp", "blockdev-del", "node-name=n", text="blockdev-del: Node n is in use")
        self.refused("qmp", "blockdev-add", "driver=null-co", "node-name=x", "bogus=1", text="Parameter 'bogus' is unexpected")
        self.refused("qmp", "no-such-command", text="The command no-such-command has not been found")
        self.refused("qmp", "--qmp", self.path("none"), "query-version", text="none.*No such file or directory")
        self.refused("qmp", status=2, text="name a command")
        self.assertIn("blockdev-add", self.gantry("qmp", "--help").stdout)
        self.assertIn("mode=<", self.gantry("qmp", "--help", "block-export-del").stdout)
        socket_path = f"{self.path('run/gantry')}/{first.pid}.qmp"
        self.gantry("qmp", "--qmp", socket_path, "quit")
        self.assertEqual(first.wait(gt.DEADLINE), 0)

    def test_top_level(self):
        self.assertIn("serve", self.gantry("--help").stdout)
        self.assertRegex(self.gantry("--version").stdout, r"^gantry \d+\.\d+")
        done = self.gantry("fly", check=False)
        self.assertEqual((done.returncode, done.stderr), (2, "gantry: there is no command 'fly'; 'gantry --help' lists them\n"))
        self.assertEqual(self.gantry(check=False).returncode, 2)

    # --- the demo of ./bootstrap run

    def test_demo_disk(self):
        tool = shutil.which("mkfs.ext4", path=os.environ["PATH"] + ":/sbin:/usr/sbin") or gt.missing("no mkfs.ext4")
        debugfs = os.path.join(os.path.dirname(tool), "debugfs")
        script = (gt.ROOT / "bootstrap").read_text()
        function = re.search(r"^demo_disk\(\) \{\n.*?^\}\n", script, re.M | re.S)[0]
        disk = subprocess.run(["bash", "-euo", "pipefail", "-c", function + "demo_disk"], cwd=self.dir, capture_output=True,
                              text=True, check=True, timeout=gt.DEADLINE).stdout.strip()
        process, uri, _ = self.serve("--write", "--format", "raw", os.path.join(self.dir, disk))
        copy = self.path("copy.img")
        self.run_tool("nbdcopy", uri, copy)
        text = self.run_tool(debugfs, "-R", "cat README.txt", copy).stdout
        self.assertIn("demo disk of Gantry", text)
        self.end(process)


if __name__ == "__main__":
    gt.main()
