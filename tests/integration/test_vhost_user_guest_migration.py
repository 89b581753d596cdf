#!/usr/bin/python3
# One configuration: two guests take half a minute, and have no part of ours in them.
"""A guest moves to another qemu while it reads and writes its vhost-user-blk disk: pages that the daemon writes are in the log of
dirty memory, or the guest would go on with old ones. Long: with GANTRY_SOAK alone."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
from gantry_test import MIB
from guest import Guest, GuestDisk

MOVES = 3
SIZE = 32 * MIB
SECONDS = 12


class Migration(gt.Case):
    def test_guest_moves_under_load(self):
        if not os.environ.get("GANTRY_SOAK"):
            gt.missing("runs with GANTRY_SOAK=1", installable=False)
        self.raw_image("disk.raw", SIZE)
        words = ["--blockdev", f"driver=file,node-name=disk,filename={self.path('disk.raw')}"]
        for side in (0, 1):  # one front end at a time has an export
            words += ["--export", f"type=vhost-user-blk,id=side{side},node-name=disk,addr.type=unix,addr.path={self.path(str(side))},"
                      "writable=on,num-queues=2"]
        self.daemon(*words)
        for options in ("", "packed=on"):
            with self.subTest(options=options):
                self.guest = None
                try:
                    self.move_around(options)
                finally:
                    if self.guest:
                        self.guest.close()

    def place(self, number, options):
        """(directory, disks) of the n-th qemu."""
        directory = self.path(f"qemu.{options[:6]}{number}")
        os.mkdir(directory)
        return directory, [GuestDisk(self.path(str(number % 2)), options=options)]

    def move_around(self, options):
        self.guest = Guest(*self.place(0, options))
        self.guest.run(f"disk zero /dev/vda 0 {SIZE}")
        job = self.guest.start(f"disk random /dev/vda 0 {SIZE} {SECONDS} 4 1 /tmp/state")
        # Pages that only the daemon writes: the guest reads a pattern into memory that it has looked at before the move.
        self.guest.run("dd if=/dev/vda of=/tmp/before bs=1M count=8 2>/dev/null")
        for number in range(1, MOVES + 1):
            self.guest = self.guest.migrate_to(*self.place(number, options))
            self.assertTrue(self.guest.running(job), "the load ended before the moves")
        print(f"{options or 'split'}: moved {MOVES} times: {self.guest.finish(job)}", file=sys.stderr)
        self.assertNotIn("I/O error", self.guest.kernel_log())


if __name__ == "__main__":
    gt.main()
