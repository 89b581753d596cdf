"""Tests of operations on images that a daemon has open: making images, opening them, looking at them from outside, jobs."""

import json
import threading

import gantry_test as gt

SECRETS = [word for id, data in (("s0", "zero"), ("s1", "one"), ("s2", "two"))
           for word in ("--object", f"secret,id={id},data={data}")]


class Images(gt.Case):
    """A daemon, and images that it opens and qemu-img looks at."""

    def setUp(self):
        super().setUp()
        gt.require("qemu-img", "qemu-io")
        self.d = self.daemon(*SECRETS)
        self.q = self.d.qmp

    def make(self, name, *words, size="4M", options=""):
        create = ["create", "-q", "-f", "qcow2", *words]
        if options:
            create += ["-o", options]
        path = self.path(name)
        self.run_tool("qemu-img", *create, path, *([size] if size else []))
        return path

    def open(self, node, path, protocol=None, **options):
        file = {"driver": "file", "filename": path, **(protocol or {})}
        self.q.cmd("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file, **options})
        return node

    def open_for_reading(self, node, path):
        self.open(node, path, {"read-only": True}, **{"read-only": True})

    def close(self, node):
        self.q.cmd("blockdev-del", node_name=node)

    def node(self, name, **options):
        return next(n for n in self.q.cmd("query-named-block-nodes", options) if n["node-name"] == name)

    def image(self, name):
        return self.node(name)["image"]

    def qemu_info(self, path, *words):
        return json.loads(self.run_tool("qemu-img", "info", "--output=json", *words, path).stdout)

    def io(self, path, *commands):
        self.run_tool("qemu-io", "-f", "qcow2", *[word for c in commands for word in ("-c", c)], path)

    def assert_clean(self, path):
        self.run_tool("qemu-img", "check", "-q", path)

    def refused(self, text, command, /, **arguments):
        """The command fails with `text`, or in our daemon a hint follows it after a semicolon."""
        kind, found = self.q.error(command, **arguments)
        self.assertEqual(kind, "GenericError")
        if found != text and not (gt.IS_GANTRY and found.startswith(text + "; ")):
            self.assertEqual(found, text)

    def job(self, command, **arguments):
        """Runs a job to its end: (its error, its statuses)."""
        for _ in range(40):
            error, statuses = self.one_job(command, **arguments)
            # The reference measures its own speed, and gives up when the kernel counted none of its time.
            if gt.IS_GANTRY or "Unable to get accurate CPU usage" not in error:
                break
        return error, statuses

    def one_job(self, command, **arguments):
        self.q.cmd(command, job_id="j", **arguments)
        concluded = gt.wait_for(lambda: [j for j in self.q.cmd("query-jobs") if j["status"] == "concluded"], "the job")[0]
        self.assertEqual(concluded["current-progress"], concluded["total-progress"])
        self.assertEqual(command.rpartition("-")[2], concluded["type"])
        self.q.cmd("job-dismiss", id="j")
        statuses = []
        while "null" not in statuses:
            statuses.append(self.q.event("JOB_STATUS_CHANGE", id="j")["data"]["status"])
        return concluded.get("error", ""), statuses


class Writer(threading.Thread):
    """Writes numbers over NBD, one block after the other, around and around; the n-th write puts n into its block."""

    BLOCK, COUNT = 4096, 512

    def __init__(self, uri):
        super().__init__()
        self.client = gt.libnbd().NBD()
        self.client.connect_uri(uri)
        self.begun = self.done = 0
        self.error, self.ending = None, threading.Event()

    def run(self):
        try:
            while not self.ending.is_set():
                self.begun += 1
                data = self.begun.to_bytes(8, "big") * (self.BLOCK // 8)
                self.client.pwrite(data, self.begun % self.COUNT * self.BLOCK)
                self.done = self.begun
        except Exception as error:  # pylint: disable=broad-except
            self.error = error

    def finish(self):
        self.ending.set()
        self.join()
        if self.error:
            raise self.error
        self.client.shutdown()

    @classmethod
    def contents_after(cls, writes):
        disk = bytearray(cls.BLOCK * cls.COUNT)
        for n in range(max(1, writes - cls.COUNT + 1), writes + 1):
            at = n % cls.COUNT * cls.BLOCK
            disk[at : at + cls.BLOCK] = n.to_bytes(8, "big") * (cls.BLOCK // 8)
        return bytes(disk)
