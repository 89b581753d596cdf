#!/usr/bin/env python3
"""vduse-blk without VDUSE in the kernel: what a command line and QMP say, as the reference does."""
# One configuration: no request is served, so that back end and loops have no part in it.

import os
import pathlib
import shutil
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
from gantry_test import GANTRYD, Case, require_gantry

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


if __name__ == "__main__":
    gantry_test.main()
