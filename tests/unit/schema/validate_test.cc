// Argument checking: the reference's sentences, recorded from it where it has the command in the same shape.

#include "schema/validate.h"

#include <catch2/catch.hpp>

#include "schema/json_dialect.h"
#include "schema/schema.h"

namespace gantry::schema {

namespace {

/// The normalised arguments, or the error.
std::string check(std::string_view command, std::string_view arguments) {
    auto parsed = parse_json(arguments);
    REQUIRE(parsed);
    const Command* found = find_command(command);
    REQUIRE(found);
    auto result = validate_arguments(*found, parsed->as_object());
    return result ? to_json(json::value(*result)) : result.error().message();
}

std::string check_value(const Type& type, std::string_view text) {
    auto result = validate_value(type, *parse_json(text), "p");
    return result ? to_json(*result) : result.error().message();
}

}  // namespace

TEST_CASE("validate: what is wrong is told in the reference's words", "[schema][validate]") {
    struct Row {
        std::string_view command, arguments, error;
    };
    const Row rows[] = {
        {"blockdev-add", R"({})", "Parameter 'driver' is missing"},
        {"blockdev-add", R"({"driver": 1})", "Invalid parameter type for 'driver', expected: string"},
        {"blockdev-add", R"({"driver": null})", "Invalid parameter type for 'driver', expected: string"},
        {"blockdev-add", R"({"driver": "zz"})", "Parameter 'driver' does not accept value 'zz'"},
        {"blockdev-add", R"({"driver": "raw", "node-name": "n"})", "Parameter 'file' is missing"},
        {"blockdev-add", R"({"driver": "raw", "file": 1})", "Invalid parameter type for 'file', expected: BlockdevRef"},
        {"blockdev-add", R"({"driver": "raw", "file": null})",
         "Invalid parameter type for 'file', expected: BlockdevRef"},
        {"blockdev-add", R"({"driver": "raw", "file": {}})", "Parameter 'file.driver' is missing"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "zz"}})",
         "Parameter 'driver' does not accept value 'zz'"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "raw", "file": 3}})",
         "Invalid parameter type for 'file', expected: BlockdevRef"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "null-co", "bogus": 1}})",
         "Parameter 'file.bogus' is unexpected"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "null-co", "size": "1"}})",
         "Invalid parameter type for 'file.size', expected: integer"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "null-co", "read-zeroes": 1}})",
         "Invalid parameter type for 'file.read-zeroes', expected: boolean"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "null-co", "discard": "zz"}})",
         "Parameter 'discard' does not accept value 'zz'"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "null-co", "discard": 1}})",
         "Invalid parameter type for 'file.discard', expected: string"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "null-co", "cache": 1}})",
         "Invalid parameter type for 'file.cache', expected: object"},
        {"blockdev-add", R"({"driver": "raw", "file": {"driver": "null-co", "cache": {"direct": 1}}})",
         "Invalid parameter type for 'file.cache.direct', expected: boolean"},
        {"blockdev-add", R"({"driver": "qcow2", "file": "x", "overlap-check": 1})",
         "Invalid parameter type for 'overlap-check', expected: Qcow2OverlapChecks"},
        {"blockdev-add", R"({"driver": "qcow2", "file": "x", "overlap-check": "zz"})",
         "Parameter 'overlap-check' does not accept value 'zz'"},
        {"blockdev-add", R"({"driver": "qcow2", "file": "x", "overlap-check": {"template": "zz"}})",
         "Parameter 'template' does not accept value 'zz'"},
        {"blockdev-add", R"({"driver": "qcow2", "file": "x", "overlap-check": {"zz": 1}})",
         "Parameter 'overlap-check.zz' is unexpected"},
        {"blockdev-add", R"({"driver": "qcow2", "file": "x", "backing": 1})",
         "Invalid parameter type for 'backing', expected: BlockdevRefOrNull"},
        {"blockdev-add", R"({"driver": "qcow2", "file": "x", "l2-cache-size": 1.5})",
         "Invalid parameter type for 'l2-cache-size', expected: integer"},
        {"blockdev-add", R"({"driver": "qcow2", "file": "x", "l2-cache-size": 18446744073709551615})",
         "Invalid parameter type for 'l2-cache-size', expected: integer"},
        {"blockdev-add", R"({"driver": "null-co", "size": 1.0})",
         "Invalid parameter type for 'size', expected: integer"},
        {"blockdev-add", R"({"driver": "null-co", "latency-ns": 18446744073709551616})",
         "Parameter 'latency-ns' expects uint64"},
        {"blockdev-add", R"({"driver": "file", "node-name": "n"})", "Parameter 'filename' is missing"},
        {"blockdev-add", R"({"driver": "file", "node-name": 1})",
         "Invalid parameter type for 'node-name', expected: string"},
        {"blockdev-add", R"({"node-name": 1})", "Parameter 'driver' is missing"},
        {"blockdev-add", R"({"driver": "null-co", "b": 1, "a": 1})", "Parameter 'b' is unexpected"},
        {"blockdev-reopen", R"({})", "Parameter 'options' is missing"},
        {"blockdev-reopen", R"({"options": 1})", "Invalid parameter type for 'options', expected: array"},
        {"blockdev-reopen", R"({"options": [1]})", "Invalid parameter type for 'options[0]', expected: object"},
        {"blockdev-reopen", R"({"options": [{"driver": "raw", "file": {"driver": "null-co", "x": 1}}]})",
         "Parameter 'options[0].file.x' is unexpected"},
        {"nbd-server-start", R"({})", "Parameter 'addr' is missing"},
        {"nbd-server-start", R"({"addr": {}})", "Parameter 'addr.type' is missing"},
        {"nbd-server-start", R"({"addr": {"type": "unix"}})", "Parameter 'addr.data' is missing"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {}}})", "Parameter 'addr.data.path' is missing"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {"path": "x", "y": 1}}})",
         "Parameter 'addr.data.y' is unexpected"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {"path": "x", "type": "y"}}})",
         "Parameter 'addr.data.type' is unexpected"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": 1}})",
         "Invalid parameter type for 'addr.data', expected: object"},
        {"nbd-server-start", R"({"addr": {"type": "zz", "data": {}}})", "Parameter 'type' does not accept value 'zz'"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {"path": "x"}, "z": 1}})",
         "Parameter 'addr.z' is unexpected"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {"path": "x"}, "path": "y"}})",
         "Parameter 'addr.path' is unexpected"},
        {"nbd-server-start", R"({"addr": {"type": "inet", "data": {"host": "x", "port": 1}}})",
         "Invalid parameter type for 'addr.data.port', expected: string"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {"path": "x"}}, "max-connections": 4294967296})",
         "Parameter 'max-connections' expects uint32_t"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {"path": "x"}}, "max-connections": -1})",
         "Parameter 'max-connections' expects uint32_t"},
        {"nbd-server-start",
         R"({"addr": {"type": "inet", "data": {"host": "h", "port": "0", "to": 18446744073709551615}}})",
         "Parameter 'to' expects uint16_t"},
        {"query-version", R"({"a": 1})", "Parameter 'a' is unexpected"},
        {"block_resize", R"({"size": "1"})", "Invalid parameter type for 'size', expected: integer"},
        {"query-blockstats", R"({"query-nodes": 1})", "Invalid parameter type for 'query-nodes', expected: boolean"},
        {"block-export-add", R"({"type": "nbd"})", "Parameter 'id' is missing"},
        {"block-export-add", R"({"type": "nbd", "id": "x", "iothread": 1, "node-name": "n"})",
         "Invalid parameter type for 'iothread', expected: BlockExportIothreads"},
        {"block-export-add", R"({"type": "nbd", "id": "x", "iothread": [1], "node-name": "n"})",
         "Invalid parameter type for 'iothread[0]', expected: string"},
        {"qmp_capabilities", R"({"enable": ["x"]})", "Parameter 'null' does not accept value 'x'"},
        {"object-add", R"({"qom-type": "zz", "id": "a"})", "Parameter 'qom-type' does not accept value 'zz'"},
        {"object-add", R"({"qom-type": "iothread", "id": 5})", "Invalid parameter type for 'id', expected: string"},
        {"object-add", R"({"qom-type": "iothread", "id": "a", "props": 1})",
         "Invalid parameter type for 'props', expected: object"},
        {"object-add", R"({"qom-type": "iothread", "id": "a", "props": {"id": "b"}})",
         "Parameter 'props.id' is unexpected"},
    };
    for (const Row& row : rows) {
        INFO(row.command << " " << row.arguments);
        CHECK(check(row.command, row.arguments) == row.error);
    }
}

TEST_CASE("validate: what is known but absent is refused with the reason", "[schema][validate]") {
    struct Row {
        std::string_view command, arguments, error;
    };
    const Row rows[] = {
        {"blockdev-add", R"({"driver": "vmdk"})",
         "Parameter 'driver' does not accept value 'vmdk'; not in this build: "},
        {"object-add", R"({"qom-type": "throttle-group", "id": "s"})",
         "Parameter 'qom-type' does not accept value 'throttle-group'; not in this build: "},
        {"blockdev-add", R"({"driver": "qcow2", "file": {"driver": "file", "filename": "f", "pr-manager": "p"}})",
         "Parameter 'file.pr-manager' is unexpected; not in this build: "},
        {"blockdev-add", R"({"driver": "raw", "file": "f", "aio": "native"})",
         "Parameter 'aio' is unexpected; it belongs"},
    };
    for (const Row& row : rows) {
        INFO(row.command << " " << row.arguments);
        CHECK_THAT(check(row.command, row.arguments), Catch::StartsWith(std::string(row.error)));
    }
}

TEST_CASE("validate: old shapes become the new ones", "[schema][validate]") {
    struct Row {
        std::string_view command, arguments, result;
    };
    const Row rows[] = {
        {"blockdev-add", R"({"options": {"driver": "null-co", "node-name": "n"}})",
         R"({"driver": "null-co", "node-name": "n"})"},
        {"blockdev-add", R"({"options": {"driver": "raw", "file": {"driver": "null-co", "x": 1}}})",
         "Parameter 'options.file.x' is unexpected"},
        {"blockdev-add", R"({"options": {"driver": "null-co"}, "driver": "null-co"})",
         "Parameter 'options' is unexpected"},
        {"object-add", R"({"qom-type": "iothread", "id": "a", "props": {"poll-max-ns": 1}})",
         R"({"qom-type": "iothread", "id": "a", "poll-max-ns": 1})"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "data": {"path": "x"}}})",
         R"({"addr": {"type": "unix", "path": "x"}})"},
        {"nbd-server-start", R"({"addr": {"type": "unix", "path": "x", "abstract": true}})",
         R"({"addr": {"type": "unix", "path": "x", "abstract": true}})"},
    };
    for (const Row& row : rows) {
        INFO(row.command << " " << row.arguments);
        CHECK(check(row.command, row.arguments) == row.result);
    }
}

TEST_CASE("validate: old spellings of members are renamed", "[schema][validate]") {
    static constexpr std::string_view kOld[] = {"value", "rate"};
    static const Member kMembers[] = {
        {.name = "speed", .type = &type("int"), .aliases = kOld},
        {.name = "device", .type = &type("str")},
    };
    static const Type kArguments = struct_type("", "", kMembers);
    const auto run = [](std::string_view text) {
        auto result = validate(kArguments, parse_json(text)->as_object());
        return result ? to_json(json::value(*result)) : result.error().message();
    };
    CHECK(run(R"({"value": 5, "device": "d"})") == R"({"speed": 5, "device": "d"})");
    CHECK(run(R"({"speed": 5, "device": "d"})") == R"({"speed": 5, "device": "d"})");
    CHECK(run(R"({"speed": 5, "rate": 6, "device": "d"})") == "Parameter 'rate' is unexpected");
    CHECK(run(R"({"rate": "x", "device": "d"})") == "Invalid parameter type for 'speed', expected: integer");
    CHECK(run(R"({"device": "d"})") == "Parameter 'speed' is missing");
}

TEST_CASE("validate: good arguments pass in the order of the tables", "[schema][validate]") {
    CHECK(
        check("blockdev-add",
              R"({"l2-cache-size": 1048576, "backing": null, "node-name": "q", "overlap-check": {"template": "all"},
                    "file": {"filename": "a.qcow2", "driver": "file"}, "driver": "qcow2", "snapshot": "s1"})") ==
        R"({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "a.qcow2"}, "backing": null, )"
        R"("overlap-check": {"template": "all"}, "l2-cache-size": 1048576, "snapshot": "s1"})");
    CHECK(check("block-export-add", R"({"type": "nbd", "id": "e", "node-name": "n", "iothread": ["a", "b"]})") ==
          R"({"type": "nbd", "id": "e", "iothread": ["a", "b"], "node-name": "n"})");
    CHECK(check("blockdev-add", R"({"driver": "qcow2", "file": "f", "backing": ""})") ==
          R"({"driver": "qcow2", "file": "f", "backing": null})");
    CHECK(check("query-version", "{}") == "{}");
    CHECK(check("blockdev-add", R"({"driver": "null-co", "latency-ns": 18446744073709551615})") ==
          R"({"driver": "null-co", "latency-ns": 18446744073709551615})");
}

TEST_CASE("validate: integers are held to their width", "[schema][validate]") {
    CHECK(check_value(type("int8"), "127") == "127");
    CHECK(check_value(type("int8"), "128") == "Parameter 'p' expects int8_t");
    CHECK(check_value(type("int8"), "-128") == "-128");
    CHECK(check_value(type("int32"), "-2147483649") == "Parameter 'p' expects int32_t");
    CHECK(check_value(type("uint8"), "255") == "255");
    CHECK(check_value(type("uint8"), "256") == "Parameter 'p' expects uint8_t");
    CHECK(check_value(type("uint32"), "4294967295") == "4294967295");
    CHECK(check_value(type("uint64"), "-1") == "Parameter 'p' expects uint64");
    CHECK(check_value(type("size"), "-1") == "Parameter 'p' expects size");
    CHECK(check_value(type("size"), "18446744073709551615") == "18446744073709551615");
    CHECK(check_value(type("size"), "1e30") == "Parameter 'p' expects size");
    CHECK(check_value(type("int"), "-9223372036854775808") == "-9223372036854775808");
    CHECK(check_value(type("number"), "2.5") == "2.5");
    CHECK(check_value(type("number"), "\"2\"") == "Invalid parameter type for 'p', expected: number");
}

TEST_CASE("validate: definitions inside definitions are limited", "[schema][validate]") {
    const auto nested = [](size_t levels) {
        json::value node = "leaf";
        for (size_t i = 0; i < levels; i++) node = json::object{{"driver", "raw"}, {"file", std::move(node)}};
        return node.as_object();
    };
    CHECK(validate(type("BlockdevOptions"), nested(200)));
    auto refused = validate(type("BlockdevOptions"), nested(900));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind() == ErrorKind::kTooLarge);
}

}  // namespace gantry::schema
