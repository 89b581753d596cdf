#!/usr/bin/env python3
"""Coroutine rules that a script can see: no std lock alive at a co_await, no capturing coroutine lambda."""
import pathlib
import re
import sys

root = pathlib.Path(__file__).resolve().parents[2]
ROOMS = ["runtime", "schema", "systemd", "block", "exports", "nbd", "qmp", "cli"]
LOCK = re.compile(r"\bstd::(lock_guard|scoped_lock|unique_lock|shared_lock)\b")
LAMBDA = re.compile(r"\[([^\]\[]+)\]\s*\([^()]*\)\s*(mutable\s*)?->\s*(gantry::)?Task<")


def strip(text):
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', text)


bad = []
count = 0
for room in ROOMS:
    for path in sorted((root / room).rglob("*")):
        if path.suffix not in (".h", ".cc"):
            continue
        count += 1
        name = path.relative_to(root).as_posix()
        depth = 0
        locks = []  # brace depth at which a lock lives
        for number, line in enumerate(strip(path.read_text()).splitlines(), 1):
            if LAMBDA.search(line):
                bad.append(f"{name}:{number}: a coroutine lambda with captures: they die before the coroutine")
            if LOCK.search(line):
                locks.append(depth + line[: LOCK.search(line).start()].count("{") - line[: LOCK.search(line).start()].count("}"))
            if "co_await" in line and locks and not LOCK.search(line):
                bad.append(f"{name}:{number}: co_await while a std lock is held")
            for c in line:
                if c == "{":
                    depth += 1
                elif c == "}":
                    depth -= 1
                    locks = [d for d in locks if d <= depth]
            if ".unlock()" in line and locks:
                locks.pop()
print("\n".join(bad) or f"{count} files keep the coroutine rules")
sys.exit(1 if bad or not count else 0)
