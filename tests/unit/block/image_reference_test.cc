#include <catch2/catch.hpp>

#include "block/formats/image_reference.h"

using namespace gantry;
using namespace gantry::block;

namespace {

std::string resolved(std::string_view base, std::string_view name) {
    auto r = resolve_image_name(base, name);
    return r ? *r : "error: " + r.error().message();
}
std::string options_of(std::string_view name) {
    auto r = protocol_options(name);
    return r ? json::serialize(*r) : "error: " + r.error().message();
}
std::string json_of(std::string_view name) {
    auto r = json_name_options(name);
    return r ? json::serialize(*r) : "error: " + r.error().message();
}

}  // namespace

TEST_CASE("image names: relative ones resolve against the image's directory", "[block][image-name]") {
    CHECK(resolved("/a/b/over.qcow2", "base.img") == "/a/b/base.img");
    CHECK(resolved("/a/b/over.qcow2", "../base.img") == "/a/b/../base.img");
    CHECK(resolved("over.qcow2", "base.img") == "base.img");
    CHECK(resolved("/a/over.qcow2", "/c/base.img") == "/c/base.img");
    CHECK(resolved("/a/over.qcow2", "nbd://h/x") == "nbd://h/x");
    CHECK(resolved("/a/over.qcow2", "json:{}") == "json:{}");
    CHECK(resolved("http://h/a/over.qcow2?k=/x", "base.img") == "http://h/a/base.img");
    CHECK(resolved("json:{\"driver\":\"x\"}", "base.img").starts_with("error: 'base.img' is relative"));
    CHECK(resolved("json:{\"driver\":\"x\"}", "/base.img") == "/base.img");
    CHECK_FALSE(has_protocol_prefix("./a:b"));
    CHECK_FALSE(has_protocol_prefix("plain"));
    CHECK(has_protocol_prefix("a:b"));
}

TEST_CASE("image names: data files are local paths whatever they look like", "[block][image-name]") {
    CHECK(*resolve_local_name("/a/i.qcow2", "json:{\"driver\":\"nbd\"}") == "/a/json:{\"driver\":\"nbd\"}");
    CHECK(*resolve_local_name("i.qcow2", "nbd://h/x") == "nbd://h/x");
    CHECK_FALSE(resolve_local_name("http://h/i.qcow2", "d.raw"));
    CHECK(*resolve_local_name("http://h/i.qcow2", "/d.raw") == "/d.raw");
}

TEST_CASE("image names: protocol names become options", "[block][image-name]") {
    CHECK(options_of("/a/b") == R"({"driver":"file","filename":"/a/b"})");
    CHECK(options_of("file:/a") == R"({"driver":"file","filename":"/a"})");
    CHECK(options_of("host_device:/dev/x") == R"({"driver":"host_device","filename":"/dev/x"})");
    CHECK(options_of("nbd://h:99/e%20x") ==
          R"({"driver":"nbd","server":{"type":"inet","host":"h","port":"99"},"export":"e x"})");
    CHECK(options_of("nbd://[::1]") == R"({"driver":"nbd","server":{"type":"inet","host":"::1","port":"10809"}})");
    CHECK(options_of("nbd+unix:///e?socket=/run/s") ==
          R"({"driver":"nbd","server":{"type":"unix","path":"/run/s"},"export":"e"})");
    CHECK(options_of("nbd:unix:/run/s:exportname=e") ==
          R"({"driver":"nbd","server":{"type":"unix","path":"/run/s"},"export":"e"})");
    CHECK(options_of("nbd:h:7") == R"({"driver":"nbd","server":{"type":"inet","host":"h","port":"7"}})");
    CHECK(options_of("https://h/x?y=z") == R"({"driver":"https","url":"https://h/x?y=z"})");
    CHECK(options_of("ssh://u@h/p") == R"({"driver":"ssh","server":{"host":"h","port":"22"},"path":"/p","user":"u"})");
    for (const auto* bad :
         {"nbd:", "nbd:h", "nbd:h:0", "nbd:h:99999", "nbd://h:x/", "nbd+unix:///e", "nbd://[::1", "ssh://h", ""}) {
        INFO(bad);
        CHECK(options_of(bad).starts_with("error: "));
    }
    CHECK(options_of("gopher:x") == "error: Unknown protocol 'gopher'");
}

TEST_CASE("image names: json names are unfolded and may not take hold of nodes", "[block][image-name]") {
    CHECK(json_of(R"(json:{"driver":"qcow2","file":{"driver":"file","filename":"/x"}})") ==
          R"({"driver":"qcow2","file":{"driver":"file","filename":"/x"}})");
    CHECK(json_of(R"(json:{"file.driver":"file","file.filename":"/x","driver":"raw"})") ==
          R"({"file":{"driver":"file","filename":"/x"},"driver":"raw"})");
    CHECK(
        json_of(
            R"(json:{"driver":"raw","node-name":"disk0","file":{"driver":"file","filename":"/x","node-name":"y"}})") ==
        R"({"driver":"raw","file":{"driver":"file","filename":"/x"}})");
    CHECK(json_of(R"(json:{"driver":"raw","file":"disk0"})")
              .starts_with("error: a name stored in an image may not refer to the node 'disk0'"));
    CHECK(json_of(R"(json:{"driver":"quorum","children":["disk0"]})").starts_with("error: a name stored in an image"));
    CHECK(json_of(R"(json:{"driver":"raw","file.backing":"disk0"})").starts_with("error: a name stored in an image"));
    CHECK(json_of("json:[1]") == "error: Invalid JSON object given");
    CHECK(json_of("json:{").starts_with("error: Could not parse the JSON options"));
    CHECK(json_of(R"(json:{"a":"x","a.b":1})").starts_with("error: 'a.b' contradicts"));
    std::string deep = "json:";
    for (int i = 0; i < 100; i++) deep += R"({"a":)";
    deep += "1" + std::string(100, '}');
    CHECK(json_of(deep) == "error: the description is nested too deeply");
}
