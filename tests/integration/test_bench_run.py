#!/usr/bin/env python3
"""bench/run: a tiny run against real servers gives a complete table, and bounds are judged rightly."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.abspath(os.environ.get("GANTRY_BUILD", os.path.join(ROOT, "build", "debug")))
RUN = os.path.join(ROOT, "bench", "run")

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "bench"))
from harness import report  # noqa: E402


def record(server, round_number, value, cpu=None, ours=False, lower_is_better=False):
    return {"suite": "raw", "workload": "w", "client": "load", "server": server, "ours": ours, "round": round_number,
            "unit": "IOPS", "lower_is_better": lower_is_better, "value": value, "cpu_us": cpu}


class Report(unittest.TestCase):
    def test_ratio_pairs_the_rounds_with_the_best_peer(self):
        group = report.Group([record("slow", 0, 50), record("fast", 0, 100), record("gantry", 0, 200, ours=True),
                              record("slow", 1, 50), record("fast", 1, 10), record("gantry", 1, 30, ours=True),
                              record("slow", 2, 50), record("fast", 2, 100), record("gantry", 2, 250, ours=True)])
        self.assertEqual(group.best_peer(), "fast")
        self.assertEqual(group.ratio("gantry"), 2.5)
        self.assertEqual(group.ratio("gantry", "slow"), 4)
        self.assertIsNone(group.ratio("gantry", "absent"))

    def test_ratio_of_times_is_turned_round(self):
        group = report.Group([record("peer", 0, 30, lower_is_better=True),
                              record("gantry", 0, 10, ours=True, lower_is_better=True)])
        self.assertEqual(group.ratio("gantry"), 3)

    def test_cpu_ratio_takes_the_most_frugal_peer(self):
        group = report.Group([record("fast", 0, 100, cpu=8), record("frugal", 0, 50, cpu=4),
                              record("gantry", 0, 200, cpu=2, ours=True)])
        self.assertEqual(group.best_peer(), "fast")
        self.assertEqual(group.cpu_ratio("gantry"), 0.5)

    def test_page_is_updated_between_its_marks_only(self):
        with tempfile.NamedTemporaryFile("w+") as page:
            page.write("before\n%s\nold\n%s\nafter\n" % (report.BEGIN, report.END))
            page.flush()
            report.update_page(page.name, "new\n")
            report.update_page(page.name, "newest\n")
            with open(page.name) as file:
                self.assertEqual(file.read(), "before\n%s\n\nnewest\n\n%s\nafter\n" % (report.BEGIN, report.END))
        with tempfile.NamedTemporaryFile("w+") as page:
            self.assertRaises(ValueError, report.update_page, page.name, "new\n")

    def test_shipped_bounds_can_be_read(self):
        bounds = report.read_bounds(os.path.join(ROOT, "bench", "bounds"))
        self.assertIn(("raw", "randread-4k-qd32", 3.0), [(bound.suite, bound.workload, bound.limit) for bound in bounds])


class Run(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory(dir=BUILD)  # beside the build: /tmp may be in memory
        self.addCleanup(self.directory.cleanup)
        self.results = os.path.join(self.directory.name, "results.jsonl")

    def bench(self, *arguments):
        environment = {**os.environ, "BENCH_DIR": self.directory.name, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run([RUN, *arguments], capture_output=True, text=True, timeout=300, env=environment)

    def measure(self, *arguments):
        done = self.bench("--build=" + BUILD, "--size=8", "--runtime=0.05", "--rounds=2", "--tries=1", "--suite=raw",
                          "--output=" + self.results, *arguments)
        return done

    def test_results_are_complete_and_reported(self):
        ours = ["gantry"] if os.path.exists(os.path.join(BUILD, "gantryd")) else []
        use = ours + ["qsd-uring", "nbdkit"]
        workloads = ["randread-4k-qd32", "randwrite-4k-qd32-small", "connect", "startup", "idle-rss"]
        done = self.measure("--servers=" + ",".join(use), "--workload=" + ",".join(workloads), "--clients=load,probe")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("! ", done.stderr)
        with open(self.results) as file:
            machine, *records = [json.loads(line) for line in file]
        self.assertIn("kernel", machine["machine"])
        found = sorted((one["workload"], one["round"], one["server"]) for one in records)
        self.assertEqual(found, sorted((workload, number, server) for workload in workloads for number in (0, 1)
                                       for server in use))
        self.assertTrue(all(one["value"] > 0 for one in records), records)
        # Interleaved: each round has all servers.
        self.assertEqual([one["server"] for one in records[:2 * len(use)]], [record["server"] for record in records[:len(use)]] * 2)
        text = self.bench("report", self.results).stdout
        for server in use:
            self.assertIn("| randread-4k-qd32 | load | %s |" % server, text)

    def test_files_are_compared_with_the_image_itself(self):
        if not os.access("/dev/fuse", os.W_OK) or not shutil.which("fio"):
            self.skipTest("needs /dev/fuse and fio")
        done = self.measure("--suite=fuse-raw", "--servers=file,qsd-fuse-uring", "--workload=randread-4k-psync,write-1m-qd8,startup")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("! ", done.stderr)
        group = report.Results.load(self.results).groups()["fuse-raw", "randread-4k-psync", "fio-file"]
        self.assertEqual(group.best_peer(), "qsd-fuse-uring")  # the image itself is no peer
        self.assertGreater(group.median("qsd-fuse-uring", "cpu_us"), 0)
        self.assertIsNotNone(group.ratio("qsd-fuse-uring", "file"))
        with open("/proc/self/mountinfo") as mounts:
            self.assertNotIn(self.directory.name, mounts.read())

    def test_disks_of_virtual_machines_are_compared(self):
        use = ["qsd-vhost-uring", "qsd-vhost-uring-iothread"]
        done = self.measure("--suite=vhost-raw", "--servers=" + ",".join(use),
                            "--workload=randread-4k-qd32,read-256k-qd8-pages,randread-4k-qd1-packed,startup")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("! ", done.stderr)
        groups = report.Results.load(self.results).groups()
        for server in use:
            self.assertGreater(groups["vhost-raw", "randread-4k-qd32", "vhost"].median(server, "value"), 0)
            self.assertGreater(groups["vhost-raw", "read-256k-qd8-pages", "vhost"].median(server, "value"), 0)
            self.assertGreater(groups["vhost-raw", "startup", "probe"].median(server, "value"), 0)
        self.assertNotIn(("vhost-raw", "randread-4k-qd1-packed", "vhost"), groups)  # qemu-storage-daemon has no packed rings

    def test_missed_bound_is_an_error(self):
        bounds = os.path.join(self.directory.name, "bounds")
        with open(bounds, "w") as file:
            file.write("raw/startup probe nbdkit value <= 0.001  # nobody starts in a microsecond\n"
                       "raw/startup probe nbdkit value <= 100000\n"
                       "raw/randread-4k-qd1 load nbdkit value >= 1\n")
        done = self.measure("--servers=nbdkit", "--workload=startup", "--check=" + bounds)
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        self.assertIn("MISSED   raw/startup probe nbdkit value <= 0.001", done.stdout)
        self.assertIn("ok       raw/startup probe nbdkit value <= 100000", done.stdout)
        self.assertIn("not run  raw/randread-4k-qd1", done.stdout)

    def test_unknown_names_are_refused(self):
        for option in ("--suite=raw,rare", "--workload=swim", "--servers=nobody"):
            done = self.measure(option)
            self.assertEqual(done.returncode, 1)
            self.assertIn("unknown ", done.stderr)


if __name__ == "__main__":
    for tool in (os.path.join(BUILD, "gantry-bench-load"), os.path.join(BUILD, "gantry-bench-vhost"), "nbdkit", "qemu-storage-daemon"):
        if not shutil.which(tool):
            print("skipped: %s is missing" % tool)
            sys.exit(77)
    unittest.main()
