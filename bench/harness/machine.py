"""What the numbers depend on: the machine and the versions of the programs."""

import os
import platform
import re
import shutil
import subprocess
import time

from . import images

VERSION_COMMANDS = (("qemu-storage-daemon", "--version"), ("nbdkit", "--version"), ("nbd-server", "-V"), ("fio", "--version"))


def first_match(path, pattern, default=""):
    try:
        with open(path) as file:
            found = re.search(pattern, file.read(), re.MULTILINE)
    except OSError:
        return default
    return found.group(1).strip() if found else default


def version(program, argument):
    if not shutil.which(program):
        return "no " + program
    done = subprocess.run([program, argument], capture_output=True, text=True)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return "%s %s" % (program, found.group(0) if found else "?")


def describe(directory, image_mib, seconds):
    return {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "kernel": platform.release(),
            "cpu": first_match("/proc/cpuinfo", r"^model name\s*:\s*(.*)$", platform.machine()),
            "memory_gib": int(first_match("/proc/meminfo", r"^MemTotal:\s*(\d+)", "0")) >> 20,
            "file_system": images.file_system(directory), "image_mib": image_mib, "seconds": seconds,
            "versions": [version(*command) for command in VERSION_COMMANDS]}
