"""Servers that give the image to virtual machines over vhost-user: gantry-bench-vhost is the machine."""

import os
import socket
import struct
import time

from .servers import BLOCKDEV, NULL_BLOCKDEV, START_LIMIT_SECONDS, Server

EXPORT_DISK = ["--export", "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},"
               "writable={writable},num-queues=4"]
GET_FEATURES = 1
VERSION = 1


def first_answer(path):
    """Asks for the features as a front end does, and leaves; OSError or ValueError when that fails."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(START_LIMIT_SECONDS)
        connection.connect(path)
        connection.sendall(struct.pack("=III", GET_FEATURES, VERSION, 0))
        reply = connection.recv(20, socket.MSG_WAITALL)
        if len(reply) != 20 or struct.unpack_from("=I", reply)[0] != GET_FEATURES:
            raise ValueError("the first message was not answered")
        # One front end at a time: the server has to know that this one has gone.
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1):
            raise ValueError("the server said something unasked")


class VhostServer(Server):
    """qemu-storage-daemon or gantryd, which understand the same words."""

    front = "vhost"

    def __init__(self, name, program, blockdev=BLOCKDEV, iothread=None, words=(), **options):
        """`iothread`: its poll-max-ns, -1 for the default one, None: no such object. `words`: said first."""
        thread, use = [], ""
        if iothread is not None:
            thread = ["--object", "iothread,id=thread" + (",poll-max-ns=%d" % iothread if iothread >= 0 else "")]
            use = ",iothread=thread"
        super().__init__(name, [program, *words, *thread, *blockdev, EXPORT_DISK[0], EXPORT_DISK[1] + use], **options)

    def fits(self, suite, workload):
        # qemu-storage-daemon 7.2 has no packed rings.
        return super().fits(suite, workload) and (self.ours or "--packed" not in workload.ring)

    def wait_ready(self, begun):
        problem = "no answer"
        while time.monotonic() - begun < START_LIMIT_SECONDS:
            if self.process.poll() is not None:
                problem = "exit status %d" % self.process.returncode
                break
            try:
                first_answer(self.socket)
                return
            except (OSError, ValueError) as error:
                problem = str(error)
            time.sleep(0.0005)
        with open(self.log_path) as file:
            raise RuntimeError("%s did not start (%s): %s" % (self.name, problem, file.read()[-400:].strip()))


def qsd(name, aio, **options):
    return VhostServer(name, "qemu-storage-daemon", aio=",aio=" + aio, direct=(True,) if aio == "native" else (False, True),
                       **options)


def qsd_null(name, **options):
    return VhostServer(name, "qemu-storage-daemon", NULL_BLOCKDEV, formats=("null",), direct=(False,), **options)


def peers():
    return [
        qsd("qsd-vhost-threads", "threads"),
        qsd("qsd-vhost-threads-iothread", "threads", iothread=-1),
        qsd("qsd-vhost-native", "native"),
        qsd("qsd-vhost-uring", "io_uring"),
        qsd("qsd-vhost-uring-iothread", "io_uring", iothread=-1),
        qsd("qsd-vhost-uring-iothread-no-poll", "io_uring", iothread=0),
        qsd_null("qsd-vhost-null"),
        qsd_null("qsd-vhost-null-iothread", iothread=-1),
        qsd_null("qsd-vhost-null-iothread-no-poll", iothread=0),
    ]


def gantry(build):
    """Our own servers of one build directory; none when it holds no gantryd."""
    program = os.path.join(build, "gantryd")
    if not os.path.exists(program):
        return []

    def ours(name, **options):
        return VhostServer(name, program, ours=True, **options)

    def null(name, **options):
        return ours(name, blockdev=NULL_BLOCKDEV, formats=("null",), direct=(False,), **options)
    return [
        ours("gantry-vhost"),
        ours("gantry-vhost-no-poll", words=["--io-poll=off"]),
        ours("gantry-vhost-epoll", words=["--io-backend=epoll"]),
        ours("gantry-vhost-iothread", iothread=-1),
        ours("gantry-vhost-iothread-no-poll", iothread=0),
        ours("gantry-vhost-on-raw", formats=("raw",), image_kind="raw"),
        null("gantry-vhost-null"),
        null("gantry-vhost-null-iothread", iothread=-1),
        null("gantry-vhost-null-iothread-no-poll", iothread=0),
    ]
