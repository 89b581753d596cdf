"""The servers that are compared: how each is started, when it is ready, how it is stopped."""

import os
import shutil
import signal
import subprocess
import time

from . import nbdprobe, pki, processes
from .images import format_of

EXPORT = "x"
START_LIMIT_SECONDS = 10

# qemu-storage-daemon's command line, which gantryd understands too. Placeholders: see Server.start.
BLOCKDEV = ["--blockdev", "driver=file,node-name=file,filename={image},read-only={readonly},cache.direct={direct}{aio}",
            "--blockdev", "driver={format},node-name=disk,file=file,read-only={readonly}"]
NULL_BLOCKDEV = ["--blockdev", "driver=null-co,node-name=disk,size=1073741824,read-zeroes=off"]
EXPORT_DISK = ["--nbd-server", "addr.type=unix,addr.path={socket}{tls_creds}",
               "--export", "type=nbd,id=export,node-name=disk,name=" + EXPORT + ",writable={writable}"]

NBD_SERVER_CONFIG = """[generic]
unixsock={socket}
[%s]
exportname={image}
flush=true
readonly={nbd_server_readonly}
""" % EXPORT
NBD_SERVER_TLS = """force_tls=true
cacertfile={pki}/ca-cert.pem
certfile={pki}/server-cert.pem
keyfile={pki}/server-key.pem
"""

# What a server of each kind is told besides when a suite wants TLS; {pki} is where keys and certificates are.
QEMU_TLS = {"x509": ["--object", "tls-creds-x509,id=tls,endpoint=server,dir={pki}"],
            "psk": ["--object", "tls-creds-psk,id=tls,endpoint=server,dir={pki}"]}
NBDKIT_TLS = {"x509": ["--tls=require", "--tls-certificates={pki}"], "psk": ["--tls=require", "--tls-psk={pki}/keys.psk"]}
URI_TLS = {"x509": "&tls-certificates={pki}&tls-verify-peer=false", "psk": "&tls-psk-file={pki}/keys.psk"}

# Without these glibc gives each large request buffer back to the kernel, and its pages fault in again.
MALLOC_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "33554432",
                      "MALLOC_ARENA_MAX": "1"}


class Server:
    """One way to serve an image. `arguments` and `config` are templates."""

    front = "nbd"  # where clients find it; the same as the suite's

    def __init__(self, name, arguments, formats=("raw", "qcow2"), direct=(False, True), ours=False, environment=None,
                 config=None, daemonizes=False, image_kind=None, aio=""):
        self.name, self.arguments, self.formats, self.direct, self.ours = name, arguments, formats, direct, ours
        self.environment, self.config, self.daemonizes = environment or {}, config, daemonizes
        self.aio = aio
        self.image_kind = image_kind  # serves this image whatever the suite is about

    def installed(self):
        return shutil.which(self.arguments[0]) is not None

    @property
    def reference(self):
        """Not a competitor in what the suite is about."""
        return self.image_kind is not None

    def fits(self, suite, workload):
        if self.front != suite.front or self.image_kind == suite.image:
            return False  # the latter: a reference that would be measured against itself
        return format_of(self.image_kind or suite.image) in self.formats and suite.direct in self.direct

    def start(self, directory, image, format_name, direct, readonly, pin=None, tls=""):
        """Starts serving and returns once a read was answered (with TLS: once it says hello); RuntimeError with the
        server's words otherwise."""
        self.tls, self.pki = tls, pki.make(directory) if tls else ""
        self.socket = os.path.join(directory, "%s.%d.sock" % (self.name, os.getpid()))
        self.pid_file = self.socket + ".pid"
        self.forget_files()
        values = {"image": image, "format": format_name, "socket": self.socket, "aio": self.aio,
                  "pid_file": self.pid_file, "config": self.socket + ".conf", "direct": "on" if direct else "off",
                  "readonly": "on" if readonly else "off", "writable": "off" if readonly else "on",
                  "nbd_server_readonly": "true" if readonly else "false", "pki": self.pki,
                  "tls_creds": ",tls-creds=tls" if tls else ""}
        if self.config:
            with open(values["config"], "w") as file:
                config = self.config.replace("[generic]\n", "[generic]\n" + NBD_SERVER_TLS) if tls else self.config
                file.write(config.format(**values))
        command = (["taskset", "-c", str(pin)] if pin is not None else [])
        command += [argument.format(**values) for argument in self.with_tls()]
        if readonly and "nbdkit" in self.arguments[0]:
            command.insert(command.index("-f"), "-r")
        self.log_path = os.path.join(directory, "server.%s.log" % self.name)
        begun = time.monotonic()
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **self.environment}, start_new_session=True)
        try:
            self.wait_ready(begun)
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - begun
        self.pid = self.daemon_pid() if self.daemonizes else self.process.pid

    def with_tls(self):
        if not self.tls or self.config:
            return self.arguments
        more = NBDKIT_TLS if "nbdkit" in self.arguments[0] else QEMU_TLS
        return [self.arguments[0], *more[self.tls], *self.arguments[1:]]

    def daemon_pid(self):
        """The process that nbd-server left in the background, from its pid file; OSError or ValueError before that."""
        with open(self.pid_file) as file:
            return int(file.read())

    def wait_ready(self, begun):
        problem = "no answer"
        while time.monotonic() - begun < START_LIMIT_SECONDS:
            status = self.process.poll()
            if status is not None and not (self.daemonizes and status == 0):
                problem = "exit status %d" % status
                break
            try:
                if self.daemonizes:
                    self.daemon_pid()
                if self.tls:
                    nbdprobe.hello(self.socket)
                else:
                    nbdprobe.first_read(self.socket, EXPORT)
                return
            except (OSError, ValueError) as error:
                problem = str(error)
            time.sleep(0.0005)
        with open(self.log_path) as file:
            raise RuntimeError("%s did not start (%s): %s" % (self.name, problem, file.read()[-400:].strip()))

    def stop(self):
        if self.daemonizes:
            try:
                stop_stranger(self.daemon_pid())
            except (OSError, ValueError):
                pass  # it never came so far
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.forget_files()

    def forget_files(self):
        for path in (self.socket, self.pid_file, self.socket + ".conf"):
            if os.path.lexists(path):
                os.unlink(path)

    def cpu_seconds(self):
        return processes.tree_cpu_seconds(self.pid)

    def rss_kib(self):
        return processes.tree_rss_kib(self.pid)

    def uri(self):
        scheme = "nbds+unix" if self.tls else "nbd+unix"
        user = "qemu@" if self.tls == "psk" else ""
        return "%s://%s/%s?socket=%s%s" % (scheme, user, EXPORT, self.socket, URI_TLS.get(self.tls, "").format(pki=self.pki))


def stop_stranger(pid):
    """Ends a process that is not our child."""
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(2000):
            os.kill(pid, 0)
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def qsd(name, aio, **options):
    return Server(name, ["qemu-storage-daemon"] + BLOCKDEV + EXPORT_DISK, aio=",aio=" + aio,
                  direct=(True,) if aio == "native" else (False, True), **options)


def peers():
    """Every other server, the best configurations that we know of among them."""
    return [
        qsd("qsd-threads", "threads"),
        qsd("qsd-native", "native"),
        qsd("qsd-uring", "io_uring"),
        qsd("qsd-uring-malloc", "io_uring", environment=MALLOC_ENVIRONMENT),
        Server("qemu-nbd", ["qemu-nbd", "--socket={socket}", "--export-name=" + EXPORT, "--format={format}", "--persistent",
                            "--shared=0", "--read-only", "--cache=writeback", "--aio=io_uring", "{image}"],
               formats=("qcow2",), direct=(False,)),
        Server("nbdkit", ["nbdkit", "-f", "-U", "{socket}", "-e", EXPORT, "file", "{image}"], ("raw",), (False,)),
        Server("nbd-server", ["nbd-server", "-C", "{config}", "-p", "{pid_file}"], ("raw",), (False,),
               config=NBD_SERVER_CONFIG, daemonizes=True),
        # The ceiling of each protocol implementation: nothing behind it.
        Server("qsd-null", ["qemu-storage-daemon"] + NULL_BLOCKDEV + EXPORT_DISK, ("null",), (False,)),
        Server("nbdkit-null", ["nbdkit", "-f", "-U", "{socket}", "-e", EXPORT, "null", "1G"], ("null",), (False,)),
        Server("nbdkit-memory", ["nbdkit", "-f", "-U", "{socket}", "-e", EXPORT, "memory", "1G"], ("null",), (False,)),
    ]


def gantry(build):
    """Our own servers of one build directory; none when it holds no gantryd."""
    program = os.path.join(build, "gantryd")
    if not os.path.exists(program):
        return []
    disk = [program] + BLOCKDEV + EXPORT_DISK
    epoll = ["--io-backend=epoll"]
    return [
        Server("gantry", disk, ours=True),
        Server("gantry-no-poll", [program, "--io-poll=off"] + BLOCKDEV + EXPORT_DISK, ours=True),
        Server("gantry-epoll", [program] + epoll + BLOCKDEV + EXPORT_DISK, ours=True),
        Server("gantry-on-raw", disk, ("raw",), ours=True, image_kind="raw"),
        Server("gantry-on-qcow2", disk, ("qcow2",), ours=True, image_kind="qcow2"),
        Server("gantry-null", [program] + NULL_BLOCKDEV + EXPORT_DISK, ("null",), (False,), ours=True),
        Server("gantry-epoll-null", [program] + epoll + NULL_BLOCKDEV + EXPORT_DISK, ("null",), (False,), ours=True),
    ]
