"""The load: our generator, fio's NBD engine, fio on a file, ... All return the same numbers."""

import json
import os
import subprocess
import time

from .servers import EXPORT


class ClientError(RuntimeError):
    pass


def find_generator(build, name="gantry-bench-load"):
    """A load generator of `build`, else of the optimised build beside it."""
    folders = [build, os.path.join(os.path.dirname(build), "release")]
    for folder in folders:
        program = os.path.join(folder, name)
        if os.path.exists(program):
            return program
    return None


def run(command, seconds, pin):
    command = (["taskset", "-c", str(pin)] if pin is not None else []) + command
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        raise ClientError((done.stderr or done.stdout).strip()[-300:])
    return done.stdout


def load(generator, server, workload, seconds, pin=None):
    command = [generator, "--json", "--unix=" + server.socket, "--export=" + EXPORT, "--runtime=%dms" % (seconds * 1000)]
    if workload.kind == "connect":
        command.append("--rw=connect")
    else:
        command += ["--rw=" + workload.rw, "--bs=" + workload.block, "--qd=%d" % workload.depth,
                    "--connections=%d" % workload.connections]
    out = json.loads(run(command, seconds, pin))
    return {"ios": out["ios"], "iops": out["iops"], "mbps": out["mbps"], "lat_us": out["lat_mean_us"],
            "p99_us": out["lat_p99_us"]}


def vhost(generator, server, workload, seconds, pin=None):
    """A front end with a queue for each connection, and at most as many threads as leave the server a CPU."""
    threads = max(1, min(workload.connections, (os.cpu_count() or 2) // 2))
    command = [generator, "--json", "--socket=" + server.socket, "--runtime=%dms" % (seconds * 1000), "--rw=" + workload.rw,
               "--bs=" + workload.block, "--qd=%d" % workload.depth, "--queues=%d" % workload.connections,
               "--threads=%d" % threads, *workload.ring]
    out = json.loads(run(command, seconds, pin))
    return {"ios": out["ios"], "iops": out["iops"], "mbps": out["mbps"], "lat_us": out["lat_mean_us"],
            "p99_us": out["lat_p99_us"], "more": {name: round(out[name] / max(out["ios"], 1), 3) for name in ("kicks", "signals")}}


def fio_command(workload, seconds):
    # A runtime below a second must be given in ms.
    return ["fio", "--name=w", "--time_based", "--runtime=%dms" % (seconds * 1000), "--group_reporting",
            "--output-format=json", "--norandommap", "--randrepeat=0", "--rw=" + workload.rw, "--bs=" + workload.block,
            "--iodepth=%d" % workload.depth, "--numjobs=%d" % workload.connections]


def fio(server, workload, seconds, pin=None):
    # Options of the engine (--uri) must follow --ioengine.
    return fio_numbers(run(fio_command(workload, seconds) + ["--ioengine=nbd", "--uri=" + server.uri()], seconds, pin), workload)


def fio_file(server, workload, seconds, pin=None):
    """fio on the file that the server shows."""
    buffered = server.buffered or not workload.o_direct
    command = ["taskset", "-c", str(pin)] if pin is not None else []
    command += fio_command(workload, seconds) + [
        "--ioengine=" + workload.engine, "--filename=" + server.path, "--direct=%d" % (not buffered), "--overwrite=1",
        "--allow_file_create=0",
        "--invalidate=%d" % (not server.plain)]  # the image's own pages stay: they are warm for every server
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = client.communicate(timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        server.abandon()  # or the client would never end
        client.kill()
        client.communicate()
        raise
    if client.returncode:
        raise ClientError((errors or out).strip()[-300:])
    return fio_numbers(out, workload)


def fio_numbers(out, workload):
    job = json.loads(out[out.index("{"):])["jobs"][0]
    if job.get("error"):
        raise ClientError("fio ended with error %d" % job["error"])
    half = job["write" if workload.writes else "read"]
    latency = half["clat_ns"]
    return {"ios": half["total_ios"], "iops": half["iops"], "mbps": half["bw_bytes"] / 1e6,
            "lat_us": latency["mean"] / 1e3, "p99_us": latency.get("percentile", {}).get("99.000000", 0) / 1e3}


def copy(server, workload, image, source, pin=None):
    """nbdcopy of the whole image; `source` is what is copied in."""
    command = ["nbdcopy"] + (["--connections=%d" % workload.connections] if workload.connections else [])
    command += [source, server.uri()] if workload.writes else [server.uri(), "null:"]
    bytes_ = os.path.getsize(image)
    begun = time.monotonic()
    run(command, 60, pin)
    seconds = time.monotonic() - begun
    ios = bytes_ / 262144  # nbdcopy's request size
    return {"ios": ios, "iops": ios / seconds, "mbps": bytes_ / 1e6 / seconds, "lat_us": 0, "p99_us": 0}


def block_status(server, pin=None):
    """nbdinfo --map of the whole image, in ms."""
    begun = time.monotonic()
    run(["nbdinfo", "--map", "--totals", server.uri()], 60, pin)
    milliseconds = (time.monotonic() - begun) * 1000
    return {"ios": 1, "iops": 0, "mbps": 0, "ms": milliseconds, "lat_us": 0, "p99_us": 0}


def handshakes(server, seconds, pin=None):
    """libnbd connects, negotiates TLS and leaves, one connection after the other. Its module is the system python's."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "handshakes.py")
    got = json.loads(run(["/usr/bin/python3", program, server.uri(), str(seconds)], seconds, pin))
    return {"ios": got["connections"], "iops": got["connections"] / got["seconds"], "mbps": 0, "lat_us": 0, "p99_us": 0}
