"""Runs workloads against servers in interleaved rounds and hands each measurement to a sink."""

import subprocess
import sys
import time

from . import clients, processes
from .images import format_of
from .workloads import FIO, FIO_FILE, HANDSHAKES, LOAD, NBDCOPY, NBDINFO, VHOST


class Bench:
    """One invocation: which servers, where, how long, how often."""

    def __init__(self, directory, images, servers, generators, seconds, rounds, tries, noise_limit, pin):
        """`generators`: the programs of the clients LOAD and VHOST."""
        self.directory, self.images, self.servers, self.generators = directory, images, servers, generators
        self.seconds, self.rounds, self.tries, self.noise_limit, self.pin = seconds, rounds, tries, noise_limit, pin

    def run_workload(self, suite_name, suite, workload, client, server_names, sink):
        """All rounds of one workload: A B C, A B C, ... A server that fails once is left out of the rest."""
        use = [server for server in self.servers if server.name in server_names and server.fits(suite, workload)]
        failed = set()
        folios = None if suite.direct else workload.folios
        for kind in {image_of(server, suite) for server in use}:
            self.images.prepare(kind, folios)
        for round_number in range(self.rounds or max(workload.least_rounds, 5)):
            for server in use:
                if server.name in failed:
                    continue
                try:
                    measured = self.quietest(lambda: self.run_once(server, suite, workload, client, folios))
                except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
                    failed.add(server.name)
                    print("! %s/%s %s %s: %s" % (suite_name, workload.name, client, server.name, error), file=sys.stderr)
                    continue
                sink({"suite": suite_name, "workload": workload.name, "client": client, "server": server.name,
                      "ours": server.ours, "reference": server.reference, "round": round_number,
                      "unit": workload.unit, "lower_is_better": workload.lower_is_better, **measured})

    def quietest(self, run):
        """Repeats a run that other processes disturbed, and returns the least disturbed one."""
        best = None
        for attempt in range(self.tries):
            if attempt:
                wait_for_quiet()
            got = run()
            if best is None or got.get("noise", 0) < best.get("noise", 0):
                best = got
            if best.get("noise", 0) <= self.noise_limit:
                break
        return best

    def run_once(self, server, suite, workload, client, folios):
        """Warms the image, starts the server, runs the client once, stops the server."""
        kind = image_of(server, suite)
        self.images.warm(kind, folios)
        server.start(self.directory, self.images.path(kind), format_of(kind), suite.direct, suite.readonly, 1 if self.pin else None,
                     suite.tls)
        try:
            if workload.kind == "startup":
                return {"value": server.startup_seconds * 1000}
            if workload.kind == "idle":
                return {"value": server.rss_kib() / 1024}
            return self.run_client(server, workload, client, self.images.path(kind))
        finally:
            server.stop()

    def run_client(self, server, workload, client, image):
        pin = 0 if self.pin else None
        server_cpu, machine_cpu, own_cpu = server.cpu_seconds(), processes.machine_cpu_seconds(), processes.own_cpu_seconds()
        begun = time.monotonic()
        if client == LOAD:
            got = clients.load(self.generators[LOAD], server, workload, self.seconds, pin)
        elif client == FIO:
            got = clients.fio(server, workload, self.seconds, pin)
        elif client == FIO_FILE:
            got = clients.fio_file(server, workload, self.seconds, pin)
        elif client == VHOST:
            got = clients.vhost(self.generators[VHOST], server, workload, self.seconds, pin)
        elif client == NBDCOPY:
            got = clients.copy(server, workload, image, self.images.path("raw"), pin)
        elif client == NBDINFO:
            got = clients.block_status(server, pin)
        elif client == HANDSHAKES:
            got = clients.handshakes(server, self.seconds, pin)
        else:
            raise ValueError("client %s cannot run %s" % (client, workload.name))
        time.sleep(0.02)  # a server of processes reaps those that served the last connections
        server_cpu = server.cpu_seconds() - server_cpu
        machine_cpu = processes.machine_cpu_seconds() - machine_cpu
        own_cpu = processes.own_cpu_seconds() - own_cpu
        others = max(0, machine_cpu - server_cpu - own_cpu) / (time.monotonic() - begun)
        if not got["ios"]:
            raise clients.ClientError("not one request was answered")
        key = {"MB/s": "mbps", "ms": "ms"}.get(workload.unit, "iops")
        return {"value": got[key], "lat_us": round(got["lat_us"], 1),
                "p99_us": round(got["p99_us"], 1), "cpu_us": server_cpu / got["ios"] * 1e6,
                "client_cpu_us": own_cpu / got["ios"] * 1e6, "noise": round(others, 3), **got.get("more", {})}


def image_of(server, suite):
    """The kind of the image that the server works on."""
    return getattr(server, "image_kind", None) or suite.image


def wait_for_quiet(limit_seconds=1.5):
    """Returns when the machine idles, at last after the limit."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        busy, begun = processes.machine_cpu_seconds(), time.monotonic()
        time.sleep(0.1)
        if (processes.machine_cpu_seconds() - busy) / (time.monotonic() - begun) < 0.25:
            return
