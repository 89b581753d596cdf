#!/usr/bin/env python3
"""The tree stays livable: a README of at most 60 lines per room, no overlong files, no unfinished words, no machine's paths."""
import pathlib
import re
import subprocess
import sys

root = pathlib.Path(__file__).resolve().parents[2]
files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True)
paths = [p for p in files.stdout.splitlines() if (root / p).is_file()]
bad = []
for room in ["runtime", "schema", "block", "exports", "nbd", "qmp", "systemd", "cli", "tests", "bench"]:
    readme = root / room / "README.md"
    if not readme.is_file():
        bad.append(f"{room}/ has no README.md")
    elif len(readme.read_text().splitlines()) > 60:
        bad.append(f"{room}/README.md has more than 60 lines")
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b|\bfor n" + r"ow\b|not impl" + r"emented", re.I)
MACHINE = re.compile(r"(^|[^A-Za-z0-9_.])/(wor" + r"k|far" + r"m)/")
for name in paths:
    path = root / name
    if path.suffix not in (".cc", ".h", ".py", ".sh", ".md", ".cmake", ".txt", "") or "/corpus/" in name:
        continue
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        continue
    lines = text.splitlines()
    if path.suffix in (".cc", ".h", ".py") and len(lines) > 800:
        bad.append(f"{name}: {len(lines)} lines; look for the seam")
    for number, line in enumerate(lines, 1):
        if path.suffix in (".cc", ".h", ".py", ".sh") and UNFINISHED.search(line):
            bad.append(f"{name}:{number}: unfinished: {line.strip()[:80]}")
        if MACHINE.search(line):
            bad.append(f"{name}:{number}: a path of one machine")
print("\n".join(bad) or f"{len(paths)} files are in order")
sys.exit(1 if bad or not paths else 0)
