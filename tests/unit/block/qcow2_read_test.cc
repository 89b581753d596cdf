// Images made by qemu-img and qemu-io, compared byte for byte with what qemu-img itself reads from them.

#include <catch2/catch.hpp>

#include <random>

#include "tests/unit/block/qcow2_fixture.h"

using namespace gantry;
using namespace gantry::test;

namespace {

bool tools_missing() {
    if (Qcow2Fixture::has_tool("qemu-img") && Qcow2Fixture::has_tool("qemu-io")) return false;
    WARN("SKIPPED: qemu-img or qemu-io is not installed");
    return true;
}

/// qemu-io commands that leave a bit of everything; `zeroes`: with zero clusters.
std::string busy_commands(bool zeroes) {
    std::string c;
    std::mt19937 random(7);
    for (int i = 0; i < 24; i++) {
        const unsigned at = random() % (4096 - 160) * 512, length = (random() % 160 + 1) * 512;
        c += fmt::format(" -c 'write -P {} {} {}'", random() % 255 + 1, at, length);
        if (zeroes && i % 6 == 3) c += fmt::format(" -c 'write -z {} {}'", random() % 3800 * 512, 65536);
        if (zeroes && i % 6 == 5) c += fmt::format(" -c 'write -z -u {} {}'", random() % 3800 * 512, 131072);
    }
    return c;
}

/// Reads the whole disk in large pieces and small odd ones, against `expected`.
void compare(Qcow2Fixture& f, const std::vector<uint8_t>& expected) {
    REQUIRE(f.node->size() == expected.size());
    constexpr uint64_t kStep = 300000;
    for (uint64_t at = 0; at < expected.size(); at += kStep) {
        const uint64_t length = std::min<uint64_t>(kStep, expected.size() - at);
        auto r = f.read(at, length);
        INFO("at " << at << (r ? "" : ": " + r.error().message()));
        REQUIRE(r);
        REQUIRE(std::equal(r->begin(), r->end(), expected.begin() + static_cast<ptrdiff_t>(at)));
    }
    std::mt19937 random(1);
    for (int i = 0; i < 200; i++) {
        const uint64_t at = random() % expected.size();
        const uint64_t length = std::min<uint64_t>(random() % 9000 + 1, expected.size() - at);
        auto r = f.read(at, length);
        REQUIRE(r);
        REQUIRE(std::equal(r->begin(), r->end(), expected.begin() + static_cast<ptrdiff_t>(at)));
    }
    // Block status covers the disk, and what it calls zero is.
    for (uint64_t at = 0; at < expected.size();) {
        auto s = f.status(at, expected.size() - at);
        REQUIRE(s);
        REQUIRE(s->length > 0);
        if (s->zero) {
            INFO(at << "+" << s->length);
            CHECK(std::all_of(expected.begin() + static_cast<ptrdiff_t>(at),
                              expected.begin() + static_cast<ptrdiff_t>(at + s->length),
                              [](uint8_t b) { return b == 0; }));
        }
        at += s->length;
    }
}

void compare_with_qemu(Qcow2Fixture& f, const std::string& path, json::object options = {},
                       const std::string& more = "") {
    const std::string raw = f.dir.file("expected.raw");
    Qcow2Fixture::sh("cd " + f.dir.path() + " && qemu-img convert -f qcow2 -O raw " + more + " " + path + " " + raw);
    const std::string refusal = f.open_file(path, std::move(options));
    INFO(refusal);
    REQUIRE(refusal == "");
    std::vector<uint8_t> expected = Qcow2Fixture::bytes_of(raw);
    // qemu-img gives a snapshot the size that the disk has today.
    if (f.image().image().opened_snapshot) expected.resize(f.image().image().disk_size);
    compare(f, expected);
}

}  // namespace

TEST_CASE("qcow2: images of every shape read as qemu reads them", "[qcow2][read][interop][once]") {
    if (tools_missing()) return;
    const std::string options =
        GENERATE(as<std::string>{}, "cluster_size=512", "cluster_size=1k", "cluster_size=4k", "cluster_size=64k",
                 "cluster_size=2M", "compat=0.10", "refcount_bits=1", "refcount_bits=64", "lazy_refcounts=on",
                 "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=128k",
                 "extended_l2=on,cluster_size=2M", "preallocation=metadata");
    INFO(options);
    Qcow2Fixture f;
    const std::string path = f.dir.file("i.qcow2");
    Qcow2Fixture::sh("qemu-img create -q -f qcow2 -o " + options + " " + path + " 2148864");  // not a whole cluster
    Qcow2Fixture::sh("qemu-io -f qcow2" + busy_commands(options != "compat=0.10") + " " + path);
    compare_with_qemu(f, path);
    compare_with_qemu(f, path, {{"l2-cache-entry-size", 512}, {"l2-cache-size", 1024}});
}

TEST_CASE("qcow2: compressed images read as qemu reads them", "[qcow2][compressed][interop][once]") {
    if (tools_missing()) return;
    const std::string options =
        GENERATE(as<std::string>{}, "cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M",
                 "compat=0.10", "compression_type=zstd", "compression_type=zstd,cluster_size=2M",
                 "compression_type=zstd,cluster_size=4k", "extended_l2=on");
    INFO(options);
    Qcow2Fixture f;
    const std::string source = f.dir.file("s.qcow2"), path = f.dir.file("i.qcow2");
    Qcow2Fixture::sh("qemu-img create -q -f qcow2 " + source + " 2148864");
    Qcow2Fixture::sh("qemu-io -f qcow2" + busy_commands(true) + " " + source);
    Qcow2Fixture::sh("qemu-img convert -c -f qcow2 -O qcow2 -o " + options + " " + source + " " + path);
    if (options == "cluster_size=64k") Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -P 9 100k 300k' " + path);
    compare_with_qemu(f, path);
    CHECK(f.image().decodes() > 0);
}

TEST_CASE("qcow2: small sequential reads decode a compressed cluster once", "[qcow2][compressed][interop]") {
    if (tools_missing()) return;
    Qcow2Fixture f;
    const std::string path = f.dir.file("i.qcow2");
    Qcow2Fixture::sh("qemu-img create -q -f qcow2 " + path + " 1M");
    Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -c -P 5 0 64k' -c 'write -c -P 6 64k 64k' " + path);
    REQUIRE(f.open_file(path) == "");
    for (uint64_t at = 0; at < 131072; at += 4096) CHECK(f.filled_with(at, 4096) == (at < 65536 ? 5 : 6));
    CHECK(f.image().decodes() == 2);
    auto s = f.status(0, 1 << 20);
    REQUIRE(s);
    CHECK(s->compressed);
    CHECK_FALSE(s->has_offset);
}

TEST_CASE("qcow2: backing chains of other sizes read as qemu reads them", "[qcow2][backing][interop]") {
    if (tools_missing()) return;
    const std::string size = GENERATE(as<std::string>{}, "1000k", "2100k", "3M");
    const std::string options = GENERATE(as<std::string>{}, "cluster_size=64k", "extended_l2=on");
    INFO(size << " " << options);
    Qcow2Fixture f;
    const std::string base = f.dir.file("base.qcow2"), path = f.dir.file("i.qcow2");
    Qcow2Fixture::sh("qemu-img create -q -f qcow2 -o cluster_size=4k " + base + " 2100k");
    Qcow2Fixture::sh("qemu-io -f qcow2" + busy_commands(true) + " " + base);
    Qcow2Fixture::sh("qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 -o " + options + " " + path + " " + size);
    Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -P 77 100k 9000' -c 'write -z 300k 128k' -c 'discard 500k 200k' " +
                     path);
    compare_with_qemu(f, path);
}

TEST_CASE("qcow2: images with external data read as qemu reads them", "[qcow2][data-file][interop]") {
    if (tools_missing()) return;
    const std::string raw = GENERATE(as<std::string>{}, "off", "on");
    Qcow2Fixture f;
    const std::string path = f.dir.file("i.qcow2");
    Qcow2Fixture::sh("cd " + f.dir.path() + " && qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=" + raw +
                     " i.qcow2 2148864");
    Qcow2Fixture::sh("cd " + f.dir.path() + " && qemu-io -f qcow2" + busy_commands(true) + " i.qcow2");
    compare_with_qemu(f, path);
    if (raw == "on") {
        std::vector<uint8_t> data = Qcow2Fixture::bytes_of(f.dir.file("d.raw"));
        data.resize(2148864);  // the file is a whole number of clusters
        compare(f, data);
    }
    auto info = f.rt.run(f.node->image_info());
    REQUIRE(info);
    const json::object& data = info->format_specific.at("data").as_object();
    CHECK(data.at("data-file") == "d.raw");
    CHECK(data.at("data-file-raw") == (raw == "on"));
}

TEST_CASE("qcow2: internal snapshots made by qemu-img read as they were", "[qcow2][snapshot][interop]") {
    if (tools_missing()) return;
    Qcow2Fixture f;
    const std::string path = f.dir.file("i.qcow2");
    Qcow2Fixture::sh("qemu-img create -q -f qcow2 " + path + " 2148864");
    Qcow2Fixture::sh("qemu-io -f qcow2" + busy_commands(true) + " " + path);
    Qcow2Fixture::sh("qemu-img snapshot -c first " + path);
    Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -P 1 0 1M' " + path);
    Qcow2Fixture::sh("qemu-img resize -q -f qcow2 " + path + " 4M");
    Qcow2Fixture::sh("qemu-img snapshot -c second " + path);
    Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -P 2 0 1M' " + path);
    compare_with_qemu(f, path);
    compare_with_qemu(f, path, {{"snapshot", "first"}}, "-l first");
    CHECK(f.node->size() == 2148864);
    compare_with_qemu(f, path, {{"snapshot", "2"}}, "-l second");
}

TEST_CASE("qcow2: bytes of a good image changed one by one", "[qcow2][malformed][interop]") {
    if (tools_missing()) return;
    Qcow2Fixture f;
    const std::string path = f.dir.file("good.qcow2"), bad = f.dir.file("bad.qcow2");
    Qcow2Fixture::sh("qemu-img create -q -f qcow2 -o cluster_size=64k " + path + " 1M");
    Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -P 1 0 128k' " + path);
    const auto good = Qcow2Fixture::bytes_of(path);
    constexpr uint64_t kL1 = 0x30000, kL2 = 0x40000;  // where qemu-img puts them
    struct Row {
        uint64_t at, value;
        const char* error;  // of reading [0, 1); empty: reads fine
    };
    const Row rows[] = {
        {kL1, 0x8000000000040200, "node 'q': image is corrupt: L2 table offset 0x40200 unaligned (L1 index: 0)"},
        {kL2, 0x8000000000050200,
         "node 'q': image is corrupt: Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 0)"},
        {kL1, 0x8000000007000000, ""},
        {kL2, 0x8000000007000000, ""},
        {kL1, 0x9000000000040001, ""},
        {kL2, 0x9000000000050002, ""},
        {kL2, 0x4000000000050000, "node 'q': image is corrupt: Compressed cluster at 0x50000 cannot be decoded: "},
        {kL2, 0x4000000007050000, "node 'q': image is corrupt: Compressed cluster at 0x7050000 lies beyond the end"},
    };
    for (const Row& row : rows) {
        TinyImage image;
        image.bytes = good;
        image.put64(row.at, row.value);
        std::ofstream(bad, std::ios::binary)
            .write(reinterpret_cast<const char*>(image.bytes.data()), static_cast<std::streamsize>(image.bytes.size()));
        INFO(std::hex << row.at << ": " << row.value);
        REQUIRE(f.open_file(bad) == "");
        const std::string error = f.read_error(0, 1);
        INFO(error);
        if (*row.error) {
            CHECK(error.starts_with(row.error));
        } else {
            CHECK(error == "");
        }
    }
}
