"""What is measured: suites (an image and how it is opened) of workloads (what the client does)."""

from dataclasses import dataclass

LOAD, FIO, PROBE, NBDCOPY, NBDINFO, HANDSHAKES = CLIENTS = ("load", "fio", "probe", "nbdcopy", "nbdinfo", "handshakes")


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


def transfer(rw, block, depth, connections=1, folios="large"):
    name = "%s-%s-qd%d" % (rw, block, depth)
    if connections > 1:
        name += "x%d" % connections
    if folios == "small":
        name += "-small"
    return Workload(name, "transfer", rw, block, depth, connections, folios)


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
}
DEFAULT_SUITES = ("raw", "qcow2")

# (suite, workload, clients) of --quick, in an order that changes the page cache seldom.
QUICK = (
    ("raw", "randread-4k-qd1", (LOAD,)), ("raw", "randread-4k-qd32", (LOAD, FIO)), ("raw", "read-256k-qd8", (LOAD,)),
    ("raw", "write-256k-qd8", (LOAD,)), ("raw", "randwrite-4k-qd32", (LOAD,)), ("raw", "randwrite-4k-qd32-small", (LOAD,)),
    ("raw", "connect", (LOAD,)), ("raw", "startup", (PROBE,)), ("raw", "idle-rss", (PROBE,)),
    ("qcow2", "randread-4k-qd32", (LOAD,)), ("qcow2", "read-256k-qd8", (LOAD,)),
)
QUICK_SERVERS = ("gantry", "gantry-on-raw", "qsd-uring-malloc", "nbdkit")
