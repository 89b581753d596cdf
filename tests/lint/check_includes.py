#!/usr/bin/env python3
"""Who may include whom (docs/architecture.md): each room only what stands below it, and itself."""
import pathlib
import re
import sys

ALLOWED = {
    "runtime": [],
    "schema": ["runtime"],
    "systemd": ["runtime"],
    "block": ["runtime", "schema"],
    "exports": ["runtime", "schema", "block"],
    "nbd": ["runtime", "schema", "block", "exports"],
    "fuse": ["runtime", "schema", "block", "exports"],
    "qmp": ["runtime", "schema", "block", "exports", "nbd", "fuse"],
    "cli": ["runtime", "schema", "block", "exports", "nbd", "fuse", "qmp", "systemd"],
}
# Inside exports/: what its folders may include of each other and of what lies beside them.
EXPORTS = {
    "exports": [],
    "exports/virtio": [],
    "exports/vhost_user": ["exports", "exports/virtio"],
    "exports/vduse": ["exports", "exports/virtio"],
}
# Third-party headers appear behind one wrapper each: header prefix -> files that may include it.
WRAPPED = {
    "liburing.h": ["runtime/"],
    "spdlog/": ["runtime/log.cc"],
    "zlib.h": ["block/formats/"],
    "zstd.h": ["block/formats/"],
    "nettle/": ["block/crypto/"],
    "boost/program_options": ["cli/options.cc"],
}
INCLUDE = re.compile(r'^\s*#include\s+["<]([^">]+)[">]')

root = pathlib.Path(__file__).resolve().parents[2]
bad = []
count = 0
for room, below in ALLOWED.items():
    for path in sorted((root / room).rglob("*")):
        if path.suffix not in (".h", ".cc"):
            continue
        count += 1
        name = path.relative_to(root).as_posix()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            target = match.group(1)
            first = target.split("/")[0]
            if first in ALLOWED and first != room and first not in below:
                bad.append(f"{name}:{number}: {room}/ may not include {first}/ ({target})")
            folder, wanted = str(path.relative_to(root).parent), str(pathlib.PurePath(target).parent)
            if folder in EXPORTS and wanted in EXPORTS and wanted != folder and wanted not in EXPORTS[folder]:
                bad.append(f"{name}:{number}: {folder}/ may not include {wanted}/ ({target})")
            for prefix, places in WRAPPED.items():
                if target.startswith(prefix) and not any(name.startswith(p) for p in places):
                    bad.append(f"{name}:{number}: <{target}> belongs behind its wrapper in {' or '.join(places)}")
        if path.suffix == ".h" and "#pragma once" not in path.read_text():
            bad.append(f"{name}: a header without #pragma once")
        if path.suffix == ".h" and re.search(r"^\s*using namespace", path.read_text(), re.M):
            bad.append(f"{name}: 'using namespace' in a header")
print("\n".join(bad) or f"{count} files include only downwards")
sys.exit(1 if bad or not count else 0)
