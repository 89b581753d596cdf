#!/usr/bin/python3
"""Every served QMP command with good and bad arguments: results, exact error texts, events and their order."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

GENERIC = "GenericError"


class Commands(gt.Case):
    def setUp(self):
        super().setUp()
        self.d = self.daemon()
        self.q = self.d.qmp

    def refused(self, text, name, arguments=None, kind=GENERIC, **more):
        """The command fails with `text`, or a hint follows it after a semicolon."""
        found = self.q.error(name, arguments, **more)
        self.assertEqual(found[0], kind, found)
        if found[1] != text and not (gt.IS_GANTRY and found[1].startswith(text + "; ")):
            self.assertEqual(found[1], text)

    def null(self, name="n", **more):
        self.q.cmd("blockdev-add", {"driver": "null-co", "node-name": name, "read-zeroes": True, "size": gt.MIB, **more})

    def nodes(self):
        return [node["node-name"] for node in self.q.cmd("query-named-block-nodes")]

    def exports(self):
        return [export["id"] for export in self.q.cmd("query-block-exports")]

    # --- about itself

    def test_queries_about_itself(self):
        commands = {command["name"] for command in self.q.cmd("query-commands")}
        schema = {entry["name"] for entry in self.q.cmd("query-qmp-schema") if entry["meta-type"] == "command"}
        self.assertEqual(commands, schema)
        for name in ("qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "quit", "blockdev-add",
                     "blockdev-del", "blockdev-reopen", "query-named-block-nodes", "query-block", "query-blockstats",
                     "nbd-server-start", "nbd-server-stop", "block-export-add", "block-export-del", "query-block-exports",
                     "object-add", "object-del", "block_resize"):
            self.assertIn(name, commands)
        self.assertEqual(self.q.cmd("query-block"), [])
        self.assertEqual(self.q.cmd("query-jobs"), [])
        self.assertEqual(self.q.cmd("query-blockstats"), [])

    def test_legacy_queries(self):
        gt.require_gantry("the reference has dropped them")
        self.assertEqual(self.q.cmd("query-status"), {"running": True, "singlestep": False, "status": "running"})
        self.assertIn({"name": "BLOCK_EXPORT_DELETED"}, self.q.cmd("query-events"))
        self.assertEqual(self.q.cmd("query-iothreads"), [])

    def test_what_is_not_served_is_refused_by_name_with_the_reason(self):
        gt.require_gantry("the reference serves them")
        for command in ("blockdev-mirror", "transaction", "block-stream", "migrate", "chardev-add"):
            kind, desc = self.q.error(command)
            self.assertEqual(kind, "CommandNotFound")
            self.assertRegex(desc, f"^The command {command} has not been found; not in this build: .+")
        for driver in ("vmdk", "ssh", "throttle"):
            kind, desc = self.q.error("blockdev-add", driver=driver, node_name="n")
            self.assertRegex(desc, f"^Parameter 'driver' does not accept value '{driver}'; not in this build: .+")
        self.assertRegex(self.q.error("object-add", qom_type="throttle-group", id="s")[1],
                         "^Parameter 'qom-type' does not accept value 'throttle-group'; not in this build: .+")

    # --- nodes

    def test_blockdev_add_checks_arguments_first(self):
        image = self.raw_image("a.raw", gt.MIB)
        for text, arguments in {
            "Parameter 'driver' is missing": {"node-name": "n"},
            "Parameter 'driver' does not accept value 'bogus'": {"driver": "bogus", "node-name": "n"},
            "Parameter 'filename' is missing": {"driver": "file", "node-name": "n"},
            "Parameter 'bogus' is unexpected": {"driver": "null-co", "node-name": "n", "bogus": 1},
            "Invalid parameter type for 'node-name', expected: string": {"driver": "null-co", "node-name": 1},
            "Invalid parameter type for 'size', expected: integer": {"driver": "null-co", "node-name": "n", "size": "1M"},
            "Invalid parameter type for 'read-only', expected: boolean": {"driver": "null-co", "node-name": "n", "read-only": 1},
            "Invalid parameter type for 'cache', expected: object": {"driver": "null-co", "node-name": "n", "cache": True},
            "Parameter 'cache.bogus' is unexpected": {"driver": "null-co", "node-name": "n", "cache": {"bogus": 1}},
            "Parameter 'discard' does not accept value 'x'": {"driver": "null-co", "node-name": "n", "discard": "x"},
            "Parameter 'file' is missing": {"driver": "raw", "node-name": "n"},
            "Invalid parameter type for 'file', expected: BlockdevRef": {"driver": "raw", "node-name": "n", "file": 1},
            "Parameter 'file.filename' is missing": {"driver": "raw", "node-name": "n", "file": {"driver": "file"}},
            "Parameter 'file.bogus' is unexpected": {"driver": "raw", "node-name": "n",
                                                     "file": {"driver": "file", "filename": image, "bogus": 1}},
            "'node-name' must be specified for the root node": {"driver": "null-co"},
            "Invalid node-name: '1n'": {"driver": "null-co", "node-name": "1n"},
            "Invalid node-name: ''": {"driver": "null-co", "node-name": ""},
            "Invalid node-name: 'a b'": {"driver": "null-co", "node-name": "a b"},
            "Node name too long": {"driver": "null-co", "node-name": "n" * 32},
            "Cannot find device='zz' nor node-name='zz'": {"driver": "raw", "node-name": "n", "file": "zz"},
        }.items():
            with self.subTest(text):
                self.refused(text, "blockdev-add", arguments)
        self.assertEqual(self.nodes(), [])
        self.null("n" * 31)
        self.null("A-.z_9")

    def test_blockdev_add_reports_what_it_could_not_open(self):
        os.mkdir(self.path("dir"))
        for name, why in (("none", "No such file or directory"), ("dir", "Is a directory")):
            path = self.path(name)
            kind, desc = self.q.error("blockdev-add", driver="file", node_name="n", filename=path)
            self.assertEqual(kind, GENERIC)
            # The reference says at once that a folder is no regular file.
            self.assertRegex(desc, f"Could not open '{path}': {why}|'file' driver requires '{path}' to be a regular file")
        garbage = self.raw_image("garbage", gt.MIB, gt.text_block)
        before = gt.checksum(garbage)
        self.refused("Image is not in qcow2 format", "blockdev-add", driver="qcow2", node_name="n", read_only=True,
                     file={"driver": "file", "filename": garbage})
        self.assertEqual(gt.checksum(garbage), before)
        self.assertEqual(self.nodes(), [])

    def test_names_are_unique(self):
        self.null()
        self.refused("Duplicate nodes with node-name='n'", "blockdev-add", driver="null-co", node_name="n")
        self.refused("Duplicate nodes with node-name='x'", "blockdev-add", driver="raw", node_name="x",
                     file={"driver": "null-co", "node-name": "x"})
        self.assertEqual(self.nodes(), ["n"])

    def test_query_named_block_nodes(self):
        image = self.raw_image("a.raw", gt.MIB + 512)
        self.q.cmd("blockdev-add", driver="file", node_name="f", filename=image, cache={"direct": False, "no-flush": True})
        self.q.cmd("blockdev-add", driver="raw", node_name="r", file="f", read_only=True)
        self.q.cmd("blockdev-add", driver="raw", node_name="inline", file={"driver": "null-co", "size": gt.GIB})
        nodes = {node["node-name"]: node for node in self.q.cmd("query-named-block-nodes")}
        names = list(nodes)
        self.assertEqual(len(names), 4)
        self.assertEqual([name for name in names if not name.startswith("#block")], ["inline", "r", "f"])  # newest first
        f = nodes["f"]
        self.assertEqual((f["file"], f["drv"], f["ro"], f["backing_file_depth"], f["encrypted"], f["detect_zeroes"],
                          f["write_threshold"]), (image, "file", False, 0, False, "off", 0))
        self.assertEqual(f["cache"], {"writeback": True, "direct": False, "no-flush": True})
        for limit in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"):
            self.assertEqual(f[limit], 0)
        self.assertEqual((f["image"]["filename"], f["image"]["format"], f["image"]["virtual-size"]),
                         (image, "file", gt.MIB + 512))
        self.assertIn("actual-size", f["image"])
        self.assertEqual((nodes["r"]["drv"], nodes["r"]["ro"], nodes["r"]["image"]["format"]), ("raw", True, "raw"))
        self.assertEqual(nodes["inline"]["image"]["virtual-size"], gt.GIB)
        flat = {node["node-name"]: node for node in self.q.cmd("query-named-block-nodes", flat=True)}
        self.assertEqual(set(flat), set(nodes))

    def test_blockdev_del(self):
        self.null("leaf")
        self.q.cmd("blockdev-add", driver="raw", node_name="top", file="leaf")
        self.q.cmd("blockdev-add", driver="raw", node_name="outer", file={"driver": "null-co", "node-name": "inner"})
        self.refused("Parameter 'node-name' is missing", "blockdev-del")
        self.refused("Failed to find node with node-name='zz'", "blockdev-del", node_name="zz")
        self.refused("Block device leaf is in use", "blockdev-del", node_name="leaf")
        self.refused("Node inner is not owned by the monitor", "blockdev-del", node_name="inner")
        self.start_nbd(self.q)
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="top")
        self.refused("Node top is in use", "blockdev-del", node_name="top")
        self.q.cmd("block-export-del", id="e")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.q.cmd("blockdev-del", node_name="top")
        self.q.cmd("blockdev-del", node_name="leaf")
        self.q.cmd("blockdev-del", node_name="outer")
        self.assertEqual(self.nodes(), [])  # inline children go with their parent

    def test_a_deleted_file_node_gives_its_lock_back(self):
        image = self.raw_image("a.raw", gt.MIB)
        node = {"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": image}}
        for _ in range(3):
            self.q.cmd("blockdev-add", node)
            self.q.cmd("blockdev-del", node_name="n")
        gt.require("qemu-io")
        self.run_tool("qemu-io", "-f", "raw", "-c", "write 0 64k", image)

    def test_query_blockstats(self):
        self.null()
        self.q.cmd("blockdev-add", driver="raw", node_name="r", file="n")
        stats = {entry["node-name"]: entry for entry in self.q.cmd("query-blockstats", query_nodes=True)}
        self.assertEqual(set(stats), {"n", "r"})
        self.assertEqual(stats["r"]["parent"]["node-name"], "n")
        for name in ("rd_bytes", "wr_bytes", "unmap_bytes", "rd_operations", "wr_operations", "flush_operations",
                     "wr_highest_offset", "failed_rd_operations", "invalid_wr_operations", "rd_total_time_ns"):
            self.assertEqual(stats["n"]["stats"][name], 0, name)
        self.assertEqual(self.q.cmd("query-blockstats", query_nodes=False), [])

    # --- resize

    def test_block_resize(self):
        image = self.raw_image("a.raw", gt.MIB)
        self.q.cmd("blockdev-add", driver="raw", node_name="r", file={"driver": "file", "filename": image})
        self.q.cmd("block_resize", node_name="r", size=2 * gt.MIB)
        self.assertEqual(os.path.getsize(image), 2 * gt.MIB)
        self.refused("Cannot find device='r' nor node-name=''", "block_resize", device="r", size=512)
        self.q.cmd("block_resize", node_name="r", size=512)
        self.assertEqual(os.path.getsize(image), 512)
        sizes = {node["node-name"]: node["image"]["virtual-size"] for node in self.q.cmd("query-named-block-nodes")}
        self.assertEqual(sizes["r"], 512)
        self.refused("Parameter 'size' is missing", "block_resize", node_name="r")
        self.refused("Parameter 'size' expects a >0 size", "block_resize", node_name="r", size=-1)
        self.refused("Cannot find device='' nor node-name='zz'", "block_resize", node_name="zz", size=512)
        self.assertEqual(self.q.error("block_resize", size=512)[0], GENERIC)
        self.start_nbd(self.q)
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="r", writable=True)
        kind, desc = self.q.error("block_resize", node_name="r", size=gt.MIB)
        self.assertRegex(desc, "^Permission conflict on node 'r': permissions 'resize' are both required by .* "
                               r"and unshared by an unnamed block device \(uses node 'r' as 'root' child\)\.")
        self.assertEqual(os.path.getsize(image), 512)

    def test_a_read_only_node_is_not_resized(self):
        image = self.raw_image("a.raw", gt.MIB)
        self.q.cmd("blockdev-add", driver="raw", node_name="r", read_only=True, file={"driver": "file", "filename": image})
        self.assertEqual(self.q.error("block_resize", node_name="r", size=512)[0], GENERIC)
        self.assertEqual(os.path.getsize(image), gt.MIB)

    # --- reopen

    def test_blockdev_reopen(self):
        image = self.raw_image("a.raw", gt.MIB)
        file = {"driver": "file", "node-name": "f", "filename": image}
        raw = {"driver": "raw", "node-name": "r", "file": "f"}
        self.q.cmd("blockdev-add", {**file, "read-only": True})
        self.q.cmd("blockdev-add", {**raw, "read-only": True})
        self.start_nbd(self.q)
        add = {"type": "nbd", "id": "e", "node-name": "r", "writable": True}
        self.refused("Cannot export read-only node as writable", "block-export-add", add)
        self.assertEqual(self.q.error("blockdev-reopen", options=[{**raw, "read-only": True}, {**file, "read-only": 0}])[1],
                         "Invalid parameter type for 'options[1].read-only', expected: boolean")
        self.q.cmd("blockdev-reopen", options=[file, raw])
        self.assertEqual({node["node-name"]: node["ro"] for node in self.q.cmd("query-named-block-nodes")},
                         {"f": False, "r": False})
        self.q.cmd("block-export-add", add)
        self.q.cmd("block-export-del", id="e")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        # A window over the file, and back: what is not given returns to its default.
        self.q.cmd("blockdev-reopen", options=[{**raw, "offset": 65536, "size": 65536}])
        self.assertEqual(self.size("r"), 65536)
        self.q.cmd("blockdev-reopen", options=[raw])
        self.assertEqual(self.size("r"), gt.MIB)

    def size(self, name):
        return next(node["image"]["virtual-size"] for node in self.q.cmd("query-named-block-nodes")
                    if node["node-name"] == name)

    def test_blockdev_reopen_is_all_or_nothing(self):
        image = self.raw_image("a.raw", gt.MIB)
        file = {"driver": "file", "node-name": "f", "filename": image}
        raw = {"driver": "raw", "node-name": "r", "file": "f"}
        self.q.cmd("blockdev-add", file)
        self.q.cmd("blockdev-add", raw)
        window = {**raw, "offset": 0, "size": 65536}
        self.refused("Failed to find node with node-name='zz'", "blockdev-reopen", options=[window, {**raw, "node-name": "zz"}])
        self.refused("Cannot change the option 'filename'", "blockdev-reopen",
                     options=[window, {**file, "filename": self.raw_image("b.raw", gt.MIB)}])
        self.refused("Parameter 'options[1].bogus' is unexpected", "blockdev-reopen", options=[window, {**raw, "bogus": 1}])
        self.refused("Parameter 'options' is missing", "blockdev-reopen")
        self.assertEqual(self.q.error("blockdev-reopen", options=[{"driver": "raw", "file": "f"}])[0], GENERIC)
        self.assertEqual(self.q.error("blockdev-reopen", options=[{**raw, "driver": "null-co", "file": "f"}])[0], GENERIC)
        self.assertEqual(self.q.error("blockdev-reopen", options=[{**raw, "file": "r"}])[0], GENERIC)  # a cycle
        self.assertEqual(self.size("r"), gt.MIB)
        if gt.IS_GANTRY:  # the reference aborts
            self.assertEqual(self.q.cmd("blockdev-reopen", options=[]), {})

    # --- objects

    def test_objects(self):
        self.q.cmd("object-add", qom_type="iothread", id="t0")
        self.refused("attempt to add duplicate property 't0' to object (type 'container')", "object-add",
                     qom_type="iothread", id="t0")
        self.refused("Parameter 'id' expects an identifier", "object-add", qom_type="iothread", id="0t")
        self.refused("Parameter 'id' is missing", "object-add", qom_type="iothread")
        self.refused("Parameter 'qom-type' is missing", "object-add", id="t")
        self.refused("Parameter 'qom-type' does not accept value 'bogus'", "object-add", qom_type="bogus", id="t")
        self.refused("Parameter 'bogus' is unexpected", "object-add", qom_type="iothread", id="t", bogus=1)
        self.refused("poll-max-ns value must be in range [0, 9223372036854775807]", "object-add", qom_type="iothread",
                     id="t", poll_max_ns=-1)
        self.refused("object 'zz' not found", "object-del", id="zz")
        self.q.cmd("object-del", id="t0")
        self.refused("object 't0' not found", "object-del", id="t0")

    def test_an_iothread_in_use_stays(self):
        gt.require_gantry("the reference deletes it and crashes later")
        for name in ("t0", "t1"):
            self.q.cmd("object-add", qom_type="iothread", id=name, poll_max_ns=0)
        threads = self.q.cmd("query-iothreads")
        self.assertEqual([(thread["id"], thread["poll-max-ns"]) for thread in threads], [("t0", 0), ("t1", 0)])
        for thread in threads:
            self.assertTrue(os.path.exists(f"/proc/{self.d.process.pid}/task/{thread['thread-id']}"))
        self.null()
        self.start_nbd(self.q)
        self.refused('iothread "zz" not found', "block-export-add", type="nbd", id="e", node_name="n", iothread="zz")
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="n", iothread="t0")
        self.refused("object 't0' is in use, can not be deleted", "object-del", id="t0")
        self.q.cmd("object-del", id="t1")
        self.q.cmd("block-export-del", id="e")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.q.cmd("object-del", id="t0")
        self.assertEqual(self.q.cmd("query-iothreads"), [])

    def test_old_form_of_object_add(self):
        gt.require_gantry("the reference has dropped it")
        self.q.cmd("object-add", {"qom-type": "iothread", "id": "t0", "props": {"poll-max-ns": 1}})
        self.assertEqual(self.q.cmd("query-iothreads")[0]["poll-max-ns"], 1)
        self.q.cmd("blockdev-add", {"options": {"driver": "null-co", "node-name": "n"}})
        self.assertEqual(self.nodes(), ["n"])

    # --- jobs

    def test_jobs(self):
        for verb in ("job-pause", "job-resume", "job-cancel", "job-complete", "job-finalize", "job-dismiss"):
            self.refused("Job not found", verb, id="j")
            self.refused("Parameter 'id' is missing", verb)

    # --- the NBD server and exports

    def test_nbd_server(self):
        self.null()
        self.refused("NBD server not running", "nbd-server-stop")
        self.refused("NBD server not running", "block-export-add", type="nbd", id="e", node_name="n")
        self.refused("Parameter 'addr' is missing", "nbd-server-start")
        self.refused("Parameter 'type' does not accept value 'x'", "nbd-server-start",
                     addr={"type": "x", "data": {"path": "/"}})
        self.refused("Parameter 'addr.data.path' is missing", "nbd-server-start", addr={"type": "unix", "data": {}})
        kind, desc = self.q.error("nbd-server-start", addr={"type": "unix", "data": {"path": self.path("no/nbd.sock")}})
        self.assertRegex(desc, "No such file or directory")
        socket_path = self.start_nbd(self.q)
        self.assertTrue(os.path.exists(socket_path))
        self.refused("NBD server already running", "nbd-server-start",
                     addr={"type": "unix", "data": {"path": self.path("other.sock")}})
        for i in range(3):
            self.q.cmd("block-export-add", type="nbd", id=f"e{i}", node_name="n", name=f"x{i}")
        self.q.cmd("nbd-server-stop")
        for i in range(3):
            self.q.event("BLOCK_EXPORT_DELETED", id=f"e{i}")
        self.assertFalse(os.path.exists(socket_path))
        self.assertEqual(self.exports(), [])
        self.start_nbd(self.q)  # and again
        self.q.cmd("block-export-add", type="nbd", id="e0", node_name="n")

    def test_nbd_server_takes_a_flat_address(self):
        gt.require_gantry("an addition of later versions")
        self.q.cmd("nbd-server-start", addr={"type": "unix", "path": self.path("n.sock")}, max_connections=7,
                   handshake_max_seconds=5)
        self.assertTrue(os.path.exists(self.path("n.sock")))

    def test_ports(self):
        gt.require_gantry("the reference binds another port")
        kind, desc = self.q.error("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "99999"}})
        self.assertIn("99999", desc)

    def test_export_add_and_del(self):
        self.null()
        self.null("ro", **{"read-only": True})
        self.start_nbd(self.q)
        good = {"type": "nbd", "id": "e", "node-name": "n"}
        for text, change in {
            "Parameter 'type' is missing": {"type": None},
            "Parameter 'id' is missing": {"id": None},
            "Parameter 'node-name' is missing": {"node-name": None},
            "Parameter 'type' does not accept value 'x'": {"type": "x"},
            "Parameter 'bogus' is unexpected": {"bogus": 1},
            "Invalid block export id": {"id": "0e"},
            "Cannot find device='' nor node-name='zz'": {"node-name": "zz"},
            "Cannot export read-only node as writable": {"node-name": "ro", "writable": True},
        }.items():
            with self.subTest(text):
                arguments = {key: value for key, value in {**good, **change}.items() if value is not None}
                self.refused(text, "block-export-add", arguments)
        long = self.q.error("block-export-add", {**good, "name": "x" * 4097})[1]
        self.assertRegex(long, "^export name '.*' too long")
        long = self.q.error("block-export-add", {**good, "description": "x" * 4097})[1]
        self.assertRegex(long, "^description '.*' too long")
        self.assertEqual(self.exports(), [])
        self.q.cmd("block-export-add", good)
        self.refused("Block export id 'e' is already in use", "block-export-add", good)
        self.refused("NBD server already has export named 'n'", "block-export-add", {**good, "id": "e2"})
        self.q.cmd("block-export-add", {**good, "id": "e2", "name": "", "writable": True})
        self.assertEqual(self.q.cmd("query-block-exports"), [
            {"id": "e2", "type": "nbd", "node-name": "n", "shutting-down": False},
            {"id": "e", "type": "nbd", "node-name": "n", "shutting-down": False}])
        self.refused("Export 'zz' is not found", "block-export-del", id="zz")
        self.refused("Parameter 'mode' does not accept value 'x'", "block-export-del", id="e", mode="x")
        self.q.cmd("block-export-del", id="e", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.q.cmd("block-export-add", good)  # the id is free again

    def test_events_come_in_the_order_of_what_happened(self):
        self.null()
        self.start_nbd(self.q)
        for round in range(20):
            self.q.cmd("block-export-add", type="nbd", id=f"e{round}", node_name="n", name=f"{round}")
            self.q.cmd("block-export-del", id=f"e{round}")
        while len(self.q.events) < 20:
            message = self.q.receive()
            self.q.events.append(message)
        self.assertEqual([event["data"]["id"] for event in self.q.events], [f"e{round}" for round in range(20)])

    # --- quit

    def test_quit(self):
        self.null()
        path = self.start_nbd(self.q)
        for name in ("a", "b"):
            self.q.cmd("block-export-add", type="nbd", id=name, node_name="n", name=name)
        self.assertEqual(self.q.cmd("quit"), {})
        for name in ("a", "b"):
            self.q.event("BLOCK_EXPORT_DELETED", id=name)
        while self.q.receive() is not None:
            pass
        self.assertEqual(self.d.wait(), 0)
        if gt.IS_GANTRY:  # the reference leaves them behind
            self.assertFalse(os.path.exists(path))
        self.assertFalse(os.path.exists(self.d.qmp_path))

    # --- with clients

    def test_export_in_use(self):
        nbd = gt.libnbd()
        self.null()
        path = self.start_nbd(self.q)
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="n", writable=True)
        client = nbd.NBD()
        client.connect_uri(self.uri(path, "n"))
        client.pwrite(b"x" * 512, 0)
        self.refused("export 'e' still in use", "block-export-del", id="e")
        self.refused("export 'e' still in use", "block-export-del", id="e", mode="safe")
        client.pwrite(b"x" * 512, 0)  # the refusal changed nothing
        self.assertEqual(len(self.exports()), 1)
        self.q.cmd("block-export-del", id="e", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED", id="e")
        with self.assertRaises(nbd.Error):
            for _ in range(2):
                client.pread(512, 0)
        self.q.cmd("blockdev-del", node_name="n")
        self.assertEqual(self.nodes(), [])

    def test_commands_while_clients_work(self):
        nbd = gt.libnbd()
        image = self.raw_image("a.raw", gt.MIB)
        self.q.cmd("blockdev-add", driver="file", node_name="f", filename=image)
        self.q.cmd("blockdev-add", driver="raw", node_name="r", file="f")
        path = self.start_nbd(self.q)
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="r", writable=True)
        clients = [nbd.NBD() for _ in range(3)]
        for client in clients:
            client.connect_uri(self.uri(path, "r"))
        for round in range(30):
            data = bytes([round + 1]) * 65536
            clients[round % 3].pwrite(data, 65536 * (round % 16))
            # Reopening drains and undrains under the connected clients.
            self.q.cmd("blockdev-reopen", options=[{"driver": "raw", "node-name": "r", "file": "f",
                                                    "detect-zeroes": "on" if round % 2 else "off"}])
            name = f"x{round}"
            self.null(name)
            self.q.cmd("block-export-add", type="nbd", id=name, node_name=name)
            self.assertEqual(bytes(clients[(round + 1) % 3].pread(65536, 65536 * (round % 16))), data)
            self.q.cmd("block-export-del", id=name)
            self.q.event("BLOCK_EXPORT_DELETED", id=name)
            self.q.cmd("blockdev-del", node_name=name)
        kind, desc = self.q.error("blockdev-reopen", options=[
            {"driver": "raw", "node-name": "r", "file": "f", "read-only": True}])
        self.assertEqual(kind, GENERIC)  # a writer is connected
        clients[0].flush()
        stats = {entry["node-name"]: entry["stats"] for entry in self.q.cmd("query-blockstats", query_nodes=True)}
        if gt.IS_GANTRY:  # the reference counts devices only
            self.assertEqual((stats["r"]["wr_bytes"], stats["r"]["wr_operations"]), (30 * 65536, 30))
            self.assertEqual((stats["r"]["rd_bytes"], stats["r"]["rd_operations"]), (30 * 65536, 30))
            self.assertEqual(stats["r"]["flush_operations"], 1)
        for client in clients:
            client.shutdown()


if __name__ == "__main__":
    gt.main()
