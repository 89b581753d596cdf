// Changes of an image's properties; qemu-img agrees about every image, and about what cannot be changed.

#include <boost/json/parse.hpp>

#include "tests/unit/block/qcow2_ops_fixture.h"

using namespace gantry;
using namespace gantry::test;

namespace {

std::string info(OpsFixture& f, const std::string& member) {
    const json::value all = json::parse(f.output("qemu-img info -U --output=json " + f.path));
    const json::object& data = all.at("format-specific").at("data").as_object();
    return data.contains(member) ? json::serialize(data.at(member)) : "";
}

void fill(OpsFixture& f) {
    f.write(0, 300000, 1);
    f.zero(70000, 70000, false);
    f.write(900000, 100000, 2);
}

}  // namespace

TEST_CASE("qcow2: counts of every width", "[qcow2][amend][interop]") {
    if (OpsFixture::tools_missing()) return;
    const auto options = GENERATE(as<std::string>{}, "cluster_size=512", "cluster_size=64k");
    OpsFixture f;
    f.create(options, 2 << 20);
    REQUIRE(f.open() == "");
    fill(f);
    for (const int bits : {1, 2, 4, 8, 32, 64, 16, 1, 64}) {
        INFO(bits);
        REQUIRE(f.amend({{"refcount_bits", bits}}) == "");
        CHECK(f.image().image().header.refcount_order == static_cast<uint32_t>(std::countr_zero(unsigned(bits))));
        f.write(1200000, 50000, static_cast<uint8_t>(bits));
        f.verify_file();
        CHECK(info(f, "refcount-bits") == std::to_string(bits));
    }
    f.snapshot("a");
    f.snapshot("b");
    CHECK_THAT(f.amend({{"refcount_bits", "1"}}),
               Catch::StartsWith("Cannot decrease refcount entry width to 1 bits: Cluster at offset "));
    f.verify_file();
    REQUIRE(f.amend({{"refcount_bits", "2"}}) == "");
    f.verify_file();
    f.remove("1");
    f.verify_file();
}

TEST_CASE("qcow2: versions up and down", "[qcow2][amend][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    const bool backed = GENERATE(false, true);
    INFO(backed);
    if (backed) {
        const std::string base = f.dir.file("base.raw");
        f.sh("qemu-img create -q -f raw " + base + " 2M && qemu-io -f raw -c 'write -P 7 0 2M' " + base);
        f.sh("qemu-img create -q -f qcow2 -b " + base + " -F raw " + f.path);
        f.disk.assign(2 << 20, 7);
    } else {
        f.create("", 2 << 20);
    }
    REQUIRE(f.open() == "");
    fill(f);
    f.zero(300000, 500000, true);
    f.snapshot("kept");
    f.write(400000, 1000, 5);
    f.zero(0, 150000, false);
    f.zero(900000, 60000, true);
    f.verify_file();
    REQUIRE(f.amend({{"lazy_refcounts", true}}) == "");
    CHECK(info(f, "lazy-refcounts") == "true");
    REQUIRE(f.amend({{"compat", "0.10"}}) == "");
    f.verify_file();
    CHECK(info(f, "compat") == "\"0.10\"");
    f.write(200000, 300000, 6);
    f.verify_file();
    CHECK_THAT(f.amend({{"lazy_refcounts", "on"}}), Catch::StartsWith("Lazy refcounts only supported with"));
    CHECK_THAT(f.amend({{"refcount_bits", 8}}), Catch::StartsWith("Refcount widths other than 16 bits require"));
    REQUIRE(f.amend({{"compat", "v3"}, {"lazy_refcounts", "on"}, {"refcount_bits", 32}}) == "");
    CHECK(info(f, "refcount-bits") == "32");
    f.zero(0, 1 << 20, false);
    f.apply("1");
    f.verify_file();
    CHECK_THAT(f.amend({{"compat", "v2"}}), Catch::StartsWith("compat=0.10 requires refcount_bits=16"));
    REQUIRE(f.amend({{"compat", "v2"}, {"refcount_bits", 16}}) == "");
    f.verify_file();
}

TEST_CASE("qcow2: what amend refuses, in the reference's words", "[qcow2][amend][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    f.create("", 1 << 20);
    REQUIRE(f.open() == "");
    fill(f);
    using Row = std::pair<json::object, std::string>;
    const Row rows[] = {
        {{{"cluster_size", "4k"}}, "Invalid parameter 'cluster_size'"},
        {{{"preallocation", "full"}}, "Invalid parameter 'preallocation'"},
        {{{"compression_type", "zstd"}}, "Invalid parameter 'compression_type'"},
        {{{"extended_l2", "on"}}, "Invalid parameter 'extended_l2'"},
        {{{"nonsense", "1"}}, "Invalid parameter 'nonsense'"},
        {{{"backing_file", "x"}}, "Cannot amend the backing file"},
        {{{"backing_fmt", "raw"}}, "Cannot amend the backing file"},
        {{{"data_file_raw", "on"}}, "data-file-raw cannot be set on existing images"},
        {{{"data_file", "x"}}, "data-file can only be set for images that use an external data file"},
        {{{"size", "1000"}}, "The new size must be a multiple of 512"},
        {{{"refcount_bits", 3}}, "Refcount width must be a power of two and may not exceed 64 bits"},
        {{{"compat", "0.12"}}, "Unknown compatibility level 0.12"},
        {{{"encrypt", json::object{{"state", "active"}}}}, "image is not encrypted, can't amend"},
    };
    for (const auto& [options, text] : rows) CHECK_THAT(f.amend(options), Catch::StartsWith(text));
    f.snapshot("a");
    f.resize(2 << 20);
    CHECK_THAT(f.amend({{"compat", "0.10"}}), Catch::StartsWith("Internal snapshots prevent downgrade of image"));
    REQUIRE(f.amend({{"size", "3M"}}) == "");
    f.disk.resize(3 << 20);
    f.verify_file();
}

TEST_CASE("qcow2: features that version 2 does not have keep version 3", "[qcow2][amend][interop]") {
    if (OpsFixture::tools_missing()) return;
    using Row = std::pair<std::string, std::string>;
    const Row row = GENERATE_COPY(
        values({Row{"extended_l2=on", "Cannot downgrade an image with incompatible features 0x10 set"},
                Row{"compression_type=zstd", "Cannot downgrade an image with incompatible features 0x8 set"},
                Row{"data_file=DATA", "Cannot downgrade an image with a data file"},
                Row{"refcount_bits=8", "compat=0.10 requires refcount_bits=16"}}));
    OpsFixture f;
    std::string options = row.first;
    if (const size_t at = options.find("DATA"); at != std::string::npos) options.replace(at, 4, f.dir.file("d.raw"));
    f.create(options, 1 << 20);
    REQUIRE(f.open() == "");
    f.write(0, 100000, 1);
    CHECK_THAT(f.amend({{"compat", "0.10"}}), Catch::StartsWith(row.second));
    f.verify_file();
}

TEST_CASE("qcow2: names of files in the header", "[qcow2][amend][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    const auto change = [&](std::string file, std::string format) {
        return error_of(f.rt.run(block::change_backing_file(*f.graph, *f.node, file, format)));
    };
    SECTION("backing file") {
        const std::string base = f.dir.file("base.raw");
        f.sh("qemu-img create -q -f raw " + base + " 1M && qemu-io -f raw -c 'write -P 7 0 1M' " + base);
        f.sh("qemu-img create -q -f qcow2 -b " + base + " -F raw " + f.path);
        f.disk.assign(1 << 20, 7);
        REQUIRE(f.open() == "");
        f.write(0, 1000, 1);
        CHECK_THAT(change(std::string(1024, 'x'), "raw"), Catch::Contains("Invalid argument"));
        CHECK_THAT(change("x", "a format with a long name"), Catch::Contains("Invalid argument"));
        REQUIRE(change("base.raw", "raw") == "");
        f.verify_file();
        CHECK(f.image().image().full_backing_name == base);
        CHECK_THAT(f.output("qemu-img info -U " + f.path), Catch::Contains("backing file: base.raw"));
        REQUIRE(change("", "") == "");
        f.verify();  // the open node keeps its child
        f.close();
        CHECK(f.output("qemu-img info " + f.path).find("backing") == std::string::npos);
    }
    SECTION("data file") {
        f.create("data_file=" + f.dir.file("d.raw") + ",data_file_raw=on", 1 << 20);
        REQUIRE(f.open() == "");
        f.write(0, 1 << 20, 1);
        CHECK_THAT(change("x", "raw"), Catch::Contains("Invalid argument"));
        REQUIRE(f.amend({{"data_file_raw", false}}) == "");
        CHECK(info(f, "data-file-raw") == "false");
        f.verify_file();
        REQUIRE(f.amend({{"data_file", "d.raw"}}) == "");
        f.verify_file();
        CHECK(info(f, "data-file") == "\"d.raw\"");
    }
}
