// Authorization: patterns, rules, files.

#include <catch2/catch.hpp>
#include <fstream>

#include "nbd/authz/authz.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::nbd;

TEST_CASE("authz: patterns", "[nbd][authz][once]") {
    auto [pattern, text, hit] = GENERATE(table<const char*, const char*, bool>({
        {"", "", true},
        {"", "a", false},
        {"*", "", true},
        {"*", "anything", true},
        {"a", "a", true},
        {"a", "ab", false},
        {"a*", "ab", true},
        {"*b", "ab", true},
        {"a?c", "abc", true},
        {"a?c", "ac", false},
        {"?", "\xc3\xa4", true},
        {"a*b*c", "aXbYbZc", true},
        {"a*b*c", "aXbY", false},
        {"CN=*,O=x", "CN=a,O=x", true},
        {"CN=*,O=x", "CN=a,O=y", false},
        {"**a", "ba", true},
    }));
    INFO(pattern << " on " << text);
    CHECK(glob_match(pattern, text) == hit);
}

TEST_CASE("authz: a hostile pattern takes no time", "[nbd][authz][once]") {
    std::string pattern;
    for (int i = 0; i < 500; ++i) pattern += "*a";
    const auto begin = Clock::now();
    CHECK_FALSE(glob_match(pattern + "b", std::string(20000, 'a')));
    CHECK(Clock::now() - begin < std::chrono::seconds(5));
}

TEST_CASE("authz: without an object, or without a name, nobody is let in", "[nbd][authz]") {
    test::TestRuntime rt;
    CHECK(rt.run(authorize("x", "CN=a")).error().kind() == ErrorKind::kNotFound);
    AuthzObjects objects;
    CHECK_THAT(rt.run(authorize("x", "CN=a")).error().message(), Catch::StartsWith("Cannot find QAuthZ object ID x"));
    REQUIRE(rt.run(objects.add({{"qom-type", "authz-list"}, {"id", "x"}, {"policy", "allow"}})));
    CHECK(rt.run(authorize("x", "CN=a")));
    CHECK(rt.run(authorize("x", "")).error().kind() == ErrorKind::kPermission);
    objects.set_other_objects([](std::string_view id) { return id == "io"; });
    CHECK_THAT(rt.run(authorize("io", "CN=a")).error().message(),
               Catch::StartsWith("Object 'io' is not a QAuthZ subclass"));
    CHECK(objects.remove("x"));
    CHECK_FALSE(objects.remove("x"));
    CHECK(!rt.run(authorize("x", "CN=a")));
}

TEST_CASE("authz: a file is followed unless told not to", "[nbd][authz]") {
    test::TestRuntime rt;
    test::TempDir dir;
    const std::string path = dir.file("rules.json");
    const auto write = [&](const std::string& text) { std::ofstream(path, std::ios::trunc) << text; };
    write("{'rules': [{'match': 'CN=a', 'policy': 'allow'}]}");
    AuthzObjects objects;
    REQUIRE(rt.run(objects.add({{"qom-type", "authz-list-file"}, {"id", "live"}, {"filename", path}})));
    REQUIRE(
        rt.run(objects.add({{"qom-type", "authz-listfile"}, {"id", "still"}, {"filename", path}, {"refresh", false}})));
    CHECK(rt.run(authorize("live", "CN=a")));
    // The same size, at once.
    write("{'rules': [{'match': 'CN=b', 'policy': 'allow'}]}");
    CHECK(!rt.run(authorize("live", "CN=a")));
    CHECK(rt.run(authorize("live", "CN=b")));
    CHECK(rt.run(authorize("still", "CN=a")));
    write("{'rules': [{'match': 'CN=b', 'policy': 'perhaps'}]}");
    CHECK_THAT(rt.run(authorize("live", "CN=b")).error().message(), Catch::Contains(path));
    write("{'policy': 'allow'}");
    CHECK(rt.run(authorize("live", "CN=z")));
    CHECK(!rt.run(authorize("still", "CN=z")));
    CHECK(!rt.run(objects.add({{"qom-type", "authz-list-file"}, {"id", "none"}, {"filename", dir.file("none")}})));
    CHECK_FALSE(objects.has("none"));
}
