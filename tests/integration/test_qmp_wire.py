#!/usr/bin/python3
"""The QMP wire protocol: greeting, negotiation, malformed input, recovery, ids, out of band, several clients, clients that misbehave."""

import json
import pathlib
import re
import socket
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

SENTINEL = '{"execute": "query-version", "id": "sentinel"}'
NEGOTIATE = "Expecting capabilities negotiation with 'qmp_capabilities'"


class Wire(gt.Case):
    def setUp(self):
        super().setUp()
        self.d = self.daemon()
        self.q = self.d.qmp

    def answers(self, text, reset=True):
        """Every reply to `text`, (class, desc) for errors. A control byte forgets what `text` left unfinished."""
        data = text.encode() if isinstance(text, str) else text
        self.q.send(data + (b"\x01" if reset else b"") + SENTINEL.encode())
        found = []
        while True:
            reply = self.q.reply()
            self.assertIsNotNone(reply, "the connection ended")
            if reply.get("id") == "sentinel":
                break
            found.append((reply["error"]["class"], reply["error"]["desc"]) if "error" in reply else reply["return"])
        if reset:
            self.assertEqual(found.pop(), ("GenericError", "JSON parse error, stray '\x01'"))
        return found

    def test_greeting(self):
        greeting = self.q.greeting["QMP"]
        self.assertEqual(set(greeting), {"version", "capabilities"})
        self.assertEqual(greeting["capabilities"], ["oob"])
        self.assertEqual(set(greeting["version"]), {"qemu", "package"})
        self.assertEqual(set(greeting["version"]["qemu"]), {"major", "minor", "micro"})
        self.assertIsInstance(greeting["version"]["package"], str)
        self.assertEqual(self.q.cmd("query-version"), greeting["version"])

    def test_one_message_is_one_line_of_ascii(self):
        self.q.ask(json.dumps({"execute": "query-commands", "id": "\u00fc\U0001F600\u0001\t\"\\"}, ensure_ascii=False))
        self.assertTrue(self.q.raw.endswith(b"\r\n"))
        lines = self.q.raw.split(b"\r\n")
        self.assertEqual(len(lines), 4)  # greeting, negotiation, reply, nothing
        self.assertIn(rb'"id": "\u00FC\uD83D\uDE00\u0001\t\"\\"', lines[2])
        self.assertIn(b'"return": [{"name": "', lines[2])
        self.assertNotRegex(lines[2], rb'[^\x20-\x7e]|":[^ ]|,[^ ]')

    def test_negotiation(self):
        q = self.second(negotiate=False)
        for command in ("query-version", "quit", "query-commands", "no-such-command"):
            self.assertEqual(q.error(command), ("CommandNotFound", NEGOTIATE))
        self.assertEqual(q.error("qmp_capabilities", enable=["foo"]),
                         ("GenericError", "Parameter 'null' does not accept value 'foo'"))
        self.assertEqual(q.error("qmp_capabilities", bogus=1), ("GenericError", "Parameter 'bogus' is unexpected"))
        self.assertEqual(q.error("query-version"), ("CommandNotFound", NEGOTIATE))
        self.assertEqual(q.cmd("qmp_capabilities", enable=[]), {})
        self.assertIn("qemu", q.cmd("query-version"))
        self.assertEqual(q.error("qmp_capabilities"),
                         ("CommandNotFound", "Capabilities negotiation is already complete, command ignored"))
        q.close()
        q = self.second(negotiate=False)  # forgotten with the connection
        self.assertEqual(q.error("query-version"), ("CommandNotFound", NEGOTIATE))

    def second(self, **options):
        """Another client, also where a socket serves one at a time."""
        if not gt.IS_GANTRY:
            self.q.close()
        self.q = self.d.monitor(**options)
        return self.q

    def test_malformed_requests(self):
        generic = "GenericError"
        for text, error in {
            '{"execute": "no-such"}': ("CommandNotFound", "The command no-such has not been found"),
            '{"execute": "QUERY-VERSION"}': ("CommandNotFound", "The command QUERY-VERSION has not been found"),
            '{"execute": "query_version"}': ("CommandNotFound", "The command query_version has not been found"),
            '{"execute": "query-version", "bogus": 1}': (generic, "QMP input member 'bogus' is unexpected"),
            '{"execute": "query-version", "arguments": null}': (generic, "QMP input member 'arguments' must be an object"),
            '{"execute": "query-version", "arguments": []}': (generic, "QMP input member 'arguments' must be an object"),
            '{"execute": 1}': (generic, "QMP input member 'execute' must be a string"),
            '{}': (generic, "QMP input lacks member 'execute'"),
            '{"execute": "query-version", "arguments": {"x": 1}}': (generic, "Parameter 'x' is unexpected"),
            '{"exec-oob": "query-version"}': (generic, "QMP input member 'exec-oob' is unexpected"),
        }.items():
            with self.subTest(text):
                self.assertEqual(self.answers(text), [error])
                # The id comes back in errors too.
                reply = self.q.ask(text.replace("}", ', "id": [1]}', 1) if text != "{}" else '{"id": [1]}') \
                    if '"arguments": {' not in text else None
                if reply:
                    self.assertEqual((reply["error"]["class"], reply["error"]["desc"], reply["id"]), (*error, [1]))
        for text in ("[1]", '"text"', "1", "true", "null"):
            with self.subTest(text):
                self.assertEqual(self.answers(text + " "), [(generic, "QMP input must be a JSON object")])

    def test_ids_come_back_unchanged(self):
        for sent in ("null", "true", "0", "-9223372036854775808", "18446744073709551615", '"x"', '{"a": [null, {}]}', "[]",
                     "1.5", '""'):
            reply = self.q.ask('{"execute": "query-version", "id": %s}' % sent)
            self.assertEqual(json.dumps(reply["id"]), json.dumps(json.loads(sent)))
            self.assertIn(f'"id": {sent}'.encode(), self.q.raw.split(b"\r\n")[-2])
        self.q.ask('{"execute": "query-version", "id": 1.5e3}')
        self.assertIn(b'"id": 1500}', self.q.raw.split(b"\r\n")[-2])
        beyond = self.q.ask('{"execute": "query-version", "id": -9223372036854775809}')["id"]
        self.assertEqual((type(beyond), beyond), (float, -9223372036854775809.0))
        self.assertNotIn("id", self.q.ask('{"execute": "query-version"}'))

    def test_json_dialect(self):
        parse = "JSON parse error, "
        for text, desc in {
            "{'execute': 'query-version', 'id': nan}": parse + "invalid keyword 'nan'",
            '{"a": 1, "a": 2}': parse + "duplicate key",
            '{"a": 1,}': parse + "expecting value",
            '{"a": }': parse + "expecting value",
            '{"a" 1}': parse + "missing : in object pair",
            r'{"a": "\x41"}': parse + "invalid escape sequence in string",
            r'{"a": "\ud800"}': parse + r"\ud800 is not a valid Unicode character",
            "}": parse + "expecting value",
            "[" * 1025: "JSON nesting depth limit exceeded",
        }.items():
            with self.subTest(text[:40]):
                self.assertEqual([desc for _, desc in self.answers(text)][:1], [desc])
        self.assertEqual([desc for _, desc in self.answers("/* */")][:1], [parse + "stray '/'"])
        self.assertEqual([desc for _, desc in self.answers("01 ")][:1], [parse + "stray '01'"])
        self.assertEqual(self.answers(b'{"a": "\xc3\x28"}')[0][1], parse + "invalid UTF-8 sequence in string")
        for text in (r"""{'execute': 'query-version', 'id': 'it\'s "it"'}""", r"""{"execute": "query-version", "id": "it's \"it\""}"""):
            self.assertEqual(self.q.ask(text)["id"], "it's \"it\"")
        self.assertEqual(self.q.ask(r'{"execute": "query-version", "id": "\u0041\/\b\f\n\r\t\ud83d\ude00"}')["id"],
                         "A/\b\f\n\r\t\U0001F600")
        self.assertEqual(self.q.ask('{"execute": "query-version", "id": %s}' % ("[" * 1000 + "]" * 1000))["id"],
                         json.loads("[" * 1000 + "]" * 1000))

    def test_a_number_too_large_for_a_double_is_never_echoed_as_broken_json(self):
        gt.require_gantry("the reference answers 'inf', which is no JSON")
        self.q.send('{"execute": "query-version", "id": 9e999}' + SENTINEL)
        replies = [self.q.reply(), self.q.reply()]
        self.assertIn("error", replies[0])
        self.assertEqual(replies[1]["id"], "sentinel")

    def test_recovery_keeps_the_order(self):
        self.q.send('{"execute": "query-version", "id": 1} garbage {"execute": "query-version", "id": 2}{"bogus": 1, "id": 3}'
                    '{"execute": "query-version", "id": 4}[]{"execute": "query-version", "id": 5}')
        seen = []
        while not seen or seen[-1] != 5:
            reply = self.q.reply()
            seen.append(reply.get("id", reply.get("error", {}).get("desc")))
        self.assertEqual(seen, [1, "JSON parse error, invalid keyword 'garbage'", 2, 3, 4, "QMP input must be a JSON object", 5])

    def test_a_control_byte_forgets_unfinished_input(self):
        for reset, shown in ((b"\x01", "\x01"), (b"\xff", None)):
            self.q.send(b'{"execute": "quit", "arguments": {' + reset)
            error = self.q.reply()["error"]["desc"]
            self.assertRegex(error, "^JSON parse error, stray ")
            if shown:
                self.assertIn(shown, error)
            self.assertEqual(self.q.ask('{"execute": "query-version", "id": 1}')["id"], 1)

    def test_byte_by_byte_and_all_at_once(self):
        for byte in b'{"execute" : "query-version" , "id" : "slow" }':
            self.q.send(bytes([byte]))
        self.assertEqual(self.q.reply()["id"], "slow")
        self.q.send("".join('{"execute": "query-commands", "id": %d}' % i for i in range(200)))
        self.assertEqual([self.q.reply()["id"] for _ in range(200)], list(range(200)))

    def test_out_of_band(self):
        q = self.second(enable=["oob"])
        reply = q.ask('{"exec-oob": "query-version", "id": 1}')
        self.assertEqual(reply, {"id": 1, "error": {"class": "GenericError",
                                                    "desc": "The command query-version does not support OOB"}})
        reply = q.ask('{"exec-oob": "no-such", "id": 2}')
        self.assertEqual(reply["error"], {"class": "CommandNotFound", "desc": "The command no-such has not been found"})
        reply = q.ask('{"exec-oob": "query-version", "execute": "query-version", "id": 3}')
        self.assertEqual(reply["error"]["desc"], "QMP input member 'execute' clashes with 'exec-oob'")
        self.assertIn("qemu", q.cmd("query-version"))

    def test_a_client_that_leaves_ends_only_its_session(self):
        self.q.close()
        q = self.d.monitor(negotiate=False)
        q.send('{"execute": "qmp_capabilities"}{"execute": "query-version"')
        q.close()
        self.q = self.d.monitor()
        self.assertIn("qemu", self.q.cmd("query-version"))

    def test_events_have_a_wall_clock_time(self):
        import time
        self.q.cmd("blockdev-add", driver="null-co", node_name="n", read_zeroes=True)
        self.start_nbd(self.q)
        self.q.cmd("block-export-add", type="nbd", id="e", node_name="n")
        before = time.time()
        self.q.cmd("block-export-del", id="e")
        event = self.q.event("BLOCK_EXPORT_DELETED", id="e")
        self.assertEqual(set(event), {"timestamp", "event", "data"})
        self.assertEqual(set(event["timestamp"]), {"seconds", "microseconds"})
        self.assertEqual(event["data"], {"id": "e"})
        sent = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        self.assertTrue(before - 1 < sent < time.time() + 1)


class Monitors(gt.Case):
    def test_pretty(self):
        path = self.path("pretty.sock")
        self.daemon("--chardev", f"socket,id=p,path={path},server=on,wait=off", "--monitor", "chardev=p,pretty=on")
        q = gt.Qmp(path)
        q.cmd("query-version")
        self.assertTrue(q.raw.startswith(b'{\r\n    "QMP": {\r\n        "version": {\r\n'), q.raw[:80])
        self.assertTrue(q.raw.endswith(b"}\r\n"))
        self.assertIn(b'"return": {\r\n    }', q.raw)
        self.assertNotIn(b"\n", q.raw.replace(b"\r\n", b""))

    def test_monitors_on_several_sockets(self):
        paths = [self.path(f"m{i}.sock") for i in range(3)]
        options = []
        for i, path in enumerate(paths):
            options += ["--chardev", f"socket,id=m{i},path={path},server=on,wait=off", "--monitor", f"chardev=m{i}"]
        self.daemon(*options)
        monitors = [gt.Qmp(path) for path in paths[:2]] + [gt.Qmp(paths[2], negotiate=False)]
        monitors[0].cmd("blockdev-add", driver="null-co", node_name="n")
        self.start_nbd(monitors[1])
        monitors[1].cmd("block-export-add", type="nbd", id="e", node_name="n")
        monitors[0].cmd("block-export-del", id="e")
        for q in monitors[:2]:
            q.event("BLOCK_EXPORT_DELETED", id="e")
        # No event before negotiation: the next message is a reply.
        monitors[2].send('{"execute": "query-version", "id": 1}')
        self.assertEqual(monitors[2].receive()["error"]["class"], "CommandNotFound")

    def test_several_clients_share_a_socket(self):
        gt.require_gantry("the reference serves one client per socket at a time")
        d = self.daemon()
        clients = [d.monitor() for _ in range(20)]
        silent = d.monitor(negotiate=False)
        clients[3].cmd("blockdev-add", driver="null-co", node_name="n")
        for q in clients:
            self.assertEqual([node["node-name"] for node in q.cmd("query-named-block-nodes")], ["n"])
        self.assertEqual(silent.error("query-version")[0], "CommandNotFound")
        self.start_nbd(d.qmp)
        d.qmp.cmd("block-export-add", type="nbd", id="e", node_name="n")
        clients[7].cmd("block-export-del", id="e")
        for q in clients:
            q.event("BLOCK_EXPORT_DELETED", id="e")

    def test_half_closed_client_gets_its_answers(self):
        d = self.daemon()
        d.qmp.close()
        q = d.monitor(negotiate=False)
        q.send('{"execute": "qmp_capabilities", "id": 1}{"execute": "query-qmp-schema", "id": 2}{"execute": "query-version", "id": 3}')
        q.socket.shutdown(socket.SHUT_WR)
        self.assertEqual([q.reply()["id"] for _ in range(3)], [1, 2, 3])
        self.assertIsNone(q.receive())

    def stall(self, daemon):
        """A client that asks for more than any socket buffer holds and never reads."""
        q = daemon.monitor()
        q.socket.setblocking(False)
        request = b'{"execute": "query-qmp-schema"}' * 64
        try:
            while True:
                q.socket.send(request)
        except BlockingIOError:
            return q

    def test_a_client_that_never_reads_disturbs_nobody(self):
        gt.require_gantry("the reference serves one client per socket at a time")
        d = self.daemon()
        stalled = [self.stall(d) for _ in range(3)]
        d.qmp.cmd("blockdev-add", driver="null-co", node_name="n")
        self.assertEqual(len(d.qmp.cmd("query-named-block-nodes")), 1)
        self.assertLess(self.memory(d), 400 * gt.MIB)
        d.stop()  # and it does not hold up the end
        for q in stalled:
            q.close()

    def test_quit_ends_with_stalled_clients(self):
        gt.require_gantry("the reference serves one client per socket at a time")
        d = self.daemon()
        stalled = self.stall(d)
        d.qmp.send('{"execute": "quit", "id": 1}')
        self.assertEqual(d.qmp.reply()["id"], 1)
        self.assertIsNone(d.qmp.receive())
        self.assertEqual(d.wait(), 0)
        stalled.close()

    def memory(self, daemon):
        status = pathlib.Path(f"/proc/{daemon.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def test_huge_tokens_are_refused_without_eating_memory(self):
        gt.require_gantry("takes the reference long")
        d = self.daemon()
        q = d.monitor()
        q.send(b'{"execute": "')
        block = b"x" * (1 << 20)
        for _ in range(72):  # one token may have 64 MiB
            q.send(block)
        q.send(b"\x01" + SENTINEL.encode())
        descs = []
        while True:
            reply = q.reply()
            if reply.get("id") == "sentinel":
                break
            descs.append(reply["error"]["desc"])
        self.assertTrue(descs)
        self.assertTrue(all(desc.startswith("JSON ") for desc in descs), descs)


if __name__ == "__main__":
    gt.main()
