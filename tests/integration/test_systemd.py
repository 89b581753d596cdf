#!/usr/bin/python3
"""gantryd as a service, against a fake service manager: notifications, passed sockets, the watchdog, the unit file."""

import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt


class Manager:
    """What a service manager does for Type=notify: NOTIFY_SOCKET, LISTEN_FDS, WATCHDOG_USEC; collects the messages."""

    def __init__(self, directory, *arguments, sockets=(), watchdog=None, abstract=False, environment=None):
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"@gantry-test-{os.getpid()}-{time.monotonic_ns()}" if abstract else os.path.join(directory, "notify")
        self.notify.bind(name.replace("@", "\0", 1) if abstract else name)
        self.notify.settimeout(gt.DEADLINE)
        self.messages = []  # dictionaries, in order
        self.stderr = open(os.path.join(directory, "stderr"), "w+b")
        settings = {**os.environ, "NOTIFY_SOCKET": name, **(environment or {})}
        if watchdog:
            settings["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        descriptors = [listener.fileno() for _, listener in sockets]
        settings["LISTEN_FDS"] = str(len(sockets))
        settings["LISTEN_FDNAMES"] = ":".join(name for name, _ in sockets)
        # LISTEN_PID is the pid of the daemon: a shell sets it and becomes the daemon. The sockets arrive as 3, 4, ...
        moves = " ".join(f"{100 + i}<&{fd}" for i, fd in enumerate(descriptors))
        final = " ".join(f"{3 + i}<&{100 + i} {100 + i}<&-" for i in range(len(descriptors)))
        script = f'exec {moves}\nexport LISTEN_PID=$$\n' if sockets else "unset LISTEN_FDS LISTEN_FDNAMES\n"
        if sockets:
            script += "export WATCHDOG_PID=$$\n" if watchdog else ""
            script += f'exec "$0" "$@" {final}'
        else:
            script += 'exec "$0" "$@"'
        self.process = subprocess.Popen(["bash", "-c", script, gt.GANTRYD, *gt.gantryd_options(), *arguments], env=settings,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.stderr,
                                        pass_fds=descriptors)

    def receive(self, deadline=gt.DEADLINE):
        self.notify.settimeout(deadline)
        message = dict(line.split("=", 1) for line in self.notify.recv(65536).decode().splitlines())
        message["at"] = time.monotonic()
        self.messages.append(message)
        return message

    def wait_for(self, key, value=None):
        """The next message with that key (and a value that matches)."""
        while True:
            message = self.receive()
            if key in message and (value is None or re.search(value, message[key])):
                return message

    def errors(self):
        self.stderr.flush()
        return os.pread(self.stderr.fileno(), 1 << 20, 0).decode(errors="replace")

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        status = self.process.wait(gt.DEADLINE)
        assert status == 0, self.errors()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.notify.close()
        self.stderr.close()


class Service(gt.Case):
    def setUp(self):
        super().setUp()
        gt.require_gantry()
        gt.require("bash", "nbdinfo")

    def manager(self, *arguments, **options):
        manager = Manager(self.dir, *arguments, **options)
        self.addCleanup(manager.close)
        return manager

    def listener(self, name):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path(name))
        listener.listen()
        self.addCleanup(listener.close)
        return listener

    def exports(self, count=2, address=None):
        address = address or f"addr.type=unix,addr.path={self.path('nbd')}"
        words = ["--blockdev", "null-co,node-name=n,read-zeroes=on", "--nbd-server", address]
        for i in range(count):
            words += ["--export", f"nbd,id=e{i},node-name=n,name=e{i},writable=on"]
        return words

    def size(self, export):
        return self.run_tool("nbdinfo", "--size", self.uri(self.path("nbd"), export)).stdout

    def test_ready_means_that_exports_answer(self):
        for abstract in (False, True):
            manager = self.manager(*self.exports(), abstract=abstract)
            first = manager.receive()
            self.assertEqual(first.get("READY"), "1")
            self.assertEqual(first["STATUS"], "2 exports")
            self.assertEqual(self.size("e0"), f"{gt.GIB}\n")  # at once, no second attempt
            self.assertEqual(self.size("e1"), f"{gt.GIB}\n")
            manager.stop()
            if not abstract:
                os.unlink(self.path("notify"))

    def test_nobody_is_let_in_before_everything_is_there(self):
        """Who is in the queue of a passed socket already finds the last of many exports and every option done."""
        nbd, qmp = self.listener("nbd"), self.listener("qmp")
        clients = []
        for path in ("nbd", "qmp") * 4:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(gt.DEADLINE)
            client.connect(self.path(path))
            self.addCleanup(client.close)
            if path == "nbd":  # fixed newstyle, NBD_OPT_INFO of the last export
                name = b"e99"
                client.sendall(b"\0\0\0\3" + struct.pack(">8sIII", b"IHAVEOPT", 6, 4 + len(name) + 2, len(name)) + name + b"\0\0")
            else:
                client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-block-exports"}')
            clients.append((path, client))
        words = ["--control-socket", "auto", *self.exports(100, address="addr.type=fd,addr.str=nbd")]
        for i in range(20):  # opening files takes the daemon turns of its loop, in which it could greet clients
            words[-2:-2] = ["--blockdev", f"file,node-name=f{i},filename={self.raw_image(f'{i}.raw', gt.MIB)}"]
        manager = self.manager(*words, sockets=[("nbd", nbd), ("qmp", qmp)])
        for path, client in clients:
            data = b""
            while len(data) < (38 if path == "nbd" else 100 * 50):
                data += client.recv(1 << 20)
            if path == "nbd":
                self.assertEqual(struct.unpack(">QII", data[18:34]), (0x3e889045565a9, 6, 3))  # NBD_REP_INFO, no error
            else:
                self.assertIn(b'"e99"', data)
        manager.stop()

    def test_status_follows_the_exports(self):
        manager = self.manager(*self.exports(), "--control-socket", self.path("ctl"))
        manager.wait_for("READY")
        q = gt.Qmp(self.path("ctl"))
        q.cmd("block-export-del", id="e1")
        manager.wait_for("STATUS", "^1 exports?, 0 NBD clients?, 1 monitors?$")
        client = gt.libnbd().NBD()
        client.connect_uri(self.uri(self.path("nbd"), "e0"))
        manager.wait_for("STATUS", "^1 exports?, 1 NBD clients?, 1 monitors?$")
        times = [message["at"] for message in manager.messages if "STATUS" in message and "READY" not in message]
        self.assertTrue(all(b - a > 0.5 for a, b in zip(times, times[1:])), times)  # at most once a second
        client.shutdown()

    def test_stopping_is_said_before_the_end(self):
        for how in (signal.SIGTERM, signal.SIGINT, "quit"):
            manager = self.manager(*self.exports(), "--control-socket", self.path("ctl"))
            manager.wait_for("READY")
            if how == "quit":
                gt.Qmp(self.path("ctl")).cmd("quit")
            else:
                manager.process.send_signal(how)
            self.assertEqual(manager.wait_for("STOPPING")["STOPPING"], "1")
            self.assertEqual(manager.process.wait(gt.DEADLINE), 0)
            self.assertFalse(os.path.exists(self.path("nbd")))
            os.unlink(self.path("notify"))

    def test_a_failed_start_gives_the_errno(self):
        manager = self.manager("--blockdev", f"file,node-name=f,filename={self.path('none')}")
        message = manager.receive()
        self.assertEqual(message.get("ERRNO"), "2")
        self.assertEqual(manager.process.wait(gt.DEADLINE), 1)
        self.assertFalse(any("READY" in message for message in manager.messages))

    # --- passed sockets

    def test_passed_sockets(self):
        nbd, qmp = self.listener("nbd"), self.listener("qmp")
        manager = self.manager("--control-socket", "auto", *self.exports(address="addr.type=fd,addr.str=nbd"),
                               sockets=[("qmp", qmp), ("nbd", nbd)])
        manager.wait_for("READY")
        self.assertEqual(self.size("e0"), f"{gt.GIB}\n")
        q = gt.Qmp(self.path("qmp"))
        self.assertEqual(len(q.cmd("query-block-exports")), 2)
        q.cmd("nbd-server-stop")
        self.assertTrue(os.path.exists(self.path("nbd")))  # it is the manager's
        q.cmd("nbd-server-start", addr={"type": "fd", "data": {"str": "nbd"}})
        q.cmd("block-export-add", type="nbd", id="again", node_name="n")
        self.assertEqual(self.size("n"), f"{gt.GIB}\n")
        manager.stop()
        for name in ("nbd", "qmp"):
            self.assertTrue(os.path.exists(self.path(name)))
        # Who connects meanwhile waits for the next start.
        waiting = socket.socket(socket.AF_UNIX)
        waiting.settimeout(gt.DEADLINE)
        waiting.connect(self.path("nbd"))
        os.unlink(self.path("notify"))
        manager = self.manager(*self.exports(address="addr.type=fd,addr.str=nbd"), sockets=[("nbd", nbd)])
        self.assertEqual(waiting.recv(8), b"NBDMAGIC")
        waiting.close()
        manager.stop()

    def test_a_passed_socket_nobody_uses_is_left_alone(self):
        manager = self.manager(*self.exports(), sockets=[("unused", self.listener("unused"))])
        manager.wait_for("READY")
        self.assertEqual(self.size("e0"), f"{gt.GIB}\n")
        manager.stop()
        self.assertTrue(os.path.exists(self.path("unused")))

    def test_passed_tcp_socket(self):
        tcp = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(tcp.close)
        manager = self.manager(*self.exports(address="addr.type=fd,addr.str=nbd"), sockets=[("nbd", tcp)])
        manager.wait_for("READY")
        uri = f"nbd://127.0.0.1:{tcp.getsockname()[1]}/e0"
        self.assertEqual(self.run_tool("nbdinfo", "--size", uri).stdout, f"{gt.GIB}\n")
        manager.stop()

    def test_chardev_on_a_passed_socket(self):
        manager = self.manager("--chardev", "socket,fd=control,server=on,wait=off,id=c", "--monitor", "c",
                               sockets=[("control", self.listener("qmp"))])
        manager.wait_for("READY")
        self.assertIn("qemu", gt.Qmp(self.path("qmp")).cmd("query-version"))
        manager.stop()
        self.assertTrue(os.path.exists(self.path("qmp")))

    def test_wrong_sockets(self):
        for address, text in (("addr.type=fd,addr.str=none", "'none' has not been found; passed sockets are: nbd"),
                              ("addr.type=fd,addr.str=datagram", "'datagram' has not been found")):
            datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            datagram.bind(self.path("datagram"))
            manager = self.manager("--nbd-server", address, sockets=[("nbd", self.listener("nbd")), ("datagram", datagram)])
            self.assertEqual(manager.process.wait(gt.DEADLINE), 1)
            self.assertIn(text, manager.errors())
            self.assertIn("'datagram') is not a stream socket", manager.errors())
            for name in ("nbd", "datagram", "notify"):
                os.unlink(self.path(name))
            datagram.close()

    def test_systemd_socket_activate(self):
        """The real thing: systemd's own tool passes the sockets."""
        gt.require("systemd-socket-activate")
        process = subprocess.Popen(["systemd-socket-activate", "-l", self.path("nbd"), "-l", self.path("qmp"),
                                    "--fdname=nbd:qmp", gt.GANTRYD, *gt.gantryd_options(), "--control-socket", "auto",
                                    *self.exports(address="addr.type=fd,addr.str=nbd")], stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        gt.wait_for(lambda: gt.listening(self.path("qmp")), "the sockets")
        self.assertEqual(self.size("e0"), f"{gt.GIB}\n")
        gt.Qmp(self.path("qmp")).cmd("quit")
        self.assertEqual(process.wait(gt.DEADLINE), 0)

    # --- watchdog

    def test_signs_of_life_under_load(self):
        interval = 0.5
        manager = self.manager(*self.exports(), watchdog=interval)
        manager.wait_for("READY")
        stop = threading.Event()

        def load():
            client = gt.libnbd().NBD()
            client.connect_uri(self.uri(self.path("nbd"), "e0"))
            while not stop.is_set():
                client.pread(gt.MIB, 0)
        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            pings = [manager.wait_for("WATCHDOG")["at"] for _ in range(8)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        # Every half interval; the manager would kill us after a whole one.
        self.assertTrue(all(b - a < 2 * interval for a, b in zip(pings, pings[1:])), pings)
        self.assertGreater(pings[-1] - pings[0], 7 * interval / 2 * 0.8)
        manager.stop()

    def test_no_watchdog_without_being_asked(self):
        manager = self.manager(*self.exports(), environment={"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"})
        manager.wait_for("READY")
        manager.wait_for("STATUS")  # a second's worth of messages
        manager.process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING")
        self.assertFalse(any("WATCHDOG" in message for message in manager.messages))

    # --- the unit

    def unit(self):
        """The unit file with the program's path replaced by one that exists here."""
        text = (gt.ROOT / "systemd" / "gantry@.service").read_text()
        program = re.search(r"^ExecStart=(\S+)", text, re.M)[1]
        path = self.path("gantry@.service")
        pathlib.Path(path).write_text(text.replace(program, shutil.which("true")))
        return path

    def test_unit_file(self):
        gt.require("systemd-analyze")
        done = self.run_tool("systemd-analyze", "verify", "--man=no", self.unit(), check=False,
                             env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})
        complaints = [line for line in done.stderr.splitlines() if "gantry@" in line]
        self.assertEqual(complaints, [], done.stderr)
        exposure = self.run_tool("systemd-analyze", "security", "--offline=true", "--threshold=30", self.unit(), check=False)
        if "unrecognized option" in exposure.stderr:
            gt.missing("systemd-analyze is too old for --offline", installable=False)
        self.assertEqual(exposure.returncode, 0, exposure.stdout[-500:])

    def test_options_of_the_unit_are_real(self):
        text = (gt.ROOT / "systemd" / "gantry@.service").read_text()
        known = self.run_daemon("--help").stdout
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)):
            self.assertIn(option, known)


if __name__ == "__main__":
    gt.main()
