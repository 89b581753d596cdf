// The JSON dialect: reader against recorded streams, limits, and the writer.

#include "schema/json_dialect.h"

#include <catch2/catch.hpp>

#include "tests/unit/schema/json_dialect_cases.h"

namespace gantry::schema {

namespace {

/// The messages of a stream as the recorded cases write them: "V", or an error text as the writer escapes it.
std::string messages(JsonReader& reader) {
    std::string out;
    while (auto message = reader.next()) {
        if (!out.empty()) out += '\n';
        if (*message) {
            out += 'V';
        } else {
            const std::string quoted = to_json(json::value(message->error().message()));
            out += quoted.substr(1, quoted.size() - 2);
        }
    }
    return out;
}

std::string first_error(std::string_view text, JsonLimits limits) {
    JsonReader reader(limits);
    reader.feed(text);
    auto message = reader.next();
    if (!message) return "nothing";
    return *message ? "V" : message->error().message();
}

}  // namespace

TEST_CASE("json dialect: streams give the values and errors that the reference gives", "[schema][json]") {
    for (const StreamCase& c : kStreamCases) {
        INFO("input: " << to_json(json::value(c.input)));
        JsonReader whole;
        whole.feed(c.input);
        CHECK(messages(whole) == c.messages);
    }
}

TEST_CASE("json dialect: where the input is cut does not matter", "[schema][json]") {
    for (const StreamCase& c : kStreamCases) {
        INFO("input: " << to_json(json::value(c.input)));
        JsonReader reader;
        std::string seen;
        for (char byte : c.input) {
            reader.feed(std::string_view(&byte, 1));
            const std::string now = messages(reader);
            if (!seen.empty() && !now.empty()) seen += '\n';
            seen += now;
        }
        CHECK(seen == c.messages);
    }
}

TEST_CASE("json dialect: values come back as the reference writes them", "[schema][json]") {
    for (const EchoCase& c : kEchoCases) {
        INFO("input: " << to_json(json::value(c.input)));
        auto value = parse_json(c.input);
        REQUIRE(value);
        CHECK(to_json(*value) == c.output);
        if (c.output == "-0") continue;  // read back it is the integer zero
        auto again = parse_json(to_json(*value));
        REQUIRE(again);
        CHECK(to_json(*again) == c.output);
    }
}

TEST_CASE("json dialect: integers keep all 64 bits, beyond them is a double", "[schema][json]") {
    CHECK(parse_json("9223372036854775807")->is_int64());
    CHECK(parse_json("9223372036854775808")->get_uint64() == 9223372036854775808u);
    CHECK(parse_json("18446744073709551616")->is_double());
    CHECK(parse_json("1.0")->is_double());
}

TEST_CASE("json dialect: a number beyond a double is an error, not an infinity", "[schema][json]") {
    for (std::string_view text : {"1e999", "-1e309", "9e999"}) {
        auto value = parse_json(text);
        REQUIRE_FALSE(value);
        CHECK(value.error().message().starts_with("JSON parse error, number '"));
    }
    CHECK_FALSE(parse_json(std::string(400, '9')));
}

TEST_CASE("json dialect: a whole text must be one finished value", "[schema][json]") {
    using Row = std::tuple<std::string, std::string>;
    auto [text, error] = GENERATE(table<std::string, std::string>({
        Row{"{\"a", "JSON parse error, stray '\"a'"},
        Row{"{", "JSON parse error, premature EOI"},
        Row{"{\"driver\":\"null-co\"", "JSON parse error, premature EOI"},
        Row{"{\"a\":1", "JSON parse error, premature EOI"},
        Row{"[1", "JSON parse error, premature EOI"},
        Row{"{\"driver\":\"null-co\"} x", "Expecting at most one JSON value"},
        Row{"{}}", "Expecting at most one JSON value"},
        Row{"{} {}", "Expecting at most one JSON value"},
        Row{"{]", "JSON parse error, expecting value"},
        Row{"{%", "JSON parse error, stray '%'"},
        Row{"{'", "JSON parse error, stray '''"},
        Row{"{5", "JSON parse error, key is not a string in object"},
        Row{"{t", "JSON parse error, invalid keyword 't'"},
        Row{"{\"a\":-", "JSON parse error, stray '-'"},
        Row{"", "JSON parse error, expecting value"},
    }));
    auto value = parse_json(text);
    REQUIRE_FALSE(value);
    CHECK(value.error().message() == error);
    CHECK(parse_json(" {} \r\n"));
}

TEST_CASE("json dialect: nesting, tokens and token bytes are limited", "[schema][json]") {
    const std::string deep = std::string(1024, '[') + std::string(1024, ']');
    CHECK(first_error(deep, {}) == "V");
    CHECK(first_error("[" + deep, {}) == "JSON nesting depth limit exceeded");
    const JsonLimits small{.token_bytes = 100, .tokens = 10, .nesting = 4};
    CHECK(first_error("[1,2,3,4,5]", small) == "JSON token count limit exceeded");
    CHECK(first_error("[1,2,3,4]", small) == "V");
    CHECK(first_error("\"" + std::string(98, 'a') + "\"", small) == "V");
    CHECK(first_error("\"" + std::string(200, 'a') + "\"", small) == "JSON token size limit exceeded");
}

TEST_CASE("json dialect: after a limit the next message is read", "[schema][json]") {
    JsonReader reader(JsonLimits{.token_bytes = 100, .tokens = 10, .nesting = 4});
    reader.feed("\"" + std::string(1000, 'a') + "\"\n{\"a\": 1}");
    CHECK(messages(reader) == "JSON token size limit exceeded\nV");
    CHECK(reader.pending_bytes() == 0);
}

TEST_CASE("json writer: pretty layout has four spaces a level and breaks empty ones", "[schema][json]") {
    const json::value value = {{"a", json::array{1, json::object{{"b", json::array()}}}}, {"c", json::object()}};
    CHECK(to_json(value, JsonLayout::kPretty) ==
          "{\n    \"a\": [\n        1,\n        {\n            \"b\": [\n            ]\n        }\n    ],\n"
          "    \"c\": {\n    }\n}");
    CHECK(to_json(value) == R"({"a": [1, {"b": []}], "c": {}})");
}

TEST_CASE("json writer: what is not UTF-8 becomes replacement characters", "[schema][json]") {
    CHECK(to_json(json::value("a\x80z")) == R"("a\uFFFDz")");
    CHECK(to_json(json::value("\xef\xbf\xbf")) == R"("\uFFFD")");
    CHECK(to_json(json::value("\xe2\x82")) == R"("\uFFFD")");
}

TEST_CASE("json writer: doubles have the fewest digits that read back", "[schema][json]") {
    CHECK(to_json(json::value(0.1)) == "0.1");
    CHECK(to_json(json::value(1e-5)) == "1e-05");
    CHECK(to_json(json::value(5e-324)) == "5e-324");
    CHECK(to_json(json::value(3.14159)) == "3.14159");
}

}  // namespace gantry::schema
