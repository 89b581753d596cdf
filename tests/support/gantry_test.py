"""What every integration test needs: a daemon, a QMP client, a short temporary directory, waiting with deadlines.

Environment: GANTRY_BUILD (directory of gantryd and gantry; default build/debug), GANTRYD (another daemon with the same command
line, e.g. qemu-storage-daemon), GANTRY_TEST_IO_BACKEND and GANTRY_TEST_LOOPS (given to gantryd), GANTRY_CI (a tool that can be
installed must not be missing). A file whose tests were all skipped exits with 77.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("GANTRY_BUILD") or ROOT / "build" / "debug").resolve()
GANTRYD = os.environ.get("GANTRYD") or str(BUILD / "gantryd")
GANTRY = str(BUILD / "gantry")
IS_GANTRY = "GANTRYD" not in os.environ or os.path.basename(GANTRYD) == "gantryd"
IN_CI = bool(os.environ.get("GANTRY_CI"))
DEADLINE = 30.0  # seconds; generous, because sanitizers and busy machines are slow
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def gantryd_options():
    """The matrix: back end and number of I/O loops, for gantryd alone."""
    if not IS_GANTRY:
        return []
    options = []
    if os.environ.get("GANTRY_TEST_IO_BACKEND"):
        options += ["--io-backend", os.environ["GANTRY_TEST_IO_BACKEND"]]
    if os.environ.get("GANTRY_TEST_LOOPS"):
        options += ["--io-loops", os.environ["GANTRY_TEST_LOOPS"]]
    return options


def wait_for(condition, what, deadline=DEADLINE):
    """Returns the first true value of condition(); fails after `deadline` seconds. For what sends no event."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline:.0f} s for {what}")
        time.sleep(0.002)


def listening(path):
    """Whether somebody listens on the unix socket `path`; between bind(2) and listen(2) there is a file already. Bothers nobody."""
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        rows = [line.split(maxsplit=7) for line in table]
    return any(len(row) == 8 and row[7].rstrip("\n") == str(path) and int(row[3], 16) & 0x10000 for row in rows[1:])


def freeze(process):
    """Stops a process, for SIGCONT to wake it up. None of its threads answers anything when this returns: the signal itself
    only tells each of them to stop when it is next looked at."""
    process.send_signal(signal.SIGSTOP)

    def stopped():
        states = []
        for task in pathlib.Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has ended
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
        return set(states) == {"T"}
    wait_for(stopped, f"process {process.pid} to stop")


def missing(reason, installable=True):
    """Skips the test visibly; where everything can be installed, that is a failure."""
    if IN_CI and installable:
        raise AssertionError(f"missing in CI: {reason}")
    raise unittest.SkipTest(reason)


def require(*tools):
    for tool in tools:
        if not shutil.which(tool):
            missing(f"{tool} is not installed")


def require_gantry(why="tests what only gantryd does"):
    if not IS_GANTRY:
        missing(why, installable=False)


def libnbd():
    """The Python module of libnbd, imported where nothing of ours can stand in for it."""
    try:
        import nbd
        nbd.NBD  # a namespace package of that name is not it
        return nbd
    except (ImportError, AttributeError):
        missing("python3-libnbd is not installed")


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class QmpError(Exception):
    def __init__(self, error):
        super().__init__(f"{error['class']}: {error['desc']}")
        self.kind, self.desc = error["class"], error["desc"]


class Qmp:
    """One connection to a monitor. Messages of either kind stay in order; events are kept until asked for."""

    def __init__(self, path, negotiate=True, enable=None, connected=None):
        self.socket = connected or socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE)
        if not connected:
            self.socket.connect(str(path))
        self.decoder = json.JSONDecoder()
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 10000))  # replies may nest 1024 levels
        self.buffer = ""
        self.raw = b""  # everything ever received
        self.events = []
        self.next_id = 0
        self.greeting = self.receive()
        if negotiate:
            self.cmd("qmp_capabilities", {"enable": enable} if enable is not None else {})

    def close(self):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def receive(self):
        """The next message of any kind; None at the end of the connection."""
        while True:
            text = self.buffer.lstrip()
            with contextlib.suppress(json.JSONDecodeError):
                message, end = self.decoder.raw_decode(text)
                self.buffer = text[end:]
                return message
            try:
                data = self.socket.recv(1 << 20)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.raw += data
            self.buffer = text + data.decode("ascii")  # the server escapes everything else

    def reply(self):
        """The next reply; events that come before it are kept."""
        while True:
            message = self.receive()
            if message is None or "event" not in message:
                return message
            self.events.append(message)

    def ask(self, text):
        """Sends text as it is, returns the next reply."""
        self.send(text)
        return self.reply()

    def cmd(self, name, arguments=None, /, **more):
        """The value of "return"; raises QmpError. Keyword arguments: node_name means node-name."""
        arguments = {**(arguments or {}), **{key.replace("_", "-"): value for key, value in more.items()}}
        self.next_id += 1
        request = {"execute": name, "id": self.next_id}
        if arguments:
            request["arguments"] = arguments
        reply = self.ask(json.dumps(request))
        if reply is None:
            raise EOFError(f"the daemon closed the connection at {name}")
        assert reply.get("id") == self.next_id, reply
        if "error" in reply:
            raise QmpError(reply["error"])
        return reply["return"]

    def error(self, name, arguments=None, /, **more):
        """(class, desc) of a command that must fail."""
        try:
            value = self.cmd(name, arguments, **more)
        except QmpError as error:
            return error.kind, error.desc
        raise AssertionError(f"{name} {arguments or more} succeeded: {value}")

    def delete_export(self, export):
        """Removes an export whose clients have ended: the daemon may not have seen the last one go yet."""
        def deleted():
            try:
                self.cmd("block-export-del", id=export)
                return True
            except QmpError as error:
                if "still in use" not in error.desc:
                    raise
                return False
        wait_for(deleted, f"the clients of export {export} to be gone")
        self.event("BLOCK_EXPORT_DELETED", id=export)

    def event(self, name, /, **data):
        """Takes and returns the first event `name` with these data members, waiting for it if need be."""
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    self.events.remove(event)
                    return event
            message = self.receive()
            if message is None:
                raise AssertionError(f"the connection ended before {name} {data}")
            assert "event" in message, message
            self.events.append(message)


class Daemon:
    """A running daemon with a monitor on `qmp_path`. Its options are `arguments`; ready when the constructor returns."""

    def __init__(self, directory, *arguments, monitor=True, environment=None, extra=None, **popen):
        self.directory = directory
        self.qmp_path = os.path.join(directory, "qmp.sock")
        self.stderr_file = tempfile.TemporaryFile()
        self.killed = False
        command = [GANTRYD, *gantryd_options(), *arguments]
        if monitor:
            # Last, so that whoever is greeted finds everything set up.
            command += ["--chardev", f"socket,id=qmp,path={self.qmp_path},server=on,wait=off", "--monitor", "chardev=qmp"]
        command += extra or []
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.stderr_file,
                                        env={**os.environ, **(environment or {})}, **popen)
        if monitor:
            try:
                self.qmp = wait_for(self.connect, f"the monitor of {' '.join(command)}")
                self.qmp.cmd("qmp_capabilities")
            except BaseException:
                self.kill()
                raise

    def connect(self):
        """A connection to the monitor, once somebody greets (the socket of a killed predecessor may linger a moment)."""
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}: {self.stderr()}")
        attempt = socket.socket(socket.AF_UNIX)
        if attempt.connect_ex(self.qmp_path) == 0:
            qmp = Qmp(self.qmp_path, negotiate=False, connected=attempt)
            if qmp.greeting:
                return qmp
        attempt.close()
        return None

    def stderr(self):
        return os.pread(self.stderr_file.fileno(), 1 << 20, 0).decode(errors="replace")

    def monitor(self, **options):
        return Qmp(self.qmp_path, **options)

    def wait(self, deadline=DEADLINE):
        """The exit status, once it has ended by itself."""
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon did not end within {deadline:.0f} s: {self.stderr()}") from None

    def stop(self, number=signal.SIGTERM):
        """Ends it by a signal; the status must be 0."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.wait()
        assert status == 0, f"exit status {status}: {self.stderr()}"

    def kill(self):
        self.killed = True
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Case(unittest.TestCase):
    """A test with a directory `self.dir` of its own and daemons that end with it, cleanly."""

    maxDiff = None

    def setUp(self):
        # Short: the path of a unix socket has room for 107 bytes.
        self.dir = tempfile.mkdtemp(prefix="gt-", dir="/tmp")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)

    def path(self, name):
        return os.path.join(self.dir, name)

    def daemon(self, *arguments, **options):
        daemon = Daemon(self.dir, *arguments, **options)
        self.addCleanup(self._end, daemon)
        return daemon

    def _end(self, daemon):
        try:
            if not daemon.killed:
                daemon.stop()
        finally:
            daemon.kill()
            if not self._passed():
                sys.stderr.write(f"--- stderr of the daemon of {self.id()}\n{daemon.stderr()}")

    def _passed(self):
        outcome = getattr(self, "_outcome", None)
        return bool(outcome) and outcome.success

    def run_daemon(self, *arguments, deadline=DEADLINE, **options):
        """Runs the daemon with options that make it end at once: the CompletedProcess."""
        return subprocess.run([GANTRYD, *arguments], capture_output=True, text=True, timeout=deadline, cwd=self.dir, **options)

    def run_tool(self, *command, check=True, deadline=2 * DEADLINE, **options):
        """Runs a client in the test's directory (never in ours: its nbd/ would hide libnbd's module).

        qemu-img measures its own speed before it makes a LUKS image, and gives up when the kernel counted none of its time:
        only then it is run again.
        """
        for _ in range(40):
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=deadline,
                                  cwd=self.dir, stdin=subprocess.DEVNULL, **options)
            if done.returncode == 0 or "Unable to get accurate CPU usage" not in (done.stderr or ""):
                break
        if check and done.returncode != 0:
            self.fail(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def raw_image(self, name, size, pattern=None):
        """A raw image; `pattern`: a function of the block number giving each 64 KiB block."""
        path = self.path(name)
        with open(path, "wb") as file:
            file.truncate(size)
            for block in range((size + 65535) // 65536 if pattern else 0):
                data = pattern(block)
                if data:
                    file.seek(block * 65536)
                    file.write(data[: size - block * 65536])
        return path

    def start_nbd(self, qmp, name="nbd.sock", **more):
        """Starts the NBD server on a unix socket; its path."""
        path = self.path(name)
        qmp.cmd("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}, **more})
        return path

    def uri(self, socket_path, export=""):
        return f"nbd+unix:///{export}?socket={socket_path}"


def text_block(number):
    """64 KiB that say where they belong; every fourth block is a hole."""
    if number % 4 == 3:
        return None
    return struct.pack("<Q", number * 0x9E3779B97F4A7C15 % (1 << 64)) * 8192


def main():
    """Runs the tests of the calling file: 0 passed, 1 failed, 77 all skipped."""
    program = unittest.main(module="__main__", exit=False, warnings="ignore",
                            verbosity=1 if "-q" in sys.argv else 2)
    result = program.result
    for test, reason in result.skipped:
        print(f"SKIP: {test.id()}: {reason}", file=sys.stderr)
    if not result.wasSuccessful():
        sys.exit(1)
    if result.testsRun == 0:
        print("no test ran", file=sys.stderr)
        sys.exit(1)
    sys.exit(77 if len(result.skipped) == result.testsRun else 0)
