// Option values of the command line.

#include "schema/keyval.h"

#include <catch2/catch.hpp>

#include "schema/json_dialect.h"
#include "schema/scalar_text.h"
#include "schema/schema.h"

namespace gantry::schema {

namespace {

std::string blockdev(std::string_view text) {
    auto result = parse_option(type("BlockdevOptions"), text, "driver");
    return result ? to_json(json::value(*result)) : result.error().message();
}

std::string plain(std::string_view text) {
    auto result = parse_keyval(text, "driver");
    return result ? to_json(json::value(result->object)) : result.error().message();
}

}  // namespace

TEST_CASE("keyval: errors are those of the reference", "[schema][keyval]") {
    struct Row {
        std::string_view text, error;
    };
    const Row rows[] = {
        {"", "Parameter 'driver' is missing"},
        {",", "Invalid parameter ''"},
        {"help", "Help is not available for this option"},
        {"null-co,help", "Help is not available for this option"},
        {"null-co,?", "Help is not available for this option"},
        {"help=1", "Parameter 'driver' is missing"},
        {"null-co,size=1k", "Parameter 'size' expects integer"},
        {"null-co,size=", "Parameter 'size' expects integer"},
        {"null-co,size=1.5", "Parameter 'size' expects integer"},
        {"null-co,size=5 ", "Parameter 'size' expects integer"},
        {"null-co,size=99999999999999999999", "Parameter 'size' expects integer"},
        {"null-co,latency-ns=99999999999999999999", "Parameter 'latency-ns' expects integer"},
        {"null-co,latency-ns=x", "Parameter 'latency-ns' expects integer"},
        {"null-co,read-zeroes=1", "Parameter 'read-zeroes' expects 'on' or 'off'"},
        {"null-co,read-zeroes=TRUE", "Parameter 'read-zeroes' expects 'on' or 'off'"},
        {"null-co,read-zeroes", "Expected '=' after parameter 'read-zeroes'"},
        {"null-co,node-name=a,foo", "Expected '=' after parameter 'foo'"},
        {"null-co,node-name=a,foo=1", "Parameter 'foo' is unexpected"},
        {"null-co,node-name=a,foo.bar=1", "Parameter 'foo' is unexpected"},
        {"null-co,size.x=1", "Parameters 'size.*' are unexpected"},
        {"null-co,size.0=1", "Parameters 'size.*' are unexpected"},
        {"null-co,node-name.x=a", "Parameters 'node-name.*' are unexpected"},
        {"null-co,discard.x=zz", "Parameters 'discard.*' are unexpected"},
        {"driver.x=1", "Parameters 'driver.*' are unexpected"},
        {"raw,file.driver=null-co,file.foo=1", "Parameter 'file.foo' is unexpected"},
        {"raw,file.foo=1", "Parameter 'file.driver' is missing"},
        {"raw,file.0=1", "Invalid parameter type for 'file', expected: BlockdevRef"},
        {"raw,file=x,file.driver=null-co", "Parameters 'file.*' used inconsistently"},
        {"raw,file.driver=null-co,file=x", "Parameters 'file.*' used inconsistently"},
        {"raw,node-name=a", "Parameter 'file' is missing"},
        {"raw,file.0=a,file.2=b", "Parameter 'file.1' missing"},
        {"raw,file.1=a", "Parameter 'file.0' missing"},
        {"raw,file.0=a,file.x=b", "Parameters 'file.*' used inconsistently"},
        {"raw,file.99999999999=a", "Parameter 'file.0' missing"},
        {"raw,file.99999999999999999999999=a", "Parameter 'file.0' missing"},
        {"raw,file.driver=zz", "Parameter 'driver' does not accept value 'zz'"},
        {"driver=", "Parameter 'driver' does not accept value ''"},
        {"=x", "Invalid parameter ''"},
        {"a..b=1", "Invalid parameter 'a..b'"},
        {".a=1", "Invalid parameter '.a'"},
        {"a.=1", "Invalid parameter 'a.'"},
        {"1=2", "Invalid parameter '1'"},
        {"-a=2", "Invalid parameter '-a'"},
        {"a b=2", "Invalid parameter 'a b'"},
        {"\xc3\xa9=1", "Invalid parameter '\xc3\xa9'"},
        {"__a=1", "Invalid parameter '__a'"},
        {"__org.x_y=1", "Parameter 'driver' is missing"},
        {"null-co,,", "Invalid parameter ''"},
        {"null-co,cache=1", "Invalid parameter type for 'cache', expected: object"},
        {"null-co,cache.0=on", "Invalid parameter type for 'cache', expected: object"},
        {"null-co,cache.direct=on,cache.x=1", "Parameter 'cache.x' is unexpected"},
        {"null-co,cache.direct=maybe", "Parameter 'cache.direct' expects 'on' or 'off'"},
        {"null-co,discard=zz", "Parameter 'discard' does not accept value 'zz'"},
        {"driver=null-co,driver=file", "Parameter 'filename' is missing"},
        {"qcow2,file.driver=null-co,overlap-check.template=zz", "Parameter 'template' does not accept value 'zz'"},
        {"qcow2,file.driver=null-co,backing.0=", "Invalid parameter type for 'backing', expected: BlockdevRefOrNull"},
        {"{\"driver\":\"null-co\",\"size\":\"1\"}", "Invalid parameter type for 'size', expected: integer"},
        {"{\"a\"", "JSON parse error, premature EOI"},
    };
    for (const Row& row : rows) {
        INFO(row.text);
        CHECK(blockdev(row.text) == row.error);
    }
}

TEST_CASE("keyval: what is right arrives with its types", "[schema][keyval]") {
    CHECK(blockdev("null-co,node-name=a,size=0x10,read-zeroes=y") ==
          R"({"driver": "null-co", "node-name": "a", "size": 16, "read-zeroes": true})");
    CHECK(blockdev("null-co,") == R"({"driver": "null-co"})");
    CHECK(blockdev("node-name=a,driver=null-co") == R"({"driver": "null-co", "node-name": "a"})");
    CHECK(blockdev("file,filename=a,,b=c,locking=off,cache.direct=on") ==
          R"({"driver": "file", "cache": {"direct": true}, "filename": "a,b=c", "locking": "off"})");
    CHECK(blockdev("raw,file.driver=file,file.filename=x") ==
          R"({"driver": "raw", "file": {"driver": "file", "filename": "x"}})");
    CHECK(blockdev("qcow2,file=f,backing=") == R"({"driver": "qcow2", "file": "f", "backing": null})");
    CHECK(blockdev("qcow2,file=f,backing=b,overlap-check=none") ==
          R"({"driver": "qcow2", "file": "f", "backing": "b", "overlap-check": "none"})");
    CHECK(blockdev("null-co,size= 5,latency-ns=010") == R"({"driver": "null-co", "size": 5, "latency-ns": 8})");
    CHECK(blockdev("{'driver':'null-co'}") == R"({"driver": "null-co"})");
}

TEST_CASE("keyval: lists are made by digits in any order", "[schema][keyval]") {
    CHECK(plain("a.1=y,a.0=x") == R"({"a": ["x", "y"]})");
    CHECK(plain("a.0.b=1,a.0.c=2,a.1.b=3") == R"({"a": [{"b": "1", "c": "2"}, {"b": "3"}]})");
    CHECK(plain("a.0=x,a.02=y") == "Parameter 'a.1' missing");
    CHECK(plain("a.00=x") == R"({"a": ["x"]})");
    CHECK(plain("a.0.0=x") == R"({"a": [["x"]]})");
    CHECK(plain("x.y.0=a,x.y.2=b") == "Parameter 'x.y.1' missing");
}

TEST_CASE("keyval: an export and a server take the same syntax", "[schema][keyval]") {
    auto e =
        parse_option(type("BlockExportOptions"), "nbd,id=e,node-name=n,writable=on,iothread.0=a,iothread.1=b", "type");
    REQUIRE(e);
    CHECK(to_json(json::value(*e)) ==
          R"({"type": "nbd", "id": "e", "iothread": ["a", "b"], "node-name": "n", "writable": true})");
    auto s =
        parse_option(type("NbdServerOptions"), "addr.type=inet,addr.host=::,addr.port=10809,max-connections=5", "");
    REQUIRE(s);
    CHECK(to_json(json::value(*s)) ==
          R"({"addr": {"type": "inet", "host": "::", "port": "10809"}, "max-connections": 5})");
    auto bad = parse_option(type("NbdServerOptions"), "unix", "");
    REQUIRE_FALSE(bad);
    CHECK(bad.error().message() == "Expected '=' after parameter 'unix'");
    bad = parse_option(type("NbdServerOptions"), "addr.type=inet,addr.host=::,addr.port=0,addr.to=70000", "");
    REQUIRE_FALSE(bad);
    CHECK(bad.error().message() == "Parameter 'to' expects uint16_t");
}

TEST_CASE("keyval: help is told apart from options", "[schema][keyval]") {
    auto value = parse_option_value("iothread,help", "qom-type");
    REQUIRE(value);
    CHECK(value->help);
    CHECK(value->object.at("qom-type") == json::value("iothread"));
    value = parse_option_value("help", "qom-type");
    REQUIRE(value);
    CHECK(value->help);
    CHECK(value->object.empty());
}

TEST_CASE("keyval: the older syntax has words without a value", "[schema][keyval]") {
    auto value = parse_keyval("socket,id=c,path=/x,server,nowait", "backend", KeyvalStyle::kFlat);
    REQUIRE(value);
    CHECK(to_json(json::value(value->object)) ==
          R"({"backend": "socket", "id": "c", "path": "/x", "server": "on", "wait": "off"})");
    REQUIRE(value->warnings.size() == 2);
    CHECK_THAT(value->warnings[1], Catch::StartsWith("short-form boolean option 'nowait' deprecated"));
    auto options =
        parse_option(type("ChardevOptions"), "socket,id=c,path=/x,server=on,wait=off", "backend", KeyvalStyle::kFlat);
    REQUIRE(options);
    CHECK(to_json(json::value(*options)) ==
          R"({"backend": "socket", "id": "c", "path": "/x", "server": true, "wait": false})");
    value = parse_keyval("socket,,id=c", "backend", KeyvalStyle::kFlat);
    REQUIRE(value);
    CHECK(value->object.at("backend") == json::value("socket,id=c"));
}

TEST_CASE("keyval: --chardev has sentences of its own", "[schema][keyval]") {
    struct Row {
        std::string_view text, result;
    };
    const Row rows[] = {
        {"socket", "chardev: no id specified"},
        {"id=c", "chardev: \"c\" missing backend"},
        {"zz,id=c", "'zz' is not a valid char driver name"},
        {"socket,,id=c", "chardev: no id specified"},
        {"socket,id=c,path=/x,foo=1", "Invalid parameter 'foo'"},
        {"socket,id=c,path=/x,server=on,wait=maybe", "Parameter 'wait' expects 'on' or 'off'"},
        {"socket,id=c,path=/x,server=on,wait=off",
         R"({"backend": "socket", "id": "c", "path": "/x", "server": true, "wait": false})"},
        {R"({"backend": "stdio", "id": "c"})", R"({"backend": "stdio", "id": "c"})"},
    };
    for (const Row& row : rows) {
        INFO(row.text);
        std::vector<std::string> warnings;
        auto options = parse_chardev(row.text, warnings);
        CHECK((options ? to_json(json::value(*options)) : options.error().message()) == row.result);
        CHECK(warnings.empty());
    }
    std::vector<std::string> warnings;
    auto known = parse_chardev("null,id=c", warnings);
    REQUIRE_FALSE(known);
    CHECK_THAT(known.error().message(),
               Catch::StartsWith("'null' is not a valid char driver name; not in this build: "));
    REQUIRE(parse_chardev("socket,id=c,path=/x,server,nowait", warnings));
    CHECK(warnings.size() == 2);
}

TEST_CASE("keyval: keys are limited in length and depth", "[schema][keyval]") {
    const std::string name(130, 'a');
    CHECK(plain(name + "=1") == "Parameter '" + name + "' is too long");
    std::string deep = "a";
    for (int i = 0; i < 300; i++) deep += ".a";
    auto result = parse_keyval(deep + "=1", "driver");
    REQUIRE_FALSE(result);
    CHECK(result.error().kind() == ErrorKind::kTooLarge);
}

TEST_CASE("keyval: sizes take binary suffixes", "[schema][keyval]") {
    CHECK(parse_size_text("512") == 512u);
    CHECK(parse_size_text("0x200") == 512u);
    CHECK(parse_size_text("1k") == 1024u);
    CHECK(parse_size_text("1.5K") == 1536u);
    CHECK(parse_size_text("0.3k") == 307u);
    CHECK(parse_size_text("2M") == 2u << 20);
    CHECK(parse_size_text("15E") == 15ull << 60);
    CHECK(parse_size_text("15.99999999999999999999E") == 0xffffffffffffffffull);
    for (std::string_view bad :
         {"", "-1", "99E", "16E", "x", "1x", "1kk", ".5k", "1.5", "1.5b", "0x", " ", "1 k", "18446744073709551616"}) {
        INFO(bad);
        CHECK_FALSE(parse_size_text(bad));
    }
}

TEST_CASE("keyval: integers in C notation", "[schema][keyval]") {
    CHECK(parse_signed_text("-9223372036854775808") == INT64_MIN);
    CHECK(parse_signed_text("9223372036854775807") == INT64_MAX);
    CHECK(parse_signed_text("-0x10") == -16);
    CHECK_FALSE(parse_signed_text("9223372036854775808"));
    CHECK_FALSE(parse_signed_text("08"));
    CHECK_FALSE(parse_signed_text("--1"));
    CHECK_FALSE(parse_signed_text("+-1"));
    CHECK(parse_unsigned_text("18446744073709551615") == UINT64_MAX);
    CHECK_FALSE(parse_unsigned_text("-1"));
}

}  // namespace gantry::schema
