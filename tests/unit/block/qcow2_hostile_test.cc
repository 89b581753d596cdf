// Images made to do harm: writes that would damage something are refused and mark the image; what tables claim to be
// costs no memory.

#include <catch2/catch.hpp>
#include <cstdio>
#include <fstream>
#include <functional>

#include "block/formats/qcow2/check.h"
#include "tests/support/node_io.h"
#include "tests/unit/block/qcow2_check_fixture.h"
#include "tests/unit/block/qcow2_fixture.h"
#include "tests/unit/block/qcow2_ops_fixture.h"

using namespace gantry;
using namespace gantry::test;

namespace {

struct BadWrite {
    const char* name;
    std::function<void(ImageBytes&)> damage;
    const char* error;
    const char* options = "";
    uint64_t at = 0;
    bool zero = false;  // the request frees instead of writing
    bool marks = true;  // the image is marked corrupt
};

uint64_t first_data(const ImageBytes& i) { return i.word(i.l2()) & ImageBytes::kOffset; }

const std::vector<BadWrite> kBadWrites{
    {"L2 table off the clusters", [](ImageBytes& i) { i.put(i.l1(), i.l1_entry(0) + 512); }, "unaligned (L1 index: 0)",
     "", 0, false, false},
    {"L2 table far behind the file", [](ImageBytes& i) { i.put(i.l1(), (uint64_t{1} << 41) | i.kCopied); },
     "lies on other metadata or behind the file"},
    {"L2 table on the refcount table", [](ImageBytes& i) { i.put(i.l1(), i.refcount_table() | i.kCopied); },
     "lies on other metadata or behind the file"},
    {"L1 table on the refcount table", [](ImageBytes& i) { i.put(40, i.refcount_table()); },
     "Preventing invalid write on active L1 table (overlaps with refcount table)"},
    {"L1 table on a refcount block", [](ImageBytes& i) { i.put(40, i.refcount_block()); },
     "Preventing invalid write on active L1 table (overlaps with refcount block)"},
    {"data off the clusters", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) + 512); }, "Cluster allocation offset",
     "", 0, false, false},
    {"data on the L1 table", [](ImageBytes& i) { i.put(i.l2(), i.l1() | i.kCopied); }, "overlaps with active L1 table"},
    {"data on an L2 table", [](ImageBytes& i) { i.put(i.l2(), i.l2() | i.kCopied); }, "overlaps with active L2 table"},
    {"data on the refcount table", [](ImageBytes& i) { i.put(i.l2(), i.refcount_table() | i.kCopied); },
     "overlaps with refcount table"},
    {"data on a refcount block", [](ImageBytes& i) { i.put(i.l2(), i.refcount_block() | i.kCopied); },
     "overlaps with refcount block"},
    {"data far behind the file", [](ImageBytes& i) { i.put(i.l2(), (uint64_t{1} << 40) | i.kCopied); },
     "Preventing invalid write beyond the end of the file"},
    {"a refcount block off the clusters", [](ImageBytes& i) { i.put(i.refcount_table(), i.refcount_block() + 512); },
     "unaligned", "", 8 << 20},
    {"what is freed was not counted", [](ImageBytes& i) { i.put16(i.count_at(first_data(i) >> 16), 0); }, "", "", 0,
     true},
    {"a compressed cluster of garbage", [](ImageBytes& i) { i.put(i.l2(), (uint64_t{1} << 62) | first_data(i)); },
     "cannot be decoded", "", 0, false, false},
    {"a compressed cluster behind the file", [](ImageBytes& i) { i.put(i.l2(), (uint64_t{1} << 62) | 0x40000000); },
     "lies beyond the end", "", 0, false, false},
    {"subclusters that are stored and zero", [](ImageBytes& i) { i.put(i.l2() + 8, 0x00000001ffffffff); },
     "both allocated and zero", "extended_l2=on", 0, false, false},
    {"subclusters stored nowhere", [](ImageBytes& i) { i.put(i.l2(), 0); }, "allocated without a host cluster",
     "extended_l2=on", 0, false, false},
};

/// Most memory since reset(), in bytes.
struct PeakMemory {
    static uint64_t field(const std::string& name) {
        std::ifstream in("/proc/self/status");
        for (std::string line; std::getline(in, line);) {
            if (line.starts_with(name)) return std::stoull(line.substr(name.size() + 1)) * 1024;
        }
        return 0;
    }
    PeakMemory() {
        std::ofstream("/proc/self/clear_refs") << "5";
        before = field("VmRSS");
    }
    uint64_t used() const {
        const uint64_t most = field("VmHWM");
        return most > before ? most - before : 0;
    }
    uint64_t before = 0;
};

constexpr uint64_t kMuch = uint64_t{160} << 20;  // with what sanitizers add to it

}  // namespace

TEST_CASE("qcow2: a write that damaged metadata would misdirect is refused", "[qcow2][malformed][write][interop]") {
    if (OpsFixture::tools_missing()) return;
    for (const BadWrite& bad : kBadWrites) {
        INFO(bad.name);
        OpsFixture f;
        f.create(bad.options, 16 << 20);
        f.sh("qemu-io -f qcow2 -c 'write -P 1 0 300k' " + f.path);
        ImageBytes image(f.path);
        bad.damage(image);
        image.save(f.path);
        REQUIRE(f.open() == "");
        std::string error;
        if (bad.zero) {
            (void)f.rt.run(node_zero(f.node, bad.at, 65536, block::WriteFlags::kMayUnmap));
            (void)f.rt.run(node_flush(f.node));
        } else {
            error = error_of(f.rt.run(node_write(f.node, bad.at + 100, pattern(1000, 3))));
            // Entries change in memory first; what must not be written shows when they are.
            if (error.empty()) error = error_of(f.rt.run(node_flush(f.node)));
            INFO(error);
            CHECK(error.find(bad.error) != std::string::npos);
        }
        const bool marked = (ImageBytes(f.path).word(72) & 2) != 0;
        CHECK(marked == bad.marks);
        if (bad.marks) {
            CHECK(error_of(f.rt.run(node_write(f.node, 1 << 20, pattern(1000, 3)))).find("takes no more writes") !=
                  std::string::npos);
        } else {
            CHECK(f.rt.run(node_read(f.node, 8 << 20, 100)).has_value() == (image.l1_entry(0) % 65536 == 0));
        }
        f.close();
        CHECK(f.file_bytes() < image.bytes.size() + (4 << 20));
        // The tables that were aimed at are what they were.
        const ImageBytes after(f.path);
        if (bad.marks) {
            CHECK(after.word(image.refcount_table()) == image.word(image.refcount_table()));
            CHECK(after.word(image.l1()) == image.word(image.l1()));
            CHECK(f.open() != "");
        }
    }
}

TEST_CASE("qcow2: what a small file claims to hold costs no memory", "[qcow2][malformed][memory]") {
    using Make = std::function<void(TinyImage&)>;
    const std::vector<std::pair<const char*, Make>> claims{
        {"an L1 table of 32 MiB", [](TinyImage& i) { i.put32(36, 4194304).put64(24, uint64_t{4194304} << 15); }},
        {"a refcount table of 8 MiB", [](TinyImage& i) { i.put32(56, 16384); }},
        {"65536 snapshots", [](TinyImage& i) { i.snapshots(65536, 4096).grow(8192); }},
        {"a snapshot with an L1 table of 32 GiB",
         [](TinyImage& i) { i.snapshots(1, 4096).snapshot_entry(4096, 3072, 0xffffffff, '1', 'n', 32768); }},
        {"a bitmap directory of 64 MiB", [](TinyImage& i) { i.bitmaps_extension(65535, 0, 67107840, 4096); }},
        {"a bitmap of 512 MiB",
         [](TinyImage& i) { i.bitmaps_extension(1, 0, 32, 4096).bitmap_entry(4096, 8192, 1 << 20, 2, 1, 16, "b"); }},
        {"a LUKS header of 256 MiB",
         [](TinyImage& i) {
             i.put32(32, 2).put32(112, 0x0537be77).put32(116, 16).put64(120, 1024).put64(128, 1 << 28);
         }},
        {"a LUKS header of 2^60 bytes",
         [](TinyImage& i) {
             i.put32(32, 2).put32(112, 0x0537be77).put32(116, 16).put64(120, 1024).put64(128, uint64_t{1} << 60);
         }},
    };
    for (const auto& [name, make] : claims) {
        INFO(name);
        TinyImage image;
        make(image);
        Qcow2Fixture f;
        f.graph->opens_locked = true;
        f.put_memory(image);
        const json::object file{{"driver", "memory"}, {"disk", "image"}, {"growable", true}};
        const PeakMemory peak;
        for (const bool read_only : {true, false}) {
            if (f.open({{"file", file}, {"read-only", read_only}}) != "") continue;
            (void)f.read(0, 4096);
            auto checked = f.rt.run(f.node->image_operations()->check(block::CheckRepair::kNone, {}));
            if (!read_only) (void)f.rt.run(node_write(f.node, 4096, pattern(512, 1)));
            f.close();
        }
        CHECK(peak.used() < kMuch);
    }
}

TEST_CASE("qcow2: a disk as large as can be needs no more cache than any", "[qcow2][malformed][memory][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    const std::string shape = GENERATE(as<std::string>(), "cluster_size=2M", "cluster_size=64k");
    f.sh("qemu-img create -q -f qcow2 -o " + shape + " " + f.path + (shape == "cluster_size=2M" ? " 256P" : " 1P"));
    const PeakMemory peak;
    REQUIRE(f.open() == "");
    for (uint64_t i = 0; i < 20; i++) {
        CHECK(error_of(f.rt.run(node_write(f.node, f.node->size() / 20 * i, pattern(100, 1)))) == "");
    }
    f.close();
    CHECK(peak.used() < kMuch * 2);
}

TEST_CASE("qcow2 check: clusters at far ends of a sparse file cost what they are, not what lies between",
          "[qcow2][check][memory][once][long]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    f.create("a", "cluster_size=512", "1M");
    f.io("a", {"write -P 1 0 32k"});
    ImageBytes image(f.path("a"));
    for (uint64_t i = 0; i < 64; i++) image.put(image.l2() + i * 8, ((i + 1) << 33) | image.kCopied);
    image.save(f.path("a"));
    std::error_code failed;
    std::filesystem::resize_file(f.path("a"), uint64_t{1} << 40, failed);
    if (failed) SKIP_TEST("the file system has no sparse files of 1 TiB");
    const PeakMemory peak;
    const CheckNumbers n = f.check("a");
    CHECK(n.corruptions >= 64);
    CHECK(peak.used() < kMuch);
}
