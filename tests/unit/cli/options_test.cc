#include "cli/options.h"

#include <catch2/catch.hpp>

using namespace gantry::cli;

namespace {

constexpr OptionSpec kSpecs[] = {
    {"blockdev", 0, true, "VALUE", "a node"},   {"daemonize", 0, false, "", "background"},
    {"trace", 'T', true, "PATTERN", "a trace"}, {"help", 'h', false, "", "this"},
    {"version", 'V', false, "", "the version"},
};

/// "name=value name ..." or the error.
std::string parse(std::vector<const char*> arguments) {
    auto parsed = parse_options(kSpecs, arguments);
    if (!parsed) return "error: " + parsed.error().message();
    std::string out;
    for (const OptionUse& use : *parsed) {
        out += (out.empty() ? "" : " ") + use.name;
        if (!use.value.empty()) out += "=" + use.value;
    }
    return out;
}

}  // namespace

TEST_CASE("options: the order stays, values in every spelling", "[cli]") {
    CHECK(parse({}).empty());
    CHECK(parse({"--blockdev", "a", "--daemonize", "--blockdev=b,c=d", "-T", "x", "-Ty", "--trace", "z"}) ==
          "blockdev=a daemonize blockdev=b,c=d trace=x trace=y trace=z");
    CHECK(parse({"--blockdev", "--daemonize"}) == "blockdev=--daemonize");
    CHECK(parse({"--blockdev", "{\"driver\": \"raw\"}"}) == "blockdev={\"driver\": \"raw\"}");
}

TEST_CASE("options: what is wrong is said in the reference's words", "[cli]") {
    CHECK(parse({"--bogus"}) == "error: unrecognized option '--bogus'");
    CHECK(parse({"--block", "x"}) == "error: unrecognized option '--block'");  // no guessing
    CHECK(parse({"-x"}) == "error: unrecognized option '-x'");
    CHECK(parse({"stray"}) == "error: stray: Unexpected argument");
    CHECK(parse({"--daemonize", "stray"}) == "error: stray: Unexpected argument");
    CHECK(parse({"--blockdev"}) == "error: option '--blockdev' requires an argument");
    CHECK(parse({"--daemonize=1"}) == "error: option '--daemonize' doesn't allow an argument");
}

TEST_CASE("options: help and version end the parsing", "[cli]") {
    CHECK(parse({"--blockdev", "a", "--help", "--bogus"}) == "blockdev=a help");
    CHECK(parse({"-V", "stray"}) == "version");
    CHECK(parse({"--bogus", "--help"}) == "error: unrecognized option '--bogus'");
    CHECK(parse({"--blockdev", "--help"}) == "blockdev=--help");
}

TEST_CASE("options: help shows every option once", "[cli]") {
    CHECK(options_help(kSpecs) ==
          "  --blockdev VALUE              a node\n"
          "  --daemonize                   background\n"
          "  --trace, -T PATTERN           a trace\n"
          "  --help, -h                    this\n"
          "  --version, -V                 the version\n");
}
