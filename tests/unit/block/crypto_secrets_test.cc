// Secret objects: where they come from, how they are decoded, what is refused.

#include <catch2/catch.hpp>
#include <cstdlib>
#include <fstream>

#include "block/crypto/secrets.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/temp_dir.h"

namespace gantry::block::crypto {

namespace {

struct Bench {
    std::string add(std::string text) {
        json::object options = test::options_of(std::move(text));
        options.emplace("qom-type", "secret");
        options.emplace("id", "s");
        (void)secrets.remove(std::string(options.at("id").as_string()));
        return test::GraphFixture::text_of(rt.run(secrets.add(std::move(options))));
    }
    std::string value(std::string_view id = "s") {
        auto found = secrets.lookup(id);
        return found ? std::string(found->text()) : "<" + found.error().message() + ">";
    }
    std::string file(const std::string& name, std::string_view contents) {
        const std::string path = dir.path() + "/" + name;
        std::ofstream(path, std::ios::binary) << contents;
        return path;
    }
    test::TempDir dir;
    test::TestRuntime rt;
    Secrets secrets;
};

}  // namespace

TEST_CASE("secrets: data, file and base64 give the same bytes", "[crypto][secrets]") {
    Bench b;
    CHECK(b.add("{'data': 'abc'}").empty());
    CHECK(b.value() == "abc");
    CHECK(b.add("{'data': ''}").empty());
    CHECK(b.value().empty());
    CHECK(b.add("{'file': '" + b.file("pw", "abc\n") + "'}").empty());
    CHECK(b.value() == "abc\n");  // a file is taken as it is
    for (const char* text : {"YWJj", "YWJj\\n", " YW Jj\\r\\n"}) {
        CHECK(b.add(std::string("{'format': 'base64', 'data': '") + text + "'}").empty());
        CHECK(b.value() == "abc");
    }
    CHECK(b.add("{'format': 'base64', 'data': 'YQ=='}").empty());
    CHECK(b.value() == "a");
    CHECK(b.add("{'format': 'base64', 'data': 'YWI'}").empty());
    CHECK(b.value() == "ab");
    CHECK(b.add("{'format': 'base64', 'file': '" + b.file("b64", "/+8=\n") + "'}").empty());
    CHECK(b.value() == "\xff\xef");
}

TEST_CASE("secrets: a secret wrapped by another one is unwrapped", "[crypto][secrets]") {
    Bench b;
    REQUIRE(b.add("{'id': 'k', 'format': 'base64', 'data': 'AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8='}").empty());
    // "correct horse battery" under AES-256-CBC with the key 00 01 .. 1f and a vector of 16 times 7.
    const std::string iv = "'iv': 'BwcHBwcHBwcHBwcHBwcHBw=='";
    CHECK(
        b.add("{'keyid': 'k', 'format': 'base64', " + iv + ", 'data': 'uFx9hos92Ug8NxHd91qwBDpnohs2OC2nRsBNfh3/SwI='}")
            .empty());
    CHECK(b.value() == "correct horse battery");

    struct Row {
        std::string options, error;
    };
    const Row rows[] = {
        {"'keyid': 'k'", "IV is required to decrypt secret"},
        {"'keyid': 'none', " + iv, "No secret with id 'none'"},
        {"'keyid': 's', " + iv, "Key should be 32 bytes in length"},
        {"'keyid': 'k', 'iv': 'AAAAAA=='", "IV should be 16 bytes in length not 4"},
        {"'keyid': 'k', 'iv': '?'", "Base64 data contains invalid characters"},
    };
    REQUIRE(b.add("{'data': 'short'}").empty());
    for (const Row& row : rows) {
        CHECK(b.add("{'id': 't', 'format': 'base64', 'data': 'YWJjZGVmZ2hpamtsbW5vcA==', " + row.options + "}") ==
              row.error);
        CHECK_FALSE(b.secrets.has("t"));
    }
    CHECK(b.add("{'id': 't', 'data': 'ab', 'keyid': 'k', " + iv + "}") ==
          "Length 2 must be a multiple of block size 16");
    CHECK(b.add("{'id': 't', 'format': 'base64', 'data': 'YWJjZGVmZ2hpamtsbW5vcA==', 'keyid': 'k', 'iv': "
                "'AAAAAAAAAAAAAAAAAAAAAA=='}") == "Incorrect number of padding bytes (96) found on decrypted data");
}

TEST_CASE("secrets: what makes no sense is refused in the reference's words", "[crypto][secrets]") {
    Bench b;
    CHECK(b.add("{}") == "Either 'file' or 'data' must be provided");
    CHECK(b.add("{'data': 'x', 'file': 'y'}") == "'file' and 'data' are mutually exclusive");
    const std::string missing = b.dir.path() + "/missing";
    CHECK(b.add("{'file': '" + missing + "'}") ==
          "Unable to read " + missing + ": Failed to open file \"" + missing + "\": No such file or directory");
    CHECK(b.add("{'file': '" + b.dir.path() + "'}").ends_with(": Is a directory"));
    const std::string huge = b.file("huge", "");
    std::filesystem::resize_file(huge, (1 << 20) + 1);
    CHECK(b.add("{'file': '" + huge + "'}").find("larger than 1048576 bytes") != std::string::npos);
    for (const char* text : {"YW#j", "YQ==YQ==", "Y=Q="}) {
        CHECK(b.add(std::string("{'format': 'base64', 'data': '") + text + "'}") ==
              "Base64 data contains invalid characters");
    }
    for (const char* text : {"YWJjY", "YQ=", "YWJj="}) {
        CHECK(
            b.add(std::string("{'format': 'base64', 'data': '") + text + "'}").starts_with("Base64 data is not valid"));
    }
    CHECK(b.value() == "<No secret with id 's'>");
    CHECK(b.add("{'qom-type': 'secret_keyring', 'serial': 0}") == "'serial' should not be equal to 0");
    CHECK(b.add("{'qom-type': 'secret_keyring', 'serial': 1}").starts_with("Unable to read serial key 00000001: "));
}

TEST_CASE("secrets: names of others, text that is none, and removal", "[crypto][secrets]") {
    Bench b;
    b.secrets.set_other_objects([](std::string_view id) { return id == "thread"; });
    CHECK(b.value("thread") == "<Object with id 'thread' is not a secret>");
    CHECK(b.add("{'id': 'thread', 'data': 'x'}") ==
          "attempt to add duplicate property 'thread' to object (type 'container')");
    REQUIRE(b.add("{'format': 'base64', 'data': '//4='}").empty());
    CHECK(b.secrets.lookup_text("s").error().message() == "Data from secret s is not valid UTF-8");
    for (const char* bytes : {"wK8=", "7aCA", "9JCAgA==", "4oI=", "gA==", "YQBi", "+IiAgIA="}) {
        REQUIRE(b.add(std::string("{'format': 'base64', 'data': '") + bytes + "'}").empty());
        INFO(bytes);
        CHECK_FALSE(b.secrets.lookup_text("s"));
    }
    for (const char* bytes : {"w6TigqzwkI2I", "", "YWJj"}) {
        REQUIRE(b.add(std::string("{'format': 'base64', 'data': '") + bytes + "'}").empty());
        CHECK(b.secrets.lookup_text("s"));
    }
    CHECK(b.secrets.remove("s"));
    CHECK_FALSE(b.secrets.remove("s"));
}

TEST_CASE("secrets: credentials of the service manager by name", "[crypto][secrets]") {
    Bench b;
    (void)::unsetenv("CREDENTIALS_DIRECTORY");
    CHECK(b.add("{'file': 'credential:pw'}").find("passed no credentials") != std::string::npos);
    (void)b.file("pw", "from systemd");
    (void)::setenv("CREDENTIALS_DIRECTORY", b.dir.path().c_str(), 1);
    CHECK(b.add("{'file': 'credential:pw'}").empty());
    CHECK(b.value() == "from systemd");
    CHECK(b.add("{'file': 'credential:../pw'}").find("not the name of a credential") != std::string::npos);
    CHECK(b.add("{'file': 'credential:'}").find("not the name of a credential") != std::string::npos);
    (void)::unsetenv("CREDENTIALS_DIRECTORY");
}

}  // namespace gantry::block::crypto
