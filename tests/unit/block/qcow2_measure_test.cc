#include <catch2/catch.hpp>
#include <cstdio>

#include "block/crypto/secrets.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/measure.h"
#include "block/measure.h"
#include "schema/json_dialect.h"
#include "tests/unit/block/qcow2_create_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::block::qcow2;
using namespace gantry::test;

namespace {

struct MeasureFixture : CreateFixture {
    /// "required fully bitmaps", or the refusal.
    std::string measure(const std::string& format, MeasureSource what, std::string_view words) {
        auto measured = rt.run(measure_image(*graph, format, what, words_of(words)));
        if (!measured) return measured.error().message();
        return fmt::format("{} {} {}", measured->required, measured->fully_allocated,
                           measured->bitmaps ? fmt::format("{}", *measured->bitmaps) : "-");
    }
    static std::string reference(const std::string& arguments) {
        auto info = schema::parse_json(output_of("qemu-img measure --output=json " + arguments));
        if (!info) throw std::runtime_error(info.error().message());
        const json::object& o = info->as_object();
        const auto number = [&](const char* name) {
            return o.contains(name) ? fmt::format("{}", o.at(name).to_number<uint64_t>()) : std::string("-");
        };
        return number("required") + " " + number("fully-allocated") + " " + number("bitmaps");
    }
    bool skipped() {
        if (has_tool("qemu-img")) return false;
        WARN("skipped: qemu-img is not installed");
        return true;
    }
};

}  // namespace

TEST_CASE("qcow2 measure: empty disks as qemu-img measures them", "[qcow2][measure][interop][once]") {
    const std::string cluster = GENERATE("512", "4k", "64k", "2M");
    const std::string more = GENERATE("", ",refcount_bits=1", ",refcount_bits=64", ",extended_l2=on", ",compat=0.10",
                                      ",preallocation=metadata", ",preallocation=full", ",preallocation=falloc",
                                      ",data_file=d", ",backing_file=b,backing_fmt=raw");
    if (more == ",extended_l2=on" && (cluster == "512" || cluster == "4k")) return;
    MeasureFixture f;
    if (f.skipped()) return;
    for (const uint64_t size : {uint64_t{0}, uint64_t{1000}, uint64_t{65536} * 8192, (uint64_t{100} << 30) + 512}) {
        const std::string words = "cluster_size=" + cluster + more;
        INFO(words << " size " << size);
        CHECK(f.measure("qcow2", {.size = size}, words) ==
              MeasureFixture::reference(fmt::format("-O qcow2 -o {} --size {}", words, size)));
    }
}

TEST_CASE("qcow2 measure: images with data as qemu-img measures them", "[qcow2][measure][interop][once]") {
    MeasureFixture f;
    if (f.skipped()) return;
    const std::string raw = f.dir.file("raw"), base = f.dir.file("base"), top = f.dir.file("top"),
                      bitmaps = f.dir.file("bitmaps"), old = f.dir.file("old");
    // Data at odd places, in runs that meet inside clusters.
    const std::string writes =
        " -c 'write 1000 3000' -c 'write 70k 4k' -c 'write 200k 1M' -c 'write 5M 64k' -c 'write 9999k 1k' > /dev/null";
    f.sh("qemu-img create -q -f raw " + raw + " 10M && qemu-io -f raw" + writes + " " + raw);
    f.sh("qemu-img create -q -f qcow2 " + base + " 10M && qemu-io -f qcow2" + writes + " " + base);
    f.sh("qemu-img create -q -f qcow2 -o cluster_size=4k -b " + base + " -F qcow2 " + top +
         " && qemu-io -f qcow2 -c 'write 3M 10k' -c 'write -z 5M 64k' " + top);
    f.sh("qemu-img create -q -f qcow2 " + bitmaps + " 10M && qemu-img bitmap --add -g 512 " + bitmaps +
         " longername && qemu-img bitmap --add " + bitmaps + " b");
    f.sh("qemu-img create -q -f qcow2 -o compat=0.10 " + old + " 10M && qemu-io -f qcow2 -c 'write 1M 1M' " + old);

    const std::string name = GENERATE("raw", "base", "top", "bitmaps", "old");
    const std::string image = f.dir.file(name), format = name == "raw" ? "raw" : "qcow2";
    const std::string words = GENERATE("cluster_size=64k", "cluster_size=512", "cluster_size=2M", "cluster_size=4k",
                                       "compat=0.10", "preallocation=falloc", "backing_file=b,backing_fmt=raw");
    INFO(image << " " << words);
    if (format == "raw") {
        REQUIRE(f.open({{"driver", "raw"}, {"file", {{"driver", "file"}, {"filename", image}}}}) == "");
    } else {
        REQUIRE(f.open_file(image) == "");
    }
    CHECK(f.measure("qcow2", {.source = f.node}, words) ==
          MeasureFixture::reference("-f " + format + " -O qcow2 -o " + words + " " + image));
    CHECK(f.measure("raw", {.source = f.node}, "") == MeasureFixture::reference("-f " + format + " -O raw " + image));
}

TEST_CASE("qcow2 measure: encrypted images", "[qcow2][measure][luks][interop][once]") {
    MeasureFixture f;
    if (f.skipped()) return;
    // With small clusters the reference forgets the reference counts of the encryption's own area.
    const std::string words = GENERATE("", ",cluster_size=2M", ",refcount_bits=64");
    CHECK(f.measure("qcow2", {.size = 5 << 20}, "encrypt.format=luks,encrypt.key-secret=s" + words) ==
          MeasureFixture::reference("--object secret,id=s,data=abc -O qcow2 --size 5M -o "
                                    "encrypt.format=luks,encrypt.key-secret=s" +
                                    words));
}

TEST_CASE("qcow2 measure: what it says is what a preallocated image takes", "[qcow2][measure]") {
    MeasureFixture f;
    REQUIRE(f.rt.run(f.graph->secrets().add({{"qom-type", "secret"}, {"id", "s"}, {"data", "a passphrase"}})));
    const std::string words =
        GENERATE("cluster_size=512", "refcount_bits=64,cluster_size=4k", "extended_l2=on", "",
                 "cluster_size=512,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10");
    const uint64_t size = 7777 * 1024;
    auto measured = f.rt.run(measure_image(*f.graph, "qcow2", {.size = size}, words_of(words)));
    REQUIRE(measured);
    const std::string path = f.dir.file("x");
    REQUIRE(f.create_file("qcow2", path,
                          fmt::format("{}{}size={},preallocation=metadata", words, words.empty() ? "" : ",", size)) ==
            "");
    CHECK(f.length(path) == measured->fully_allocated);
}

TEST_CASE("qcow2 measure: refusals", "[qcow2][measure]") {
    MeasureFixture f;
    CHECK_THAT(f.measure("qcow2", {.size = 1 << 20}, "cluster_size=1000"),
               Catch::StartsWith("Cluster size must be a power of two between 512 and 2048k"));
    CHECK_THAT(f.measure("qcow2", {.size = 1 << 20}, "foo=1"), Catch::StartsWith("Invalid parameter 'foo'"));
    CHECK(f.measure("memory", {.size = 1 << 20}, "") == "Block driver 'memory' does not support size measurement");
    CHECK(f.measure("file", {.size = 1 << 20}, "") == "Block driver 'file' does not support size measurement");
    CHECK_THAT(f.measure("nix", {.size = 1 << 20}, ""), Catch::StartsWith("Unknown file format 'nix'"));
    CHECK_THAT(f.measure("qcow2", {.size = uint64_t{3} << 50}, ""),
               Catch::StartsWith("The image size is too large for file format 'qcow2'"));
    CHECK_THAT(f.measure("raw", {.size = ~uint64_t{0}}, ""), Catch::StartsWith("Invalid image size specified"));
    CHECK(f.measure("raw", {.size = 1000}, "") == "1024 1024 -");
}
