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
from gantry_test import GANTRYD, GIB, KIB, MIB, Case, require_gantry, wait_for
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
        wait_for(lambda: os.path.exists(path), "the socket")
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


class Monitor(Case):
    def test_a_monitor_that_sends_without_pause_does_not_keep_others_waiting(self):
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
