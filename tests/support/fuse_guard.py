#!/usr/bin/python3
"""Keeps tests of mounts from hanging or leaving anything behind: a process of its own, told what there is to undo.

Whoever touches a file of a hung server waits for ever, with the interpreter's lock held when it is a mapped page: nothing within
the test can end that. So each line on standard input says what to do when the deadline passes, or when the test is gone:
    {"deadline": SECONDS}                 from now
    {"push": KEY, "pid": N}               SIGKILL
    {"push": KEY, "mount": PATH}          abort the connection behind it, detach it
    {"push": KEY, "run": [WORD...]}       a command
    {"pop": KEY}                          no longer needed
First all are killed and aborted, so that nothing waits any more; then everything is undone, the newest first.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time

MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CONNECTIONS = "/sys/fs/fuse/connections"


def mounts(path):
    """(minor number, file system type) of what is mounted on `path`, the topmost last. Asks no server anything."""
    found = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split()
            where = fields[4].decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
            if where == path:
                found.append((int(fields[2].split(b":")[1]), fields[fields.index(b"-") + 1].decode()))
    return found


def abort(path):
    """Ends the connection of the topmost mount on `path`; False when there is none, or it may not."""
    for minor, kind in reversed(mounts(path)):
        if kind.partition(".")[0] == "fuse":
            try:
                with open(f"{CONNECTIONS}/{minor}/abort", "w", encoding="ascii") as file:
                    file.write("1")
                return True
            except OSError:
                return False
    return False


def detach(path):
    """umount -l of everything on `path`, whoever answers there or does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(len(mounts(path))):
        if libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
            subprocess.run(["fusermount3", "-u", "-z", path], stdin=subprocess.DEVNULL, capture_output=True, timeout=10,
                           check=False)


def undo(entries, because):
    left = [entry for entry in entries.values() if not ("mount" in entry and not mounts(entry["mount"]))]
    if left:
        print(f"fuse_guard: {because}: ends {[list(e.values())[1:] for e in left]}", file=sys.stderr, flush=True)
    for entry in left:
        if "pid" in entry:
            try:
                os.kill(entry["pid"], signal.SIGKILL)
            except ProcessLookupError:
                pass
        elif "mount" in entry:
            abort(entry["mount"])
    for entry in reversed(left):
        try:
            if "mount" in entry:
                detach(entry["mount"])
            elif "run" in entry:
                subprocess.run(entry["run"], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            print(f"fuse_guard: {entry} hangs", file=sys.stderr, flush=True)


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a test that is interrupted still wants its mounts undone
    entries, deadline, text = {}, None, b""
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([0], [], [], wait)[0]:
            undo(entries, "the test did not end in time")
            entries, deadline = {}, None
            continue
        data = os.read(0, 65536)
        if not data:
            undo(entries, "the test ended without cleaning up")
            return
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "deadline" in message:
                deadline = time.monotonic() + message["deadline"]
            elif "pop" in message:
                entries.pop(message["pop"], None)
            else:
                entries[message["push"]] = message


if __name__ == "__main__":
    main()
