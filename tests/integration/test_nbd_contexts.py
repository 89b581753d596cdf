#!/usr/bin/python3
"""Meta contexts: dirty bitmaps and allocation depth of an NBD export, over the wire and with the clients people use.
GANTRYD=qemu-storage-daemon runs the same tests against the reference."""
# One configuration: what block status says depends neither on the back end nor on the loops.

import json
import pathlib
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt
import nbd_raw as nbd
from gantry_test import IS_GANTRY, KIB, MIB
from nbd_case import RawCase

BITMAP = "qemu:dirty-bitmap:"
DEPTH = "qemu:allocation-depth"
SIZE = 4 * MIB


class Contexts(RawCase):
    """An overlay `top` over `base`; bitmap `low` on base, `b0` and `b1` on top, all disabled. What was written:

    base 0-1M; top 512K-1M and 3M-3.5M (zeroes) before any bitmap; then, at top, 1M-1M+64K into b0 and b1 and 2M-2M+64K into b1.
    """

    def setUp(self):
        super().setUp()
        gt.require("qemu-img", "qemu-io")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", SIZE)
        self.run_tool("qemu-io", "-c", f"write -P 1 0 {MIB}", "base.qcow2")
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
        self.run_tool("qemu-io", "-c", "write -P 2 512k 512k", "-c", "write -z 3M 512k", "top.qcow2")
        self.server = self.daemon()
        self.q = q = self.server.qmp
        q.cmd("blockdev-add", {"driver": "qcow2", "node-name": "base", "read-only": True,
                               "file": {"driver": "file", "filename": self.path("base.qcow2")}})
        q.cmd("blockdev-add", {"driver": "qcow2", "node-name": "top", "backing": "base",
                               "file": {"driver": "file", "filename": self.path("top.qcow2")}})
        self.socket = self.start_nbd(q)
        self.bitmap("add", "base", "low", disabled=True)
        self.bitmap("add", "top", "b0")
        self.bitmap("add", "top", "b1", persistent=True)
        self.export("w", writable=True)
        self.io("write -P 3 1M 64k")
        self.bitmap("disable", "top", "b0")
        self.io("write -P 4 2M 64k")
        self.bitmap("disable", "top", "b1")
        self.delete("w")

    def bitmap(self, command, node, name, **more):
        return self.q.cmd(f"block-dirty-bitmap-{command}", {"node": node, "name": name, **more})

    def export(self, id, node="top", **more):
        self.q.cmd("block-export-add", {"type": "nbd", "id": id, "node-name": node, "name": id, **more})

    def delete(self, id, **more):
        if not more:
            return self.q.delete_export(id)
        self.q.cmd("block-export-del", {"id": id, **more})
        self.q.event("BLOCK_EXPORT_DELETED", id=id)

    def io(self, *commands, export="w"):
        words = [word for command in commands for word in ("-c", command)]
        return self.run_tool("qemu-io", "-f", "raw", *words, self.uri(self.socket, export)).stdout

    def entered(self, export, *queries, **options):
        client = self.raw()
        client.enter(export, structured=True, queries=queries, **options)
        return client

    def refused(self, text, **arguments):
        kind, found = self.q.error("block-export-add", {"type": "nbd", "id": "x", "node-name": "top", **arguments})
        self.assertEqual(kind, "GenericError")
        if not (IS_GANTRY and found.startswith(text + "; ")):
            self.assertEqual(found, text)

    def listed(self, name):
        for info in self.q.cmd("query-named-block-nodes"):
            for bitmap in info.get("dirty-bitmaps", []):
                if bitmap["name"] == name:
                    return bitmap
        self.fail(name)


def merged(extents):
    out = []
    for length, flags in extents:
        if out and out[-1][1] == flags:
            out[-1][0] += length
        else:
            out.append([length, flags])
    return [tuple(extent) for extent in out]


class Wire(Contexts):
    def test_listing_knows_wildcards_and_setting_does_not(self):
        self.export("e", bitmaps=["b0", "b1", "low"], **{"allocation-depth": True})
        bitmaps = {BITMAP + name for name in ("b0", "b1", "low")}
        everything = bitmaps | {DEPTH, "base:allocation"}
        client = self.raw()
        client.greet()
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
        cases = (
            ([], everything),
            (["base:"], {"base:allocation"}),
            (["qemu:"], bitmaps | {DEPTH}),
            ([BITMAP], bitmaps),
            (["base:", BITMAP + "b0", "base:allocation", BITMAP + "b0"], {"base:allocation", BITMAP + "b0"}),
            (["qemu:", "base:"], everything),
            ([BITMAP + "b"], set()),
            ([BITMAP + "b0:"], set()),
            (["qemu:allocation-depth:"], set()),
            (["nothing", "x:", "x-y:z", "base:allocations", "qemu:dirty"], set()),
            (["x" * 4096, "base:allocation"], {"base:allocation"}),
        )
        for queries, expected in cases:
            found = client.select("e", *queries, option=nbd.OPT_LIST_META)
            self.assertEqual(set(found), expected, queries)
            self.assertEqual(set(found.values()), {0} if found else set())
        for queries in (["base:"], ["qemu:"], [BITMAP], []):
            self.assertEqual(client.select("e", *queries), {})
        chosen = client.select("e", *everything, *everything)
        self.assertEqual(set(chosen), everything)
        self.assertEqual(len(set(chosen.values())), len(everything))

    def test_a_selection_is_not_for_the_next_export_of_the_name(self):
        """Else a backup would be told that nothing is dirty, by a bitmap that is gone."""
        gt.require_gantry("extended headers")
        export = {"type": "nbd", "id": "x", "name": "x", "writable": True, "bitmaps": ["b"]}
        for node in ("old", "new"):
            self.q.cmd("blockdev-add", {"driver": "file", "node-name": node, "filename": self.raw_image(node, MIB)})
            self.bitmap("add", node, "b", granularity=65536)
        self.q.cmd("block-export-add", {**export, "node-name": "old"})
        client = self.raw()
        client.greet()
        self.assertEqual(client.final(nbd.OPT_EXTENDED), nbd.ACK)
        client.select("x", "qemu:dirty-bitmap:b")
        self.delete("x")
        self.q.cmd("blockdev-del", {"node-name": "old"})
        self.q.cmd("block-export-add", {**export, "node-name": "new"})
        self.assertFalse(client.go("x")[1] & nbd.T_STATUS_PAYLOAD)
        client.extended = True
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, MIB), nbd.EINVAL)

    def test_nothing_is_clean_beyond_a_bitmap_of_a_smaller_node(self):
        gt.require_gantry("the reference calls it clean")
        self.q.cmd("blockdev-add", {"driver": "file", "node-name": "small", "filename": self.raw_image("small", MIB)})
        self.bitmap("add", "small", "b", granularity=65536)
        self.export("e", bitmaps=[{"node": "small", "name": "b"}])
        client = self.entered("e", BITMAP + "b")
        self.assertEqual(merged(client.status(0, SIZE)), [(MIB, 0), (SIZE - MIB, 1)])
        self.assertEqual(merged(client.status(2 * MIB, MIB)), [(MIB, 1)])

    def test_contexts_not_asked_for_are_not_there(self):
        self.export("plain")
        client = self.raw()
        client.greet()
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
        self.assertEqual(set(client.select("plain", option=nbd.OPT_LIST_META)), {"base:allocation"})
        self.assertEqual(client.select("plain", DEPTH, BITMAP + "b0"), {})

    def test_listing_needs_no_structured_replies(self):
        gt.require_gantry("the reference wants structured replies first")
        self.export("e", bitmaps=["b0"])
        client = self.raw()
        client.greet()
        self.assertEqual(set(client.select("e", "qemu:", option=nbd.OPT_LIST_META)), {BITMAP + "b0"})
        self.assertEqual(client.final(nbd.OPT_SET_META, nbd.contexts("e", BITMAP + "b0")), nbd.INVALID)

    def test_a_selection_is_for_one_export(self):
        self.export("e", bitmaps=["b0"])
        self.export("f", bitmaps=["b1"])
        client = self.raw()
        client.greet()
        self.assertEqual(client.final(nbd.OPT_STRUCTURED), nbd.ACK)
        self.assertEqual(len(client.select("e", BITMAP + "b0", BITMAP + "b1")), 1)
        client.go("f")
        self.assertEqual(client.ask(nbd.BLOCK_STATUS, 0, 4096), nbd.EINVAL)
        self.assertEqual(client.ask(nbd.READ, 0, 4096), 0)

    def test_each_context_says_what_it_knows(self):
        self.export("e", bitmaps=["b0", "b1", "low"], **{"allocation-depth": True})
        names = ["base:allocation", DEPTH, BITMAP + "b0", BITMAP + "b1", BITMAP + "low"]
        expected = {
            "base:allocation": [(MIB + 64 * KIB, 0), (MIB - 64 * KIB, 3), (64 * KIB, 0), (2 * MIB - 64 * KIB, 3)],
            DEPTH: [(512 * KIB, 2), (512 * KIB + 64 * KIB, 1), (MIB - 64 * KIB, 0), (64 * KIB, 1),
                    (MIB - 64 * KIB, 0), (512 * KIB, 1), (512 * KIB, 0)],
            BITMAP + "b0": [(MIB, 0), (64 * KIB, 1), (3 * MIB - 64 * KIB, 0)],
            BITMAP + "b1": [(MIB, 0), (64 * KIB, 1), (MIB - 64 * KIB, 0), (64 * KIB, 1), (2 * MIB - 64 * KIB, 0)],
            BITMAP + "low": [(SIZE, 0)],
        }
        for name in names:
            self.assertEqual(merged(self.entered("e", name).status(0, SIZE)), expected[name], name)
        client = self.entered("e", *names)
        answer = client.statuses(0, SIZE)
        for name in names:
            self.assertEqual(merged(answer[client.contexts[name]]), expected[name], name)
        # A range that begins inside of an extent; one extent each, not longer than asked for.
        answer = client.statuses(MIB + 4096, MIB, nbd.REQ_ONE)
        for name in names:
            extents = answer[client.contexts[name]]
            self.assertEqual(len(extents), 1)
            self.assertLessEqual(extents[0][0], MIB)
        self.assertEqual(answer[client.contexts[BITMAP + "b0"]], [(60 * KIB, 1)])

    def test_an_enabled_bitmap_shows_what_is_written_meanwhile(self):
        self.bitmap("enable", "top", "b0")
        self.export("e", bitmaps=["b0"], writable=True)
        client = self.entered("e", BITMAP + "b0")
        self.assertEqual(client.ask(nbd.WRITE, 3 * MIB + 512, 512, data=bytes(512)), 0)
        self.assertEqual(client.ask(nbd.WRITE_ZEROES, 0, 1024), 0)
        self.assertEqual(merged(client.status(0, SIZE)),
                         [(64 * KIB, 1), (MIB - 64 * KIB, 0), (64 * KIB, 1), (2 * MIB - 64 * KIB, 0), (64 * KIB, 1),
                          (MIB - 64 * KIB, 0)])

    def fine_bitmap(self, size, count):
        """Export `n` of `size` bytes, in whose bitmap `fine` the first `count` KiB are half dirty each."""
        self.q.cmd("blockdev-add", {"driver": "null-co", "node-name": "n", "read-zeroes": True, "size": size})
        self.bitmap("add", "n", "fine", granularity=512)
        self.export("n", node="n", bitmaps=["fine"], writable=True)
        client = self.entered("n")
        for first in range(0, count, 50):
            for i in range(first, first + 50):
                client.request(nbd.WRITE, i * 1024, 512, data=bytes(512), cookie=i)
            for _ in range(50):
                self.assertEqual(client.reply()[1], 0)

    def resident(self):
        with open(f"/proc/{self.server.process.pid}/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    def test_status_that_nobody_reads_is_bounded_and_disturbs_nobody(self):
        gt.require_gantry("the memory of the reference is its own affair")
        size = 1 << 28
        self.fine_bitmap(size, 70_000)
        before = self.resident()
        lazy = []
        for extended in (False, True):
            client = self.raw()
            client.enter("n", structured=True, extended=extended, queries=["base:allocation", BITMAP + "fine"])
            make = nbd.extended_request if extended else nbd.request
            client.socket.settimeout(0.5)
            try:
                client.send(b"".join(make(nbd.BLOCK_STATUS, 0, size, cookie=i) for i in range(20_000)))
            except TimeoutError:
                pass  # it does not read us any more, which is fine
            lazy.append(client)
        other = self.entered("n", BITMAP + "fine")
        for _ in range(3):
            self.assertEqual(other.status(0, 2048), [(512, 1), (512, 0), (512, 1), (512, 0)])
            self.assertEqual(other.ask(nbd.FLUSH), 0)
        self.assertLess(self.resident() - before, 200 * MIB)
        self.delete("n", mode="hard")
        for client in lazy:
            client.socket.settimeout(20)
            self.assertTrue(client.ends())

    def test_many_runs_come_in_bounded_answers(self):
        size = 1 << 30
        # 200,000 runs: more than the 2^17 extents of one answer.
        count = 100_000
        self.fine_bitmap(size, count)
        client = self.entered("n", BITMAP + "fine")
        at, runs = 0, []
        while at < size:
            extents = client.status(at, size - at)
            self.assertLessEqual(len(extents), 1 << 17)
            runs += extents
            at += sum(length for length, _ in extents)
        self.assertEqual(merged(runs), [(512, 1), (512, 0)] * (count - 1) + [(512, 1), (size - count * 1024 + 512, 0)])


class Exports(Contexts):
    def test_bitmaps_that_cannot_be_exported(self):
        self.refused("Bitmap 'zz' is not found", bitmaps=["zz"])
        self.refused("Node 'zz' not found", bitmaps=[{"node": "zz", "name": "b0"}])
        self.refused("Dirty bitmap 'zz' not found", bitmaps=[{"node": "top", "name": "zz"}])
        self.refused("Bitmap 'b0' is not found", bitmaps=["b0"], **{"node-name": "base"})
        self.bitmap("enable", "top", "b0")
        self.refused("Enabled bitmap 'b0' incompatible with readonly export", bitmaps=["b1", "b0"])
        # None of the failures holds anything.
        for name in ("b0", "b1"):
            self.bitmap("remove", "top", name)

    def test_an_enabled_bitmap_of_a_node_that_is_not_written_is_fine(self):
        self.bitmap("enable", "base", "low")
        self.export("e", bitmaps=["low"])
        self.assertEqual(self.entered("e", BITMAP + "low").status(0, SIZE), [(SIZE, 0)])

    def test_an_exported_bitmap_is_busy(self):
        self.bitmap("add", "top", "other", disabled=True)
        self.export("e", bitmaps=["b0"])
        self.assertTrue(self.listed("b0")["busy"])
        self.assertFalse(self.listed("other")["busy"])
        text = "Bitmap 'b0' is currently in use by another operation and cannot be used"
        for command in ("remove", "clear", "enable", "disable"):
            self.assertEqual(self.q.error(f"block-dirty-bitmap-{command}", {"node": "top", "name": "b0"})[1], text)
        merge = {"node": "top", "target": "b0", "bitmaps": ["other"]}
        self.assertEqual(self.q.error("block-dirty-bitmap-merge", merge)[1], text)
        self.assertEqual(self.q.error("block-dirty-bitmap-merge", {**merge, "target": "other", "bitmaps": ["b0"]})[1], text)
        self.refused(text, bitmaps=["b0"])
        self.refused(text, bitmaps=[{"node": "top", "name": "b0"}])
        self.delete("e")
        self.assertFalse(self.listed("b0")["busy"])
        self.q.cmd("block-dirty-bitmap-merge", merge)
        self.export("e", bitmaps=["b0"])

    def test_clients_that_are_cut_off_let_go_of_the_bitmap(self):
        self.export("e", bitmaps=["b0"])
        client = self.entered("e", BITMAP + "b0")
        self.delete("e", mode="hard")
        self.assertTrue(client.ends())
        self.bitmap("remove", "top", "b0")

    def test_bitmaps_of_other_nodes(self):
        """As a pull backup does it: the bitmap of the disk that is written, on the export of another node."""
        self.q.cmd("blockdev-add", {"driver": "null-co", "node-name": "frozen", "read-zeroes": True, "size": SIZE})
        self.bitmap("enable", "top", "b1")
        self.export("e", node="frozen", bitmaps=[{"node": "top", "name": "b0"}, {"node": "base", "name": "low"}])
        client = self.entered("e", BITMAP + "b0", BITMAP + "low")
        answer = client.statuses(0, SIZE)
        self.assertEqual(answer[client.contexts[BITMAP + "b0"]], [(MIB, 0), (64 * KIB, 1), (3 * MIB - 64 * KIB, 0)])
        self.assertEqual(answer[client.contexts[BITMAP + "low"]], [(SIZE, 0)])

    def test_the_node_of_an_exported_bitmap_stays(self):
        gt.require_gantry("the reference ends with an assertion")
        self.q.cmd("blockdev-add", {"driver": "null-co", "node-name": "a", "size": SIZE})
        self.q.cmd("blockdev-add", {"driver": "null-co", "node-name": "b", "size": SIZE})
        self.bitmap("add", "b", "c", disabled=True)
        self.export("e", node="a", bitmaps=[{"node": "b", "name": "c"}])
        self.assertIn("Node b is in use", self.q.error("blockdev-del", {"node-name": "b"})[1])
        self.delete("e")
        self.q.cmd("blockdev-del", {"node-name": "b"})

    def test_two_bitmaps_of_one_name_cannot_be_told_apart(self):
        gt.require_gantry("the reference offers both under one name")
        self.bitmap("add", "base", "b0", disabled=True)
        self.refused("Bitmap 'b0' is named for node 'top' and for node 'base'",
                     bitmaps=["b0", {"node": "base", "name": "b0"}])
        self.export("e", bitmaps=["b0", "b0", {"node": "top", "name": "b0"}])
        self.assertEqual(len(self.entered("e", BITMAP + "b0").contexts), 1)

    def test_a_stored_bitmap_is_kept_when_its_export_was_used(self):
        self.export("e", bitmaps=["b1"])
        self.assertEqual(len(self.entered("e", BITMAP + "b1").status(0, SIZE)), 5)
        self.server.stop()
        info = json.loads(self.run_tool("qemu-img", "info", "--output=json", "-U", "top.qcow2").stdout)
        self.assertEqual([(b["name"], b["flags"]) for b in info["format-specific"]["data"]["bitmaps"]], [("b1", [])])

    def test_an_inconsistent_bitmap_is_refused(self):
        self.run_tool("qemu-img", "create", "-q", "-f", "qcow2", "torn.qcow2", SIZE)
        self.run_tool("qemu-img", "bitmap", "--add", "torn.qcow2", "t")
        # The flag "in use" of the only entry of the bitmap directory, whose place the header extension names.
        with open(self.path("torn.qcow2"), "r+b") as image:
            data = image.read(1 << 16)
            at = data.index(struct.pack(">II", 0x23852875, 24))
            directory = struct.unpack(">Q", data[at + 24 : at + 32])[0]
            image.seek(directory + 12)
            image.write(struct.pack(">I", 3))
        self.q.cmd("blockdev-add", {"driver": "qcow2", "node-name": "torn", "read-only": True,
                                    "file": {"driver": "file", "filename": self.path("torn.qcow2")}})
        kind, text = self.q.error("block-export-add", {"type": "nbd", "id": "x", "node-name": "torn", "bitmaps": ["t"]})
        self.assertTrue(text.startswith("Bitmap 't' is inconsistent and cannot be used"), text)


class Clients(Contexts):
    def test_libnbd_sees_every_context(self):
        libnbd = gt.libnbd()
        self.export("e", bitmaps=["b0", "b1"], **{"allocation-depth": True})
        h = libnbd.NBD()
        names = ["base:allocation", DEPTH, BITMAP + "b0", BITMAP + "b1"]
        for name in names:
            h.add_meta_context(name)
        h.connect_uri(self.uri(self.socket, "e"))
        for name in names:
            self.assertTrue(h.can_meta_context(name), name)
        seen = {}
        h.block_status(SIZE, 0, lambda name, offset, entries, error: seen.__setitem__(name, list(entries)))
        self.assertEqual(set(seen), set(names))
        self.assertEqual(merged(zip(seen[BITMAP + "b0"][::2], seen[BITMAP + "b0"][1::2])),
                         [(MIB, 0), (64 * KIB, 1), (3 * MIB - 64 * KIB, 0)])
        self.assertEqual(sum(seen[DEPTH][::2]), SIZE)
        h.shutdown()

    def test_qemu_img_map_shows_bitmaps_and_depth(self):
        self.export("e", bitmaps=["b1"], **{"allocation-depth": True})

        def mapped(context):
            options = (f"driver=nbd,server.type=unix,server.path={self.socket},export=e,x-dirty-bitmap={context}")
            return json.loads(self.run_tool("qemu-img", "map", "--output=json", "--image-opts", options).stdout)

        dirty = [(part["start"], part["length"]) for part in mapped(BITMAP + "b1") if not part["data"]]
        self.assertEqual(dirty, [(MIB, 64 * KIB), (2 * MIB, 64 * KIB)])
        # Depth 1: a hole to this client; 2: zero and data; 0: plain data.
        depth = [(part["start"], part["data"], part["zero"]) for part in mapped(DEPTH)]
        self.assertEqual(depth[0], (0, True, True))
        self.assertEqual(depth[1], (512 * KIB, False, False))

    def test_nbdinfo_lists_and_maps(self):
        gt.require("nbdinfo")
        self.export("e", bitmaps=["b0"], **{"allocation-depth": True})
        uri = self.uri(self.socket, "e")
        about = json.loads(self.run_tool("nbdinfo", "--json", uri).stdout)
        self.assertEqual(set(about["exports"][0]["contexts"]), {"base:allocation", DEPTH, BITMAP + "b0"})
        parts = json.loads(self.run_tool("nbdinfo", "--json", "--map=" + BITMAP + "b0", uri).stdout)
        self.assertEqual([(p["offset"], p["length"], p["type"]) for p in parts],
                         [(0, MIB, 0), (MIB, 64 * KIB, 1), (MIB + 64 * KIB, 3 * MIB - 64 * KIB, 0)])


if __name__ == "__main__":
    gt.main()
