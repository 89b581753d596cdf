"""What is measured: suites (an image and how it is opened) of workloads (what the client does)."""

from dataclasses import dataclass

LOAD, FIO, PROBE, NBDCOPY, NBDINFO, HANDSHAKES, FIO_FILE, VHOST = CLIENTS = (
    "load", "fio", "probe", "nbdcopy", "nbdinfo", "handshakes", "fio-file", "vhost")


@dataclass(frozen=True)
class Workload:
    name: str
    kind: str = "transfer"  # transfer, connect, startup, idle, copy (nbdcopy), map (nbdinfo --map)
    rw: str = ""
    block: str = ""
    depth: int = 1
    connections: int = 1
    folios: str = "large"
    clients: tuple = (LOAD, FIO)
    engine: str = ""  # of fio on a file
    o_direct: bool = True  # the client's, on a file
    ring: tuple = ()  # further options of gantry-bench-vhost

    @property
    def writes(self):
        return "write" in self.rw

    @property
    def unit(self):
        if self.kind == "transfer":
            return "IOPS" if self.block == "4k" else "MB/s"
        return {"connect": "conn/s", "startup": "ms", "idle": "MiB", "copy": "MB/s", "map": "ms"}[self.kind]

    @property
    def lower_is_better(self):
        return self.kind in ("startup", "idle", "map")

    @property
    def least_rounds(self):
        """At depth 1 a run measures how two CPUs wake each other, which varies: it takes more pairs."""
        return 9 if self.kind == "transfer" and self.depth == 1 else 1


@dataclass(frozen=True)
class Suite:
    image: str  # a kind of images.py: raw, qcow2, fresh, chain, compressed, holes, qcow2-holes, target, null
    direct: bool
    workloads: tuple
    servers: tuple  # the default ones; ours are `gantry...`
    readonly: bool = False
    tls: str = ""  # x509 or psk
    front: str = "nbd"  # or fuse: the client works on a file; or vhost: the client is a virtual machine


def transfer(rw, block, depth, connections=1, folios="large"):
    name = "%s-%s-qd%d" % (rw, block, depth)
    if connections > 1:
        name += "x%d" % connections
    if folios == "small":
        name += "-small"
    return Workload(name, "transfer", rw, block, depth, connections, folios)


def on_file(rw, block, depth=0, jobs=1, o_direct=True, folios="large"):
    """fio on a file; depth 0: psync, one call after the other in each of the jobs."""
    name = "%s-%s-%s" % (rw, block, "qd%d" % depth if depth else "psync")
    name += ("x%d" % jobs if jobs > 1 else "") + ("" if o_direct else "-buffered") + ("-small" if folios == "small" else "")
    return Workload(name, "transfer", rw, block, depth or 1, jobs, folios, (FIO_FILE,), "io_uring" if depth else "psync", o_direct)


# What a Linux guest negotiates and does: a call only when it sleeps, every request in an indirect table.
LINUX_RING = ("--event-idx", "--indirect")
RINGS = {"": LINUX_RING, "plain": (), "spin": ("--event-idx", "--indirect", "--spin"), "packed": (*LINUX_RING, "--packed"),
         "pages": (*LINUX_RING, "--segments=64")}


def on_ring(rw, block, depth, queues=1, ring="", folios="large"):
    """`ring`: plain (neither of the two), spin (the guest never sleeps), packed, pages (data in 64 pieces)."""
    name = "%s-%s-qd%d" % (rw, block, depth) + ("x%d" % queues if queues > 1 else "") + ("-" + ring if ring else "")
    name += "-small" if folios == "small" else ""
    return Workload(name, "transfer", rw, block, depth, queues, folios, (VHOST,), ring=RINGS[ring])


READS = (transfer("randread", "4k", 1), transfer("randread", "4k", 32), transfer("read", "64k", 8), transfer("read", "256k", 8))
WRITES = (transfer("randwrite", "4k", 1), transfer("randwrite", "4k", 32), transfer("write", "64k", 8),
          transfer("write", "256k", 8))
SMALL_FOLIO_WRITES = (transfer("randwrite", "4k", 1, folios="small"), transfer("randwrite", "4k", 32, folios="small"))
ALLOCATIONS = (transfer("randwrite", "4k", 32), transfer("write", "64k", 8), transfer("randwrite", "64k", 8))
PARALLEL = (transfer("randread", "4k", 32, connections=4),)
SERVICE = (Workload("connect", "connect", clients=(LOAD,)), Workload("startup", "startup", clients=(PROBE,)),
           Workload("idle-rss", "idle", clients=(PROBE,)))

# As nbdcopy does it by itself, and with one connection.
COPIES = tuple(Workload("copy-" + name, "copy", rw, connections=connections, clients=(NBDCOPY,))
               for name, rw, connections in (("out", "read", 0), ("in", "write", 0), ("out-x1", "read", 1), ("in-x1", "write", 1)))
MAP = (Workload("map", "map", clients=(NBDINFO,)),)
TLS = (COPIES[2], COPIES[0], COPIES[3], Workload("connect", "connect", clients=(HANDSHAKES,)),
       Workload("startup", "startup", clients=(PROBE,)))
TLS_SERVERS = ("gantry", "qsd-uring-malloc", "nbdkit", "nbd-server")

FILE_READS = (on_file("randread", "4k"), on_file("randread", "4k", jobs=4), on_file("randread", "4k", 32),
              on_file("randread", "4k", 32, jobs=2), on_file("randread", "4k", o_direct=False), on_file("read", "1m", 8),
              on_file("read", "1m", o_direct=False))
FILE_WRITES = (on_file("randwrite", "4k"), on_file("randwrite", "4k", jobs=4), on_file("randwrite", "4k", 32),
               on_file("write", "256k", 8), on_file("write", "1m", 8), on_file("write", "1m", o_direct=False),
               on_file("randwrite", "4k", o_direct=False))
FILE_SMALL_FOLIO_WRITES = (on_file("randwrite", "4k", folios="small"), on_file("randwrite", "4k", jobs=4, folios="small"),
                           on_file("randwrite", "4k", 32, folios="small"))
FILE_ALLOCATIONS = (on_file("randwrite", "4k", 32), on_file("write", "256k", 8))
FILE_SERVICE = (Workload("startup", "startup", clients=(PROBE,)), Workload("idle-rss", "idle", clients=(PROBE,)))
FILE_SERVERS = ("file", "file-buffered", "gantry-fuse", "gantry-fuse-uring", "gantry-fuse-auto", "gantry-fuse-passthrough",
                "qsd-fuse-threads", "qsd-fuse-uring", "qsd-fuse-iothread")
FILE_QCOW2_SERVERS = ("gantry-fuse", "gantry-fuse-on-raw", "gantry-fuse-uring", "gantry-fuse-auto", "qsd-fuse-threads",
                      "qsd-fuse-uring", "qsd-fuse-iothread")

RING_READS = (on_ring("randread", "4k", 1), on_ring("randread", "4k", 1, ring="spin"), on_ring("randread", "4k", 32),
              on_ring("randread", "4k", 32, ring="plain"), on_ring("randread", "4k", 32, ring="spin"),
              on_ring("randread", "4k", 32, 2), on_ring("read", "256k", 8), on_ring("read", "256k", 8, ring="pages"))
PACKED_READS = (on_ring("randread", "4k", 1, ring="packed"), on_ring("randread", "4k", 32, ring="packed"))
RING_WRITES = (on_ring("randwrite", "4k", 1), on_ring("randwrite", "4k", 32), on_ring("write", "256k", 8))
RING_SMALL_FOLIO_WRITES = (on_ring("randwrite", "4k", 1, folios="small"), on_ring("randwrite", "4k", 32, folios="small"))
RING_ALLOCATIONS = (on_ring("randwrite", "4k", 32), on_ring("write", "256k", 8))
VHOST_PEERS = ("qsd-vhost-threads", "qsd-vhost-uring", "qsd-vhost-uring-iothread", "qsd-vhost-uring-iothread-no-poll")
VHOST_SERVERS = ("gantry-vhost", "gantry-vhost-iothread", "gantry-vhost-iothread-no-poll", *VHOST_PEERS)

SUITES = {
    "raw": Suite("raw", False, READS + PARALLEL + WRITES + SMALL_FOLIO_WRITES + SERVICE,
                 ("gantry", "qsd-threads", "qsd-uring", "qsd-uring-malloc", "nbdkit", "nbd-server")),
    "raw-direct": Suite("raw", True, READS + WRITES, ("gantry", "qsd-threads", "qsd-native", "qsd-uring")),
    "qcow2": Suite("qcow2", False, READS + PARALLEL + SERVICE,
                   ("gantry", "gantry-on-raw", "qsd-threads", "qsd-uring", "qsd-uring-malloc", "qemu-nbd"), readonly=True),
    "qcow2-write": Suite("qcow2", False, WRITES + SMALL_FOLIO_WRITES,
                         ("gantry", "gantry-on-raw", "qsd-threads", "qsd-uring", "qsd-uring-malloc")),
    "qcow2-fresh": Suite("fresh", False, ALLOCATIONS, ("gantry", "qsd-threads", "qsd-uring", "qsd-uring-malloc")),
    "qcow2-chain": Suite("chain", False, (READS[1], READS[2]), ("gantry", "gantry-on-qcow2", "qsd-uring-malloc"), readonly=True),
    "qcow2-compressed": Suite("compressed", False, (READS[2], transfer("randread", "64k", 8), transfer("read", "16k", 8)),
                              ("gantry", "qsd-threads", "qsd-uring-malloc"), readonly=True),
    "raw-copy": Suite("target", False, COPIES, ("gantry", "qsd-uring-malloc", "nbdkit", "nbd-server")),
    "raw-map": Suite("holes", False, MAP, ("gantry", "qsd-uring-malloc", "nbdkit"), readonly=True),
    "qcow2-map": Suite("qcow2-holes", False, MAP, ("gantry", "qsd-uring-malloc", "qemu-nbd"), readonly=True),
    "raw-x509": Suite("target", False, TLS, TLS_SERVERS, tls="x509"),
    "raw-psk": Suite("target", False, TLS, TLS_SERVERS, tls="psk"),
    "null": Suite("null", False, READS + PARALLEL + WRITES, ("gantry-null", "qsd-null", "nbdkit-null", "nbdkit-memory")),
    "fuse-raw": Suite("raw", False, FILE_READS + FILE_WRITES + FILE_SMALL_FOLIO_WRITES + FILE_SERVICE, FILE_SERVERS, front="fuse"),
    "fuse-raw-direct": Suite("raw", True, FILE_READS + FILE_WRITES, ("gantry-fuse", "qsd-fuse-native", "qsd-fuse-uring"),
                             front="fuse"),
    "fuse-qcow2": Suite("qcow2", False, FILE_READS + FILE_WRITES + FILE_SMALL_FOLIO_WRITES + FILE_SERVICE, FILE_QCOW2_SERVERS,
                        front="fuse"),
    "fuse-qcow2-fresh": Suite("fresh", False, FILE_ALLOCATIONS, ("gantry-fuse", "qsd-fuse-threads", "qsd-fuse-uring"), front="fuse"),
    "vhost-raw": Suite("raw", False, RING_READS + PACKED_READS + RING_WRITES + RING_SMALL_FOLIO_WRITES + FILE_SERVICE, VHOST_SERVERS,
                       front="vhost"),
    "vhost-raw-direct": Suite("raw", True, RING_READS + RING_WRITES, ("gantry-vhost", "gantry-vhost-iothread", "qsd-vhost-native",
                                                                      "qsd-vhost-uring", "qsd-vhost-uring-iothread"), front="vhost"),
    "vhost-qcow2": Suite("qcow2", False, RING_READS + RING_WRITES + RING_SMALL_FOLIO_WRITES + FILE_SERVICE,
                         ("gantry-vhost", "gantry-vhost-on-raw", "gantry-vhost-iothread", *VHOST_PEERS), front="vhost"),
    "vhost-qcow2-fresh": Suite("fresh", False, RING_ALLOCATIONS, ("gantry-vhost", *VHOST_PEERS), front="vhost"),
    "vhost-null": Suite("null", False, RING_READS + PACKED_READS + RING_WRITES,
                        ("gantry-vhost-null", "gantry-vhost-null-iothread", "gantry-vhost-null-iothread-no-poll", "qsd-vhost-null",
                         "qsd-vhost-null-iothread", "qsd-vhost-null-iothread-no-poll"), front="vhost"),
}
DEFAULT_SUITES = ("raw", "qcow2")

# (suite, workload, clients) of --quick, in an order that changes the page cache seldom.
QUICK = (
    ("raw", "randread-4k-qd1", (LOAD,)), ("raw", "randread-4k-qd32", (LOAD, FIO)), ("raw", "read-256k-qd8", (LOAD,)),
    ("raw", "write-256k-qd8", (LOAD,)), ("raw", "randwrite-4k-qd32", (LOAD,)), ("raw", "randwrite-4k-qd32-small", (LOAD,)),
    ("raw", "connect", (LOAD,)), ("raw", "startup", (PROBE,)), ("raw", "idle-rss", (PROBE,)),
    ("qcow2", "randread-4k-qd32", (LOAD,)), ("qcow2", "read-256k-qd8", (LOAD,)),
    ("fuse-raw", "randread-4k-psync", (FIO_FILE,)), ("fuse-raw", "randread-4k-qd32", (FIO_FILE,)),
    ("fuse-raw", "read-1m-qd8", (FIO_FILE,)), ("fuse-raw", "randwrite-4k-psync", (FIO_FILE,)),
    ("fuse-raw", "write-1m-qd8", (FIO_FILE,)), ("fuse-qcow2", "randread-4k-qd32", (FIO_FILE,)),
    ("fuse-qcow2", "randwrite-4k-psync", (FIO_FILE,)),
    ("vhost-raw", "randread-4k-qd1", (VHOST,)), ("vhost-raw", "randread-4k-qd32", (VHOST,)), ("vhost-raw", "read-256k-qd8", (VHOST,)),
    ("vhost-raw", "write-256k-qd8", (VHOST,)), ("vhost-qcow2", "randread-4k-qd32", (VHOST,)),
    ("vhost-null", "randread-4k-qd32", (VHOST,)),
)
QUICK_SERVERS = ("gantry", "gantry-on-raw", "qsd-uring-malloc", "nbdkit", "gantry-fuse", "gantry-fuse-on-raw", "qsd-fuse-uring",
                 "gantry-vhost", "gantry-vhost-on-raw", "qsd-vhost-uring", "gantry-vhost-null", "qsd-vhost-null")
