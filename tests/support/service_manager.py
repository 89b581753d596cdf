#!/usr/bin/python3
"""A service manager with a descriptor store: starts the daemon, keeps what it stores, and gives it to the next one.

A process of its own, told by lines of JSON on standard input what to do: whoever has a file of an export open and forks while nobody
serves it, waits (closing a file in the child asks its server).
"""

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

DEADLINE = 30.0

# LISTEN_PID is the pid of the daemon: a launcher sets it, puts the descriptors where they belong and becomes the daemon.
LAUNCHER = """
import fcntl, os, sys
fds = [int(word) for word in sys.argv[1].split(",") if word]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 3 + len(fds)) for fd in fds]
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i, inheritable=True)
os.closerange(3 + len(fds), 4096)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """NOTIFY_SOCKET, FDSTORE=1 and LISTEN_FDS, as systemd has them; like it, gives back what was stored last first."""

    def __init__(self, directory):
        self.directory = directory
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(os.path.join(directory, "notify"))
        self.stored = []  # (name, descriptor), the newest first
        self.messages = []
        self.changed = threading.Condition()
        self.drained = 0
        self.process = None
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        while True:
            data, control, _, _ = self.notify.recvmsg(65536, socket.CMSG_SPACE(253 * 4))
            fds = array.array("i")
            for level, kind, content in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(content[:len(content) - len(content) % fds.itemsize])
            with self.changed:
                self.take(dict(line.split("=", 1) for line in data.decode().splitlines()), list(fds))
                self.changed.notify_all()

    def take(self, message, fds):
        if "DRAINED" in message:
            self.drained += 1
            return
        self.messages.append(message)
        name = message.get("FDNAME")
        if message.get("FDSTORE") == "1":
            for fd in fds:
                self.stored.insert(0, (name, fd))
        elif message.get("FDSTOREREMOVE") == "1":
            for entry in [entry for entry in self.stored if entry[0] == name]:
                self.stored.remove(entry)
                os.close(entry[1])

    def drain(self):
        """Everything that was said up to now has been taken."""
        with self.changed:
            wanted = self.drained + 1
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"DRAINED=1", self.notify.getsockname())
        with self.changed:
            if not self.changed.wait_for(lambda: self.drained >= wanted, DEADLINE):
                raise RuntimeError("the manager's own words do not arrive")

    # --- what can be asked for

    def names(self):
        self.drain()
        return sorted(name for name, _ in self.stored)

    def start(self, command, ready=True):
        """Another process of the service, with what is stored. Returns its pid."""
        self.drain()
        with self.changed:
            begun, stored = len(self.messages), list(self.stored)
        settings = {**os.environ, "NOTIFY_SOCKET": self.notify.getsockname(), "FDSTORE": "512",
                    "LISTEN_FDS": str(len(stored)), "LISTEN_FDNAMES": ":".join(name for name, _ in stored)}
        descriptors = [fd for _, fd in stored]
        with open(os.path.join(self.directory, "stderr"), "ab") as stderr:
            self.process = subprocess.Popen(
                ["/usr/bin/python3", "-I", "-S", "-c", LAUNCHER, ",".join(map(str, descriptors)), *command], env=settings,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, pass_fds=descriptors)

        def came():
            return any("READY" in message for message in self.messages[begun:]) or self.process.poll() is not None
        end = time.monotonic() + DEADLINE
        with self.changed:
            while ready and not self.changed.wait_for(came, 0.2) and time.monotonic() < end:
                pass
            if ready and (self.process.poll() is not None or not came()):
                raise RuntimeError(f"it is not ready; exit status {self.process.poll()}")
        return self.process.pid

    def signal(self, number):
        """The exit status of the process, which ends by it."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        return self.process.wait(DEADLINE)

    def forget(self):
        """The service is stopped for good: nothing is kept any more."""
        self.drain()
        with self.changed:
            for _, fd in self.stored:
                os.close(fd)
            self.stored.clear()

    def spoil(self):
        """What is kept in memory files becomes rubbish."""
        for _, fd in self.stored:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
                os.pwrite(fd, b"\xff" * os.fstat(fd).st_size, 0)

    def lose(self, kind, count):
        """Some of what is kept, the newest first: "device", "state", "log" or "covered"."""
        for entry in list(self.stored):
            link = os.readlink(f"/proc/self/fd/{entry[1]}")
            is_kind = {"device": link == "/dev/fuse", "state": link.startswith("/memfd:gantry-fuse"),
                       "log": link.startswith("/memfd:map-")}
            if count > 0 and is_kind.get(kind, not any(is_kind.values())):
                self.stored.remove(entry)
                os.close(entry[1])
                count -= 1

    def take_wakings(self):
        """Waits for requests in the first place, where each wakes one of those that wait, and does nothing about them."""
        epoll = select.epoll()
        for _, fd in self.stored:
            if os.readlink(f"/proc/self/fd/{fd}") == "/dev/fuse":
                epoll.register(fd, select.EPOLLIN | select.EPOLLET | select.EPOLLEXCLUSIVE)

        def wait():
            while True:
                epoll.poll()
        threading.Thread(target=wait, daemon=True).start()

    def run(self, words):
        done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False, stdin=subprocess.DEVNULL)
        return [done.returncode, done.stdout + done.stderr]


def main():
    manager = Manager(sys.argv[1])
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": getattr(manager, name)(*arguments)}
        except Exception as error:  # whatever it is, the test is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    if manager.process and manager.process.poll() is None:
        manager.process.kill()
        manager.process.wait()


class ServiceManager:
    """A test's end of it. Make it before any file of an export is opened."""

    def __init__(self, case, command, *arguments):
        self.command, self.arguments = list(command), list(arguments)
        self.directory = tempfile.mkdtemp(prefix="m", dir=case.dir)
        self.helper = subprocess.Popen([sys.executable, __file__, self.directory], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True)
        case.addCleanup(self.close)

    def ask(self, name, *arguments):
        self.helper.stdin.write(json.dumps([name, arguments]) + "\n")
        self.helper.stdin.flush()
        line = self.helper.stdout.readline()
        answer = json.loads(line) if line else {"error": "it is gone"}
        if "error" in answer:
            raise AssertionError(f"service manager: {name}: {answer['error']}\n{self.errors()}")
        return answer["value"]

    def start(self, *arguments, ready=True):
        return self.ask("start", self.command + [str(word) for word in arguments or self.arguments], ready)

    def kill(self):
        self.ask("signal", signal.SIGKILL)

    def stop(self, number=signal.SIGTERM):
        status = self.ask("signal", number)
        assert status == 0, f"exit status {status}: {self.errors()}"

    def wait(self):
        return self.ask("wait")

    def names(self):
        return self.ask("names")

    def take_wakings(self):
        self.ask("take_wakings")

    def run(self, *words):
        """A command that opens no file of the test's."""
        status, text = self.ask("run", [str(word) for word in words])
        assert status == 0, f"{words}: {text}"

    def errors(self):
        try:
            with open(os.path.join(self.directory, "stderr"), encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def close(self):
        self.helper.stdin.close()
        self.helper.wait(DEADLINE)
        self.helper.stdout.close()
        text = self.errors()
        if "AddressSanitizer" in text or "ThreadSanitizer" in text:
            raise AssertionError("a sanitizer complains: " + text)


if __name__ == "__main__":
    main()
