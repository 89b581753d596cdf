#!/usr/bin/python3
"""gantryd's command line: options and their order, exact error lines, --daemonize, --pidfile, and what every end leaves behind."""

import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

PROGRAM = os.path.basename(gt.GANTRYD)
NULL = ["--blockdev", "null-co,node-name=n,read-zeroes=on"]


class Options(gt.Case):
    def refused(self, options, text):
        """Exit status 1 and exactly one line on stderr (after a semicolon, a hint may follow)."""
        done = self.run_daemon(*options)
        self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
        lines = done.stderr.splitlines()
        self.assertEqual(len(lines), 1, done.stderr)
        found = lines[0].split("; ")[0] if gt.IS_GANTRY else lines[0]
        self.assertEqual(found.replace(gt.GANTRYD, PROGRAM), f"{PROGRAM}: {text}")

    def test_error_lines(self):
        dup = ["--object", "iothread,id=t", "--object", "iothread,id=t"]
        for options, text in [
            (["--bogus"], "unrecognized option '--bogus'"),
            (["--bogus=1"], "unrecognized option '--bogus=1'"),
            (["stray"], "stray: Unexpected argument"),
            (["--blockdev"], "option '--blockdev' requires an argument"),
            (["--daemonize=1"], "option '--daemonize' doesn't allow an argument"),
            (["--blockdev", "xyz,node-name=n"], "--blockdev xyz,node-name=n: Parameter 'driver' does not accept value 'xyz'"),
            (["--blockdev", "null-co,bogus=1,node-name=n"],
             "--blockdev null-co,bogus=1,node-name=n: Parameter 'bogus' is unexpected"),
            (["--blockdev", '{"driver":"null-co"'], '--blockdev {"driver":"null-co": JSON parse error, premature EOI'),
            (["--blockdev", '{"driver":"null-co","node-name":"n","size":"1"}'],
             '--blockdev {"driver":"null-co","node-name":"n","size":"1"}: '
             "Invalid parameter type for 'size', expected: integer"),
            (["--blockdev", "null-co,node-name=n,size=1M"],
             "--blockdev null-co,node-name=n,size=1M: Parameter 'size' expects integer"),
            (["--blockdev", "null-co,node-name=n,read-only=maybe"],
             "--blockdev null-co,node-name=n,read-only=maybe: Parameter 'read-only' expects 'on' or 'off'"),
            (["--blockdev", "null-co,foo,node-name=n"],
             "--blockdev null-co,foo,node-name=n: Expected '=' after parameter 'foo'"),
            (["--blockdev", "null-co,children.1=x"], "--blockdev null-co,children.1=x: Parameter 'children.0' missing"),
            (["--blockdev", "null-co"], "--blockdev null-co: 'node-name' must be specified for the root node"),
            (["--blockdev", "raw,node-name=n,file=zz"],
             "--blockdev raw,node-name=n,file=zz: Cannot find device='zz' nor node-name='zz'"),
            (["--nbd-server", "addr.type=unix"], "--nbd-server addr.type=unix: Parameter 'addr.path' is missing"),
            (["--object", "iothread"], "--object iothread: Parameter 'id' is missing"),
            (dup, "--object iothread,id=t: attempt to add duplicate property 't' to object (type 'container')"),
            (["--object", "bogus,id=t"], "--object bogus,id=t: Parameter 'qom-type' does not accept value 'bogus'"),
            (["--chardev", "bogus,id=c"], "--chardev bogus,id=c: 'bogus' is not a valid char driver name"),
            (["--chardev", "stdio"], "--chardev stdio: chardev: no id specified"),
            (["--monitor", "zz"], '--monitor zz: chardev "zz" not found'),
            (["--trace", "bogus=1"], "--trace bogus=1: Invalid parameter 'bogus'"),
            (["--daemonize", "--chardev", "stdio,id=c"], "--chardev stdio,id=c: cannot use stdio with -daemonize"),
        ]:
            with self.subTest(options):
                self.refused(options, text)

    def test_monitors(self):
        chardev = ["--chardev", f"socket,id=c,path={self.path('c')},server=on,wait=off"]
        self.refused([*chardev, "--monitor", "chardev=c,mode=readline"],
                     "--monitor chardev=c,mode=readline: Only QMP is supported")
        self.refused([*chardev, "--monitor", "c", "--monitor", "c"], "--monitor c: Device 'c' is in use")
        self.refused([*chardev, *chardev], f"--chardev {chardev[1]}: Chardev with id 'c' already exists"
                     if gt.IS_GANTRY else f"--chardev {chardev[1]}: duplicate yank instance")
        self.assertFalse(gt.IS_GANTRY and os.path.exists(self.path("c")))

    def test_options_are_taken_in_order(self):
        nbd = ["--nbd-server", f"addr.type=unix,addr.path={self.path('nbd')}"]
        export = ["--export", "type=nbd,id=e,node-name=n"]
        self.refused([*nbd, *export, *NULL],
                     "--export type=nbd,id=e,node-name=n: Cannot find device='' nor node-name='n'")
        self.assertFalse(gt.IS_GANTRY and os.path.exists(self.path("nbd")))
        self.refused([*NULL, *export, *nbd], "--export type=nbd,id=e,node-name=n: NBD server not running")
        self.refused([*NULL, *nbd, *export[:1], export[1] + ",iothread=t", "--object", "iothread,id=t"],
                     '--export type=nbd,id=e,node-name=n,iothread=t: iothread "t" not found')

    def test_help_and_version_act_when_met(self):
        for option in ("--help", "-h", "--version", "-V"):
            for before in ([], ["--blockdev", "bogus"]):
                done = self.run_daemon(*before, option)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertTrue(done.stdout)
        self.assertIn("--blockdev", self.run_daemon("--help").stdout)
        self.assertEqual(self.run_daemon("--bogus", "--help").returncode, 1)

    def test_help_of_values(self):
        done = self.run_daemon("--object", "help")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"(?m)^\s*iothread\b")
        done = self.run_daemon("--object", "iothread,help")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"(?m)^\s*poll-max-ns=<int>")
        done = self.run_daemon("--chardev", "help")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"(?m)^\s*socket\b")

    def test_settings_of_our_own(self):
        gt.require_gantry()
        for options, text in [
            (["--io-backend", "bogus"], "--io-backend bogus: "),
            (["--io-loops", "-1"], "--io-loops -1: '-1' is no number of threads from 0 to 256"),
            (["--io-loops", "257"], "--io-loops 257: '257' is no number of threads from 0 to 256"),
            (["--log-level", "loud"], "--log-level loud: 'loud' is no log level; use error, warn, info or debug"),
        ]:
            done = self.run_daemon(*options)
            self.assertEqual(done.returncode, 1)
            self.assertTrue(done.stderr.startswith(f"{PROGRAM}: {text}"), done.stderr)
            self.assertEqual(done.stderr.count("\n"), 1)
        daemon = self.daemon("--log-level", "info")
        self.assertIn("I/O back end: ", daemon.stderr())

    def test_dotted_and_json_values_mean_the_same(self):
        image = self.raw_image("a,b.raw", gt.MIB)
        file = f"file,node-name=f1,cache.no-flush=yes,read-only=off,filename={image.replace(',', ',,')}"
        daemon = self.daemon(
            "--blockdev", file, "--blockdev", "raw,node-name=r1,size=4096,size=65536,offset=512,file=f1",
            "--blockdev=null-co,node-name=n1,read-zeroes=true,size=512",
            "--blockdev", "driver=raw,node-name=w1,file.driver=null-co,file.size=1024,file.node-name=i1")
        dotted = daemon.qmp.cmd("query-named-block-nodes")
        daemon.stop()
        daemon = self.daemon("--blockdev", json.dumps({"driver": "file", "node-name": "f1", "cache": {"no-flush": True},
                                                       "read-only": False, "filename": image}),
                             "--blockdev", '{"driver": "raw", "node-name": "r1", "size": 65536, "offset": 512, "file": "f1"}',
                             "--blockdev", "{'driver': 'null-co', 'node-name': 'n1', 'read-zeroes': true, 'size': 512}",
                             "--blockdev", '{"driver": "raw", "node-name": "w1", "file": {"driver": "null-co", "size": 1024, '
                                           '"node-name": "i1"}}')
        self.assertEqual(daemon.qmp.cmd("query-named-block-nodes"), dotted)
        sizes = {node["node-name"]: node["image"]["virtual-size"] for node in dotted}
        self.assertEqual(sizes, {"f1": gt.MIB, "r1": 65536, "n1": 512, "w1": 1024, "i1": 1024})

    def test_no_options_at_all(self):
        daemon = self.daemon(monitor=False)
        gt.wait_for(lambda: self.catches(daemon.process.pid, signal.SIGTERM), "the daemon to take signals")
        daemon.stop()

    def catches(self, pid, number):
        """The process handles or blocks the signal (it is past its first lines)."""
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigCgt", "SigBlk"))]
        return any(mask >> (number - 1) & 1 for mask in masks) and pathlib.Path(f"/proc/{pid}/comm").read_text() != "python3\n"

    def test_old_short_forms_of_chardev(self):
        path = self.path("short.sock")
        daemon = self.daemon("--chardev", f"socket,id=s,path={path},server,nowait", "--monitor", "s")
        self.assertIn("qemu", gt.Qmp(path).cmd("query-version"))
        self.assertIn("short-form boolean option 'server' deprecated", daemon.stderr())


class Ends(gt.Case):
    """However it ends, no socket and no pid file stay, and the status is 0."""

    def start(self, *more):
        self.pid_path, self.nbd_path = self.path("pid"), self.path("nbd")
        daemon = self.daemon(*NULL, "--nbd-server", f"addr.type=unix,addr.path={self.nbd_path}",
                             "--export", "nbd,id=e,node-name=n,writable=on", "--pidfile", self.pid_path, *more)
        gt.wait_for(lambda: os.path.exists(self.pid_path) and os.path.getsize(self.pid_path), "the pid file")
        self.assertEqual(pathlib.Path(self.pid_path).read_text(), f"{daemon.process.pid}\n")
        return daemon

    def nothing_left(self, daemon):
        self.assertEqual(daemon.wait(), 0, daemon.stderr())
        self.assertLessEqual(set(os.listdir(self.dir)), set() if gt.IS_GANTRY else {"nbd"})  # which the reference leaves behind

    def test_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number):
                daemon = self.start()
                daemon.process.send_signal(number)
                self.nothing_left(daemon)
                if os.path.exists(self.nbd_path):
                    os.unlink(self.nbd_path)

    def test_signal_with_clients(self):
        nbd = gt.libnbd()
        daemon = self.start()
        clients = [nbd.NBD() for _ in range(4)]
        for client in clients:
            client.connect_uri(self.uri(self.nbd_path, "n"))
            client.pwrite(b"x" * 4096, 0)
        half = socket.socket(socket.AF_UNIX)  # in the middle of the handshake
        half.connect(self.nbd_path)
        daemon.process.send_signal(signal.SIGTERM)
        self.nothing_left(daemon)
        with self.assertRaises(nbd.Error):
            for _ in range(2):
                clients[0].pread(512, 0)
        half.close()

    def test_quit(self):
        daemon = self.start()
        daemon.qmp.cmd("quit")
        self.nothing_left(daemon)

    def test_acknowledged_writes_are_in_the_file(self):
        nbd = gt.libnbd()
        image = self.raw_image("a.raw", gt.MIB)
        daemon = self.daemon("--blockdev", f"file,node-name=f,filename={image}", "--blockdev", "raw,node-name=r,file=f",
                             "--nbd-server", f"addr.type=unix,addr.path={self.path('nbd')}",
                             "--export", "nbd,id=e,node-name=r,writable=on")
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("nbd"), "r"))
        for i in range(16):
            client.pwrite(bytes([i + 1]) * 65536, i * 65536)
        daemon.stop()
        with open(image, "rb") as file:
            self.assertEqual(file.read(), b"".join(bytes([i + 1]) * 65536 for i in range(16)))

    def test_a_failed_start_leaves_nothing(self):
        done = self.run_daemon(*NULL, "--nbd-server", f"addr.type=unix,addr.path={self.path('nbd')}", "--chardev",
                               f"socket,id=c,path={self.path('c')},server=on,wait=off", "--monitor", "c", "--pidfile",
                               self.path("pid"), "--export", "nbd,id=e,node-name=zz")
        self.assertEqual(done.returncode, 1)
        self.assertLessEqual(set(os.listdir(self.dir)), set() if gt.IS_GANTRY else {"nbd", "c"})

    def test_sockets(self):
        gt.require_gantry("the reference opens its sockets to everybody")
        daemon = self.daemon(*NULL, "--control-socket", self.path("ctl"))
        self.assertEqual(stat.S_IMODE(os.stat(self.path("ctl")).st_mode), 0o600)
        self.assertEqual(stat.S_IMODE(os.stat(daemon.qmp_path).st_mode), 0o600)
        self.assertIn("qemu", gt.Qmp(self.path("ctl")).cmd("query-version"))
        # A socket somebody serves is not taken away; one that nobody serves any more is replaced.
        done = self.run_daemon("--control-socket", self.path("ctl"))
        self.assertEqual(done.returncode, 1)
        self.assertIn(self.path("ctl"), done.stderr)
        self.assertIn("qemu", gt.Qmp(self.path("ctl")).cmd("query-version"))
        daemon.kill()
        self.assertTrue(os.path.exists(self.path("ctl")))
        self.daemon("--control-socket", self.path("ctl"))
        self.assertIn("qemu", gt.Qmp(self.path("ctl")).cmd("query-version"))

    def test_a_killed_daemon_starts_again_at_once(self):
        image = self.raw_image("a.raw", gt.MIB)
        for _ in range(20):
            daemon = self.daemon("--blockdev", f"raw,node-name=r,file.driver=file,file.filename={image}", "--nbd-server",
                                 f"addr.type=unix,addr.path={self.path('nbd')}", "--export", "nbd,id=e,node-name=r,writable=on",
                                 "--pidfile", self.path("pid"))
            daemon.kill()

    def test_a_file_in_the_place_of_a_socket_stays(self):
        gt.require_gantry()
        precious = self.raw_image("precious", 4096, gt.text_block)
        before = gt.checksum(precious)
        for options in (["--nbd-server", f"addr.type=unix,addr.path={precious}"], ["--control-socket", precious],
                        ["--chardev", f"socket,id=c,path={precious},server=on,wait=off", "--monitor", "c"]):
            self.assertEqual(self.run_daemon(*options).returncode, 1)
            self.assertEqual(gt.checksum(precious), before)


class Background(gt.Case):
    def end(self, pid):
        """Ends a daemon that is not our child."""
        def gone():
            try:
                return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
            except OSError:
                return True
        if not gone():
            os.kill(pid, signal.SIGTERM)
        gt.wait_for(gone, f"the end of process {pid}")

    def test_daemonize(self):
        pid_path, nbd_path = self.path("pid"), self.path("nbd")
        done = self.run_daemon(*gt.gantryd_options(), *NULL, "--daemonize", "--pidfile", pid_path, "--nbd-server",
                               f"addr.type=unix,addr.path={nbd_path}", "--export", "nbd,id=e,node-name=n", "--chardev",
                               f"socket,id=c,path={self.path('qmp')},server=on,wait=off", "--monitor", "c")
        # The parent is back: everything is up, and its stdout and stderr were closed.
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        pid = int(pathlib.Path(pid_path).read_text())
        self.addCleanup(self.end, pid)
        gt.require("nbdinfo")
        self.assertEqual(self.run_tool("nbdinfo", "--size", self.uri(nbd_path, "n")).stdout, f"{gt.GIB}\n")
        q = gt.Qmp(self.path("qmp"))
        self.assertEqual([export["id"] for export in q.cmd("query-block-exports")], ["e"])
        q.cmd("quit")
        gt.wait_for(lambda: not os.path.exists(pid_path), "the pid file to go")

    def test_a_start_that_fails_in_the_background_is_reported(self):
        done = self.run_daemon("--daemonize", "--pidfile", self.path("pid"), "--blockdev", "raw,node-name=r,file=zz")
        self.assertEqual(done.returncode, 1)
        self.assertIn("Cannot find device='zz' nor node-name='zz'", done.stderr)
        self.assertFalse(os.path.exists(self.path("pid")))

    def test_pid_file_is_locked(self):
        pid_path = self.path("pid")
        daemon = self.daemon("--pidfile", pid_path)
        text = pathlib.Path(pid_path).read_text()
        done = self.run_daemon("--pidfile", pid_path)
        self.assertEqual((done.returncode, done.stderr.splitlines()), (1, [
            f"{PROGRAM}: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable"]))
        self.assertEqual(pathlib.Path(pid_path).read_text(), text)  # and left alone
        daemon.kill()
        self.assertTrue(os.path.exists(pid_path))
        daemon = self.daemon("--pidfile", pid_path)  # a stale one is taken over
        self.assertEqual(pathlib.Path(pid_path).read_text(), f"{daemon.process.pid}\n")
        daemon.stop()
        self.assertFalse(os.path.exists(pid_path))

    def test_pid_file_that_cannot_be_made(self):
        done = self.run_daemon("--pidfile", self.path("no/pid"))
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, f"^{PROGRAM}: cannot create PID file: .*No such file or directory")

    def test_stdio_monitor(self):
        done = subprocess.run([gt.GANTRYD, *gt.gantryd_options(), "--chardev", "stdio,id=c", "--monitor", "c"],
                              input='{"execute": "qmp_capabilities"}{"execute": "query-version", "id": 1}{"execute": "quit"}',
                              capture_output=True, text=True, timeout=gt.DEADLINE)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertIn("QMP", lines[0])
        self.assertEqual([line.get("id") for line in lines[1:]], [None, 1, None])

    def test_a_monitor_that_waits_for_its_first_client(self):
        path = self.path("first")
        with open(self.path("err"), "wb") as err:
            process = subprocess.Popen([gt.GANTRYD, *gt.gantryd_options(), "--chardev", f"socket,id=c,path={path},server=on",
                                        "--monitor", "c", "--pidfile", self.path("pid")], stderr=err, stdout=err)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        gt.wait_for(lambda: gt.listening(path), "the socket")
        self.assertFalse(os.path.exists(self.path("pid")))
        q = gt.wait_for(lambda: self.connect(path), "a connection")
        self.assertTrue(os.path.exists(self.path("pid")) or not gt.IS_GANTRY)
        q.cmd("quit")
        self.assertEqual(process.wait(gt.DEADLINE), 0)

    def connect(self, path):
        try:
            return gt.Qmp(path)
        except ConnectionRefusedError:
            return None


if __name__ == "__main__":
    gt.main()
