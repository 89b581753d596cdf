#!/usr/bin/env python3
"""vduse-blk without VDUSE in the kernel: what a command line and QMP say, as the reference does."""
# One configuration: no request is served, so that back end and loops have no part in it.

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import DEADLINE, GANTRY, GANTRYD, Case, require_gantry

CONTROL = "/dev/vduse/control"
REFERENCE = shutil.which("qemu-storage-daemon")


def error_of(program, options):
    """What the program says when it ends because of its --export option; without its name and the option."""
    export = "type=vduse-blk,id=e,node-name=n," + options
    run = subprocess.run([program, "--blockdev", "null-co,node-name=n,read-zeroes=on", "--export", export],
                         capture_output=True, text=True, timeout=30)
    assert run.returncode != 0, "it has started"
    lines = [line for line in run.stderr.splitlines() if f"--export {export}: " in line]
    assert len(lines) == 1, run.stderr
    return lines[0].split(f"--export {export}: ", 1)[1]


@unittest.skipIf(os.path.exists(CONTROL), "this kernel has VDUSE")
class WithoutVduse(Case):
    def test_the_error_says_what_to_do(self):
        text = error_of(GANTRYD, "name=disk0")
        if gantry_test.IS_GANTRY:
            self.assertIn("'/dev/vduse/control': No such file or directory", text)
            self.assertIn("modprobe vduse", text)
        self.assertTrue(text.startswith("failed to create vduse device"), text)

    def test_over_qmp(self):
        require_gantry("the reference says the same with less")
        daemon = self.daemon("--blockdev", "null-co,node-name=n,read-zeroes=on")
        qmp = daemon.qmp
        # The second time: nothing holds the node, and the id is free.
        for _ in range(2):
            text = qmp.error("block-export-add", {"type": "vduse-blk", "id": "e", "node-name": "n", "name": "disk0"})[1]
            self.assertTrue(text.startswith("failed to create vduse device; "), text)
            self.assertEqual(qmp.cmd("query-block-exports"), [])
        qmp.cmd("blockdev-del", node_name="n")

    @unittest.skipUnless(REFERENCE, "qemu-storage-daemon is not installed")
    def test_in_the_words_of_the_reference(self):
        for options in ("name=disk0", "name=disk0,serial=1234", "name=disk0,queue-size=3", "name=disk0,queue-size=2",
                        "name=disk0,queue-size=2048", "name=disk0,num-queues=0", "name=disk0,num-queues=70000", "queue-size=64",
                        "name=disk0,logical-block-size=513", "name=disk0,logical-block-size=256", "name=",
                        "name=disk0,logical-block-size=4096,queue-size=1"):
            with self.subTest(options):
                words = error_of(REFERENCE, options).split(" (minimum: ")[0]
                self.assertTrue(error_of(GANTRYD, options).startswith(words), (words, error_of(GANTRYD, options)))


class Status(Case):
    """What `gantry status` says of devices, which this kernel need not have: the answers are those of a daemon that has them."""

    QUEUE = {"index": 0, "loop": "io0", "running": True, "enabled": True, "size": 64, "packed": False, "in-flight": 2, "requests": 7,
             "bytes-read": 4096, "bytes-written": 0, "kicks": 3, "signals": 4}
    DEVICE = {"id": "disk", "name": "disk0", "writable": True, "logical-block-size": 512, "num-queues": 2, "queue-size": 256,
              "serial": "", "attached": True, "taken-over": False, "running": True, "features-offered": 0x700000000,
              "features": 0x300000000, "kept-for-restart": True,
              "queues": [QUEUE, {**QUEUE, "index": 1, "running": False, "broken": "it makes no sense"}]}

    def answer(self, listener, devices):
        client, _ = listener.accept()
        with client, client.makefile("rb") as stream:
            client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
            decoder, text = json.JSONDecoder(), ""
            while data := stream.read1():
                text += data.decode()
                while text := text.lstrip():
                    try:
                        message, end = decoder.raw_decode(text)
                    except json.JSONDecodeError:
                        break
                    text = text[end:]
                    command = message["execute"]
                    value = {} if command == "qmp_capabilities" else devices if command == "query-vduse-exports" else []
                    client.sendall(json.dumps({"return": value, "id": message.get("id")}).encode() + b"\r\n")

    def status(self, *devices):
        path = self.path("qmp.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            thread = threading.Thread(target=self.answer, args=(listener, devices))
            thread.start()
            run = subprocess.run([GANTRY, "status", "--qmp", path], capture_output=True, text=True, timeout=DEADLINE)
            thread.join(DEADLINE)
        os.unlink(path)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        return run.stdout

    def test_devices(self):
        require_gantry("gantry status is ours")
        text = self.status(self.DEVICE)
        self.assertIn("vduse-blk export disk as VDUSE device disk0: attached, its driver runs; 1 queues run, 4 requests in flight; "
                      "14 requests, 6 kicks, 8 signals, ", text)
        self.assertIn("; features 0x300000000; survives a restart\n  queue 1 is not served any more: it makes no sense\n", text)
        text = self.status({**self.DEVICE, "attached": False, "running": False, "queues": [], "kept-for-restart": False},
                           {**self.DEVICE, "id": "two", "running": False, "kept-for-restart": False, "kept-reason": "nobody keeps it"})
        self.assertIn("export disk as VDUSE device disk0: not attached to the vDPA bus; 0 queues run, ", text)
        self.assertIn("export two as VDUSE device disk0: attached, no driver uses it; ", text)
        self.assertIn("; does not survive a restart: nobody keeps it\n", text)

    def test_a_daemon_without_any(self):
        require_gantry("gantry status is ours")
        daemon = self.daemon()
        self.assertEqual(daemon.qmp.cmd("query-vduse-exports"), [])
        run = subprocess.run([GANTRY, "status", "--qmp", daemon.qmp_path], capture_output=True, text=True, timeout=DEADLINE)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertNotIn("vduse", run.stdout)


if __name__ == "__main__":
    gantry_test.main()
