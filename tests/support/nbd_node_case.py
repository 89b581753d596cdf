"""Tests of the block driver nbd: other servers, and a gantryd whose node `n` is an export of one of them, exported again."""

import json
import os
import random
import signal
import socket
import subprocess
import tempfile

import gantry_test
from gantry_test import Case, Daemon, libnbd, listening, require, wait_for


class NodeCase(Case):
    def setUp(self):
        super().setUp()
        gantry_test.require_gantry("a driver of gantryd")

    # --- servers

    def process(self, *command, socket_path=None, port=None, **popen):
        process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, **popen)

        def end():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.communicate()
        self.addCleanup(end)

        def ready():
            if process.poll() is not None:
                self.fail(f"{command[0]} ended: {process.communicate()[1].decode()}")
            if port:
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0
            return listening(socket_path)
        wait_for(ready, command[0])
        return process

    def nbdkit(self, *words, name="k.sock"):
        require("nbdkit")
        path = self.path(name)
        process = self.process("nbdkit", "-f", "-U", path, *words, socket_path=path)
        process.socket = path
        return process

    def qemu_nbd(self, image, *words, name="q.sock"):
        require("qemu-nbd")
        path = self.path(name)
        process = self.process("qemu-nbd", "-t", "-f", "raw", "-k", path, *words, image, socket_path=path)
        process.socket = path
        return process

    def gantry_server(self, image, *words, name="g", export="disk", driver="raw", path=None):
        """Another gantryd, in a directory of its own."""
        directory = tempfile.mkdtemp(prefix=f"{name}-", dir=self.dir)
        path = path or os.path.join(directory, "nbd.sock")
        daemon = Daemon(directory, "--blockdev",
                        f"driver={driver},node-name=disk,discard=unmap,file.driver=file,file.filename={image}", "--nbd-server",
                        f"addr.type=unix,addr.path={path}", "--export",
                        f"type=nbd,id=e,node-name=disk,name={export},writable=on", *words)
        self.addCleanup(self._end, daemon)
        daemon.socket = path
        return daemon

    # --- the client

    @staticmethod
    def unix(path):
        return {"type": "unix", "path": str(path)}

    def client(self, server, *words, writable=True, **options):
        """Starts the daemon; node `n` is the export of `server` (an address, or a process with a socket)."""
        address = server if isinstance(server, dict) else self.unix(server.socket)
        definition = {"driver": "nbd", "node-name": "n", "discard": "unmap", "server": address,
                      **{key.replace("_", "-"): value for key, value in options.items()}}
        self.out = self.path("out.sock")
        self.node_daemon = self.daemon(
            *words, "--blockdev", json.dumps(definition), "--nbd-server", f"addr.type=unix,addr.path={self.out}", "--export",
            f"type=nbd,id=out,node-name=n,name=out,writable={'on' if writable else 'off'}")
        self.q = self.node_daemon.qmp
        return self.node_daemon

    def empty_client(self, *words):
        daemon = self.daemon(*words)
        self.q = daemon.qmp
        return daemon

    def add(self, server, **options):
        address = server if isinstance(server, dict) else self.unix(server.socket)
        return {"driver": "nbd", "node-name": "n", "server": address,
                **{key.replace("_", "-"): value for key, value in options.items()}}

    def connect(self):
        h = libnbd().NBD()
        h.add_meta_context("base:allocation")
        h.set_strict_mode(h.get_strict_mode() & ~libnbd().STRICT_ALIGN)  # what is not aligned is our server's business
        h.connect_uri(self.uri(self.out, "out"))
        return h

    def model(self, h, size, seed, operations=150, unit=1):
        """Random operations on `h` and on a copy in memory; the copy."""
        rng = random.Random(seed)
        model = bytearray(h.pread(size, 0))
        for number in range(operations):
            length = rng.choice((unit, 512, 4096, 70000 // unit * unit, rng.randrange(unit, 300000) // unit * unit or unit))
            length = min(length, size)
            offset = rng.randrange(0, (size - length) // unit + 1) * unit
            kind = rng.randrange(8)
            if kind <= 2:
                data = rng.randbytes(length)
                h.pwrite(data, offset, libnbd().CMD_FLAG_FUA if rng.random() < 0.2 else 0)
                model[offset:offset + length] = data
            elif kind == 3:
                h.zero(length, offset, rng.choice((0, libnbd().CMD_FLAG_NO_HOLE)))
                model[offset:offset + length] = bytes(length)
            elif kind == 4 and rng.random() < 0.3:
                h.trim(length, offset)  # undefined until it is written
                h.zero(length, offset)
                model[offset:offset + length] = bytes(length)
            elif kind == 5 and rng.random() < 0.3:
                h.flush()
                h.cache(length, offset)
            elif kind == 6:
                entries = []
                h.block_status(length, offset, lambda _, at, found, error: entries.extend(found) or 0)
                at = offset
                for extent, flags in zip(entries[::2], entries[1::2]):
                    part = model[at:at + extent]
                    if flags & 2:
                        self.assertEqual(part.count(0), len(part), f"extent at {at}")
                    at += extent
            else:
                self.assertEqual(h.pread(length, offset), bytes(model[offset:offset + length]), f"operation {number}")
        h.flush()
        self.assertEqual(h.pread(size, 0), bytes(model))
        return bytes(model)
