#!/usr/bin/python3
"""query-qmp-schema: every type is reachable, and the argument checker enforces what the schema says, for every command."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import gantry_test as gt

BUILTINS = {"str": "string", "int": "int", "number": "number", "bool": "boolean", "null": "null", "any": "value"}
# What an error calls the type that was expected.
EXPECTED = {"string": "string", "int": "integer", "number": "number", "boolean": "boolean"}
DEPTH = 4  # of unions within unions whose members are tried


class Schema(gt.Case):
    def setUp(self):
        super().setUp()
        self.q = self.daemon().qmp
        entries = self.q.cmd("query-qmp-schema")
        self.types = {entry["name"]: entry for entry in entries}
        self.assertEqual(len(self.types), len(entries), "a name occurs twice")

    def references(self, entry):
        """Names of the entries that this one uses."""
        kind = entry["meta-type"]
        if kind == "command":
            yield entry["arg-type"]
            yield entry["ret-type"]
        elif kind == "event":
            yield entry["arg-type"]
        elif kind == "array":
            yield entry["element-type"]
        elif kind in ("object", "alternate"):
            for member in entry["members"]:
                yield member["type"]
            for variant in entry.get("variants", []):
                yield variant["type"]

    def test_every_type_is_reachable(self):
        queue = [name for name, entry in self.types.items() if entry["meta-type"] in ("command", "event")]
        self.assertTrue(queue)
        seen = set(queue)
        while queue:
            for name in self.references(self.types[queue.pop()]):
                self.assertIn(name, self.types)
                if name not in seen:
                    seen.add(name)
                    queue.append(name)
        unreached = set(self.types) - seen
        self.assertLessEqual(unreached, set(BUILTINS) | {"QType"} | {
            name for name, entry in self.types.items()
            if not gt.IS_GANTRY and entry["meta-type"] in ("enum", "array") and "QType" in str(entry) or name == "[any]"})

    def test_entries_have_the_shape_of_their_kind(self):
        required = {"builtin": {"json-type"}, "enum": {"members", "values"}, "array": {"element-type"}, "object": {"members"},
                    "alternate": {"members"}, "command": {"arg-type", "ret-type"}, "event": {"arg-type"}}
        optional = {"object": {"tag", "variants"}, "command": {"allow-oob"}}
        for name, entry in self.types.items():
            kind = entry["meta-type"]
            keys = set(entry) - {"name", "meta-type", "features"}
            self.assertLessEqual(required[kind], keys, name)
            self.assertLessEqual(keys, required[kind] | optional.get(kind, set()), name)
            if kind == "enum":
                self.assertEqual([member["name"] for member in entry["members"]], entry["values"])
            if kind == "builtin":
                self.assertEqual(BUILTINS.get(name, entry["json-type"]), entry["json-type"])
            if kind == "object" and "tag" in entry:
                tag = next(member for member in entry["members"] if member["name"] == entry["tag"])
                cases = [variant["case"] for variant in entry["variants"]]
                self.assertLessEqual(set(cases), set(self.types[tag["type"]]["values"]), name)
            if kind not in ("command", "event", "builtin"):
                self.assertRegex(name, r"^(\d+|\[.+\])$" if kind != "enum" else r"^(\d+|QType)$")
        empty = self.types["0"]
        self.assertEqual((empty["meta-type"], empty["members"]), ("object", []))

    # --- arguments

    def good(self, type_name, depth=0):
        """A small value that the type allows."""
        entry = self.types[type_name]
        kind = entry["meta-type"]
        if kind == "builtin":
            return {"string": "no-such-thing", "int": 1, "number": 1, "boolean": True, "null": None, "value": 1}.get(
                entry["json-type"])
        if kind == "enum":
            return entry["values"][0]
        if kind == "array":
            return []
        if kind == "alternate":
            names = [member["type"] for member in entry["members"]]
            return self.good("str" if "str" in names else names[0], depth + 1)
        return self.good_object(entry, depth=depth)

    def good_object(self, entry, case=None, depth=0):
        value = {member["name"]: self.good(member["type"], depth + 1) for member in entry["members"]
                 if "default" not in member}
        if "tag" in entry:
            value[entry["tag"]] = case or value[entry["tag"]]
            for variant in entry["variants"]:
                if variant["case"] == value[entry["tag"]]:
                    value.update(self.good_object(self.types[variant["type"]], depth=depth + 1))
        return value

    def members(self, entry, case):
        found = list(entry["members"])
        for variant in entry.get("variants", []):
            if variant["case"] == case:
                found += self.members(self.types[variant["type"]], None)
        return found

    def refused(self, command, value, texts):
        kind, desc = self.q.error(command, value)
        self.assertEqual(kind, "GenericError", (command, value, desc))
        if not any(desc == text or desc.startswith(text + "; ") for text in texts):
            self.fail(f"{command} {value}: {desc!r} is none of {texts}")
        self.checks += 1

    def check_object(self, command, entry, case, wrap, path, depth):
        """Members of one object, each made wrong in turn; wrap() puts the object where it belongs in the arguments."""
        base = self.good_object(entry, case)
        self.refused(command, wrap({**base, "no-such-member": 1}), [f"Parameter '{path}no-such-member' is unexpected"])
        for member in self.members(entry, case):
            name, type_ = member["name"], self.types[member["type"]]
            full = path + name
            is_tag = name == entry.get("tag")
            if "default" not in member:
                self.refused(command, wrap({key: value for key, value in base.items() if key != name}),
                             [f"Parameter '{full}' is missing"])
            if type_["meta-type"] == "builtin" and type_["json-type"] in EXPECTED:
                self.refused(command, wrap({**base, name: []}),
                             [f"Invalid parameter type for '{full}', expected: {EXPECTED[type_['json-type']]}",
                              f"Parameter '{full}' expects uint64"])
                if type_["json-type"] == "int":
                    self.refused(command, wrap({**base, name: 1.5}),
                                 [f"Invalid parameter type for '{full}', expected: integer",
                                  f"Parameter '{full}' expects uint64"])
            elif type_["meta-type"] == "enum":
                self.refused(command, wrap({**base, name: "no-such-value"}),
                             [f"Parameter '{name}' does not accept value 'no-such-value'",
                              f"Parameter '{full}' does not accept value 'no-such-value'"])
                self.refused(command, wrap({**base, name: 1}), [f"Invalid parameter type for '{full}', expected: string"])
            elif type_["meta-type"] == "array":
                self.refused(command, wrap({**base, name: {}}), [f"Invalid parameter type for '{full}', expected: array"])
            elif type_["meta-type"] == "object":
                self.refused(command, wrap({**base, name: 1}), [f"Invalid parameter type for '{full}', expected: object"])
                if depth < DEPTH:
                    self.check(command, type_, lambda value, name=name, base=base: wrap({**base, name: value}), full + ".",
                               depth + 1)
            elif type_["meta-type"] == "alternate" and not is_tag:
                kind, desc = self.q.error(command, wrap({**base, name: 1.5}))
                # Of an alternate the message names no more than the member, there too.
                self.assertRegex(desc, f"^Invalid parameter type for '{name}', expected: \\w+", (command, name))

    def check(self, command, entry, wrap, path="", depth=0):
        if "tag" not in entry:
            return self.check_object(command, entry, None, wrap, path, depth)
        tag = next(member for member in entry["members"] if member["name"] == entry["tag"])
        for case in self.types[tag["type"]]["values"]:
            self.check_object(command, entry, case, wrap, path, depth)

    def test_arguments_are_checked_as_the_schema_says(self):
        self.checks = 0
        commands = [entry for entry in self.types.values() if entry["meta-type"] == "command"]
        for entry in sorted(commands, key=lambda entry: entry["name"]):
            if entry["name"] == "qmp_capabilities":
                continue  # known only before the negotiation
            if not gt.IS_GANTRY and entry["name"] not in ("blockdev-add", "block-export-add", "nbd-server-start", "job-pause",
                                                          "blockdev-del", "block_resize", "query-named-block-nodes"):
                continue  # the reference has quirks in commands of its own
            with self.subTest(entry["name"]):
                self.check(entry["name"], self.types[entry["arg-type"]], lambda value: value)
        self.assertGreater(self.checks, 250)
        self.assertEqual(self.q.cmd("query-named-block-nodes"), [])  # nothing had an effect

    def test_only_what_is_served_is_listed(self):
        gt.require_gantry("the reference serves more")
        drivers = None
        for member in self.types[self.types["blockdev-add"]["arg-type"]]["members"]:
            if member["name"] == "driver":
                drivers = set(self.types[member["type"]]["values"])
        self.assertLessEqual({"file", "host_device", "null-co", "null-aio", "raw", "qcow2"}, drivers)
        for driver in drivers:
            kind, desc = self.q.error("blockdev-add", driver=driver, node_name="0")
            self.assertNotIn("not in this build", desc)
        self.assertEqual({entry["name"] for entry in self.types.values() if entry["meta-type"] == "command"},
                         {entry["name"] for entry in self.q.cmd("query-commands")})
        self.assertEqual({entry["name"] for entry in self.types.values() if entry["meta-type"] == "event"},
                         {entry["name"] for entry in self.q.cmd("query-events")})


if __name__ == "__main__":
    gt.main()
