"""What tests of the load generators of bench/ share: a run of the program, and a server that lies."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

BUILD = os.environ.get("GANTRY_BUILD", "build/debug")
MIB = 1 << 20


class Liar:
    """A server on a unix socket, for one client, in a thread; talk(client, stream) is its side."""

    def __init__(self, path):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(20)

    def serve(self):
        try:
            client, _ = self.listener.accept()
        except OSError:
            return
        with client, client.makefile("rb") as stream:
            try:
                self.talk(client, stream)
            except OSError:
                return  # the generator has left with something unread


class GeneratorCase(unittest.TestCase):
    """Classes say PROGRAM, the option that takes the socket (SOCKET) and how long a run is (RUNTIME)."""

    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.socket = os.path.join(self.directory.name, "socket")

    def run_generator(self, *arguments):
        return subprocess.run([os.path.join(BUILD, self.PROGRAM), f"--{self.SOCKET}={self.socket}", *arguments], capture_output=True,
                              text=True, timeout=60)

    def measure(self, *arguments):
        done = self.run_generator("--json", f"--runtime={self.RUNTIME}", *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def refuse(self, status, sentence, *arguments):
        done = self.run_generator(f"--runtime={self.RUNTIME}", *arguments)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        self.assertIn(sentence, done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, "one sentence is expected: " + done.stderr)


def main(program, *tools):
    """Runs the tests of the script where there is what they need."""
    for tool in (os.path.join(BUILD, program), *tools):
        if not shutil.which(tool):
            print(f"skipped: {tool} is missing")
            sys.exit(77)
    unittest.main()
