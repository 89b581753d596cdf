#!/usr/bin/env python3
"""Clients of the NBD server and of the monitor that choose the worst moment: at the end, at a removal, without pause."""

import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test
import nbd_raw as nbd
from gantry_test import GANTRYD, KIB, MIB, Case, listening, require_gantry, wait_for
from nbd_raw import Raw


def command(name, /, **arguments):
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    return json.dumps({"execute": name, "arguments": arguments} if arguments else {"execute": name})


class Flood(threading.Thread):
    """Sends `data` without pause until the connection ends, and reads what comes."""

    def __init__(self, connection, data, read=True):
        super().__init__()
        self.connection, self.data, self.answered = connection, data, 0
        self.connection.settimeout(None)
        self.reader = threading.Thread(target=self.read) if read else None
        self.start()

    def run(self):
        if self.reader:
            self.reader.start()
        try:
            while True:
                self.connection.sendall(self.data)
        except OSError:
            pass
        if self.reader:
            self.reader.join()

    def read(self):
        try:
            while data := self.connection.recv(1 << 16):
                self.answered += len(data)
        except OSError:
            pass

    def end(self):
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.join()


class End(Case):
    def test_commands_behind_quit_change_nothing(self):
        require_gantry()
        image = self.raw_image("disk.raw", MIB)
        server = self.daemon()
        adds = (command("blockdev-add", driver="file", node_name=f"n{i}", filename=image, read_only=True) for i in range(20))
        server.qmp.send(command("quit") + "".join(adds))
        self.assertEqual(server.wait(), 0, server.stderr())

    def test_other_monitors_add_exports_and_servers_during_the_end(self):
        require_gantry()
        image = self.raw_image("disk.raw", MIB)
        for round in range(2):
            server = self.daemon("--blockdev", f"driver=file,node-name=disk,filename={image}")
            path = self.start_nbd(server.qmp)
            server.qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "writable": True})
            for i in range(6):
                client = Raw(path)
                self.addCleanup(client.close)
                if i % 2:
                    client.enter("disk")
                    client.send(nbd.request(nbd.WRITE, 0, 64 * KIB, data=bytes(64 * KIB)) * 3)
            start = command("nbd-server-start", addr={"type": "unix", "data": {"path": self.path("other.sock")}})
            floods = []
            for i in range(4):
                add = command("block-export-add", type="nbd", id=f"x{i}", node_name="disk", name=f"x{i}")
                floods.append(Flood(server.monitor().socket, (start + add if i else start).encode()))
            wait_for(lambda: all(flood.answered for flood in floods), "answers to every monitor")
            server.process.send_signal(signal.SIGTERM)
            try:
                self.assertEqual(server.wait(), 0, server.stderr())
            finally:
                for flood in floods:
                    flood.end()

    def test_a_signal_ends_the_wait_for_a_first_client(self):
        require_gantry("the reference waits on")
        path = self.path("wait.sock")
        process = subprocess.Popen([GANTRYD, "--chardev", f"socket,id=q,path={path},server=on", "--monitor", "chardev=q"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.kill)
        wait_for(lambda: listening(path), "the socket")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 0)
        self.assertFalse(os.path.exists(path))

    def test_a_socket_put_in_place_of_ours_stays(self):
        require_gantry("the reference removes it")
        server = self.daemon()
        nbd_path = self.start_nbd(server.qmp)
        others = []
        for path in (server.qmp_path, nbd_path):
            os.unlink(path)
            others.append(socket.socket(socket.AF_UNIX))
            others[-1].bind(path)
        server.stop()
        for other in others:
            self.assertTrue(os.path.exists(other.getsockname()))
            other.close()


class Removal(Case):
    def fragmented(self, extents):
        """Data and holes of 4 KiB in turn."""
        path = self.path("fragmented.raw")
        with open(path, "wb") as file:
            file.truncate(extents * 4 * KIB)
            for i in range(0, extents, 2):
                file.seek(i * 4 * KIB)
                file.write(b"x" * 4 * KIB)
        return path, extents * 4 * KIB

    def test_a_removal_does_not_wait_for_all_block_status_of_a_client(self):
        require_gantry("the reference ends it later or not at all")
        image, size = self.fragmented(40000)
        server = self.daemon("--blockdev", f"driver=file,node-name=disk,filename={image}")
        path = self.start_nbd(server.qmp)
        for mode in ("cut", "gone"):
            server.qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk"})
            client = Raw(path)
            client.enter("disk", structured=True, status=True)
            begin = time.monotonic()
            self.assertEqual(len(client.status(0, size)), 40000)
            once = time.monotonic() - begin
            client.send(b"".join(nbd.request(nbd.BLOCK_STATUS, 0, size, cookie=i) for i in range(200)))
            if mode == "gone":
                client.close()
            begin = time.monotonic()
            server.qmp.cmd("block-export-del", {"id": "e", "mode": "hard"})
            server.qmp.event("BLOCK_EXPORT_DELETED", id="e")
            self.assertLess(time.monotonic() - begin, 10 * once + 1)
            client.close()

    def test_removal_and_stop_at_every_byte_of_a_conversation(self):
        require_gantry("the reference hangs in nbd-server-stop")
        image = self.raw_image("disk.raw", MIB)
        server = self.daemon("--blockdev", f"driver=file,node-name=disk,filename={image}")
        flags = struct.pack(">I", 3)
        go = nbd.info("e", 3)
        go = struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_GO, len(go)) + go
        write = nbd.request(nbd.WRITE, 4096, 100000, data=b"w" * 100000)
        talk = flags + go + nbd.request(nbd.READ, 0, 65536) + write
        marks = [0, 1, 4, 5, 12, 20, 28, len(flags + go) - 1, len(flags + go), len(flags + go) + 27, len(flags + go) + 28,
                 len(talk) - 100001, len(talk) - 100000, len(talk) - 60000, len(talk) - 1, len(talk)]
        for mark in marks:
            path = self.start_nbd(server.qmp)
            server.qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "name": "e", "writable": True})
            clients = [Raw(path) for _ in range(3)]
            for client in clients:
                client.send(talk[:mark])
            if mark % 2:
                server.qmp.cmd("block-export-del", {"id": "e", "mode": "hard"})
                server.qmp.event("BLOCK_EXPORT_DELETED", id="e")
                server.qmp.cmd("nbd-server-stop")
            else:
                server.qmp.cmd("nbd-server-stop")
                server.qmp.event("BLOCK_EXPORT_DELETED", id="e")
            for client in clients:
                self.assertTrue(client.ends())
                client.close()
        server.qmp.cmd("blockdev-del", {"node-name": "disk"})
        with open(image, "rb") as file:
            data = file.read()
        self.assertIn(data[4096:104096], (bytes(100000), b"w" * 100000))

    def test_removal_and_stop_while_reopens_run(self):
        require_gantry("the reference hangs in nbd-server-stop")
        image = self.raw_image("disk.raw", MIB)
        server = self.daemon("--blockdev", f"driver=file,node-name=disk,filename={image}")
        other = server.monitor()
        other.socket.settimeout(60)
        options = {"driver": "file", "node-name": "disk", "filename": image}
        for i in range(15):
            path = self.start_nbd(server.qmp)
            server.qmp.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "name": "e", "writable": True})
            clients = [Raw(path) for _ in range(3)]
            for client in clients:
                client.enter("e")
                client.send(nbd.request(nbd.WRITE, 0, 200000, data=b"w" * 200000) * 4 + nbd.request(nbd.WRITE, 0, 5000, data=b"half"))
            other.send(command("blockdev-reopen", options=[{**options, "detect-zeroes": ("off", "on")[i % 2]}]) * 4)
            server.qmp.cmd("nbd-server-stop")
            server.qmp.event("BLOCK_EXPORT_DELETED", id="e")
            for _ in range(4):
                self.assertEqual(other.reply(), {"return": {}})
            for client in clients:
                self.assertTrue(client.ends())
                client.close()


class Monitor(Case):
    def test_a_monitor_that_sends_without_pause_does_not_keep_others_waiting(self):
        require_gantry("the reference lets it")
        for data in (b" " * 65536, b'{"exec-oob":"query-version"}' * 2000, b"]" * 65536):
            server = self.daemon()
            flood = Flood(server.monitor(enable=["oob"]).socket, data)
            begin = time.monotonic()
            for _ in range(20):
                server.qmp.cmd("query-version")
            self.assertLess(time.monotonic() - begin, 5)
            flood.end()
            server.stop()

    def test_out_of_band_answers_that_nobody_reads_are_bounded(self):
        require_gantry("the reference keeps them all")
        server = self.daemon()
        client = server.monitor(enable=["oob"]).socket
        client.settimeout(0.3)
        with self.assertRaises(TimeoutError):  # it is no longer read from
            for _ in range(4000):
                client.sendall(b'{"exec-oob":"query-version"}' * 2000)
        with open(f"/proc/{server.process.pid}/status") as status:
            (size,) = [int(line.split()[1]) for line in status if line.startswith("VmRSS")]
        self.assertLess(size, 200_000)
        server.qmp.cmd("query-version")
        client.close()


if __name__ == "__main__":
    gantry_test.main()
