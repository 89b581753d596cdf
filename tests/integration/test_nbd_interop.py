#!/usr/bin/env python3
"""Other people's NBD programs on top of the server: nbd-client, a virtual machine, nbdkit's nbd plugin, fio, nbdcopy."""
# One configuration: how bytes are moved is tested with clients of our own; these tests are about being understood

import json
import os
import pathlib
import random
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
from gantry_test import KIB, MIB, Case, checksum, free_port, require, require_gantry, text_block, wait_for
from nbd_raw import Raw

SIZE = 8 * MIB
QEMU = "qemu-system-x86_64"

# A boot sector: copies sector 1 to sector 2, prints 16 bytes of it on the debug port, ends the machine with status 33.
BOOT = bytes.fromhex(
    "31c0 8ed8 8ec0"  # segments at 0
    "bb007e b80102 b90200 b600 cd13 721a"  # read sector 1 to 0x7e00
    "b80103 b90300 cd13 7210"  # write it as sector 2
    "be007e b91000 ac e6e9 e2fb"  # print
    "b010 ba0105 ee"  # end
    "f4 ebfd".replace(" ", ""))


class Interop(Case):
    def serve(self, writable=True, tcp=False, pattern=text_block, **image):
        self.image = self.raw_image("disk.raw", SIZE, pattern)
        self.unix, self.port = self.path("nbd.sock"), free_port()
        server = f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.port}" if tcp else f"addr.type=unix,addr.path={self.unix}"
        self.server = self.daemon(
            "--blockdev", f"driver=file,node-name=disk,filename={self.image},discard=unmap", "--nbd-server", server,
            "--export", f"type=nbd,id=e,node-name=disk,name=disk,writable={'on' if writable else 'off'}")
        return f"nbd://127.0.0.1:{self.port}/disk" if tcp else self.uri(self.unix, "disk")

    def background(self, *command):
        process = subprocess.Popen([str(word) for word in command], cwd=self.dir, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)

        def end():
            process.kill()
            process.communicate()
        self.addCleanup(end)
        return process

    def test_nbd_client_lists_and_negotiates(self):
        require("nbd-client")
        self.serve()
        self.server.qmp.cmd("block-export-add", {"type": "nbd", "id": "f", "node-name": "disk", "name": "second", "description": "text"})
        listed = self.run_tool("nbd-client", "-l", "-u", self.unix).stdout
        self.assertEqual(sorted(line.split()[0].rstrip(":") for line in listed.splitlines() if line and not line.startswith("Negotiation")), ["disk", "second"])
        # Without the kernel's driver: everything up to the moment when the kernel would take the socket over.
        open(self.path("device"), "w").close()
        done = self.run_tool("nbd-client", "-u", self.unix, "-N", "disk", "-L", "-n", "device", check=False)
        self.assertIn(f"size = {SIZE // MIB}MB", done.stdout)
        self.assertRegex(done.stderr, "ioctl|blocksize")
        refused = self.run_tool("nbd-client", "-u", self.unix, "-N", "nope", "-L", "-n", "device", check=False)
        self.assertNotIn("size =", refused.stdout)

    def test_what_the_kernel_client_does_after_its_handshake(self):
        # nbd.ko: GO without block sizes, simple replies, several connections, flush, trim and writes with FUA.
        self.serve()
        clients = []
        for _ in range(4):
            client = Raw(self.unix)
            self.addCleanup(client.close)
            client.greet()
            size, flags, _ = client.go("disk")
            self.assertTrue(flags & nbd.T_MULTI_CONN)
            clients.append(client)
        for i, client in enumerate(clients):
            self.assertEqual(client.ask(nbd.WRITE, i * 4096, 4096, nbd.FUA, bytes([i + 1]) * 4096), 0)
            self.assertEqual(client.ask(nbd.TRIM, MIB + i * 65536, 65536), 0)
            self.assertEqual(client.ask(nbd.FLUSH), 0)
        for client in clients:
            for i in range(4):
                self.assertEqual(client.read(i * 4096, 4096), bytes([i + 1]) * 4096)

    def test_a_virtual_machine_boots_from_an_export(self):
        require(QEMU)
        said = b"gantry says boo!"
        sectors = {0: BOOT.ljust(510, b"\0") + b"\x55\xaa" + said.ljust(512, b"\x01")}
        self.serve(pattern=lambda n: sectors.get(n, b"").ljust(65536, b"\0") if n == 0 else None)
        out = self.path("debug")
        done = self.run_tool(
            QEMU, "-M", "pc", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-debugcon", f"file:{out}",
            "-device", "isa-debug-exit", "-blockdev", f"driver=nbd,node-name=d,server.type=unix,server.path={self.unix},export=disk",
            "-device", "ide-hd,drive=d", check=False)
        self.assertEqual(done.returncode, 33, done.stderr)
        with open(out, "rb") as file:
            self.assertIn(said, file.read())
        self.server.stop()
        with open(self.image, "rb") as file:
            file.seek(1024)
            self.assertEqual(file.read(512), said.ljust(512, b"\x01"))

    def test_a_machine_sees_the_disk_as_it_is(self):
        require(QEMU)
        self.serve(tcp=True)
        script = [{"execute": "qmp_capabilities"}, {"execute": "query-named-block-nodes", "arguments": {"flat": True}},
                  {"execute": "blockdev-add", "arguments": {"driver": "copy-on-read", "node-name": "c", "file": "n"}}, {"execute": "quit"}]
        done = subprocess.run(
            [QEMU, "-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio", "-blockdev",
             f"driver=nbd,node-name=n,server.type=inet,server.host=127.0.0.1,server.port={self.port},export=disk"],
            input="".join(map(json.dumps, script)), capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        (node,) = next(r["return"] for r in replies if isinstance(r.get("return"), list))
        self.assertEqual((node["image"]["virtual-size"], node["drv"], node["ro"]), (SIZE, "nbd", False))
        self.assertFalse([r for r in replies if "error" in r])

    def test_nbdkit_on_top(self):
        require("nbdkit", "nbdcopy", "nbdinfo")
        uri = self.serve()
        top = self.path("top.sock")
        for options in (("shared=true",), ()):
            process = self.background("nbdkit", "-f", "-U", top, "--filter=stats", "nbd", f"uri={uri}", *options, f"statsfile={self.path('stats')}")
            wait_for(lambda: os.path.exists(top) or process.poll() is not None, "nbdkit to listen")
            there = self.uri(top)
            self.run_tool("nbdcopy", there, self.path("out.raw"))
            self.assertEqual(checksum(self.path("out.raw")), checksum(self.image))
            maps = [json.loads(self.run_tool("nbdinfo", "--map", "--json", u).stdout) for u in (uri, there)]
            self.assertEqual(*[[(e["offset"], e["length"], e["type"]) for e in m] for m in maps])
            data = self.raw_image("in.raw", SIZE, lambda n: random.Random(n).randbytes(65536) if n % 3 else None)
            self.run_tool("nbdcopy", "--flush", data, there)
            self.assertEqual(checksum(self.image), checksum(data))
            process.terminate()
            process.wait(30)
            if os.path.exists(top):
                os.unlink(top)

    def test_nbdcopy_between_two_servers(self):
        require("nbdcopy", "nbdkit")
        uri = self.serve(tcp=True)
        kit = self.path("kit.sock")
        process = self.background("nbdkit", "-f", "-U", kit, "memory", str(SIZE))
        wait_for(lambda: os.path.exists(kit) or process.poll() is not None, "nbdkit to listen")
        self.run_tool("nbdcopy", "--connections=4", uri, self.uri(kit))
        before = checksum(self.image)
        with Raw(("127.0.0.1", self.port)) as client:
            client.enter("disk")
            self.assertEqual(client.ask(nbd.WRITE_ZEROES, 0, SIZE), 0)
            self.assertEqual(client.read(0, MIB), bytes(MIB))
        self.run_tool("nbdcopy", "--flush", self.uri(kit), uri)
        self.assertEqual(checksum(self.image), before)

    def test_fio_verifies_what_it_wrote(self):
        require("fio")
        for tcp in (False, True):
            uri = self.serve(tcp=tcp)
            done = self.run_tool(
                "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bssplit=512/20:4k/50:64k/30", "--size=4M",
                "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--output-format=json")
            (job,) = json.loads(done.stdout[done.stdout.index("{"):])["jobs"]
            self.assertEqual((job["error"], job["read"]["total_ios"] > 0), (0, True))
            self.server.stop()

    def test_qemu_img_and_nbdinfo_over_tcp(self):
        require("qemu-img", "nbdinfo")
        uri = self.serve(tcp=True, writable=False)
        self.run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", self.image, uri)
        self.assertEqual(self.run_tool("nbdinfo", "--size", uri).stdout.strip(), str(SIZE))
        self.assertEqual(self.run_tool("nbdinfo", "--is", "read-only", uri).returncode, 0)
        refused = self.run_tool("qemu-io", "-f", "raw", "-c", "write 0 512", uri, check=False)
        self.assertTrue(re.search("ead-only|ead only|not permitted|denied", refused.stdout + refused.stderr), refused)


if __name__ == "__main__":
    gantry_test.main()
