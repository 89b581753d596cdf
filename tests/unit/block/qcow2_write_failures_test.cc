// Writing when something fails at the worst place: what was acknowledged stays, what was given up refers to nothing.

#include <catch2/catch.hpp>

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <set>

#include "block/formats/qcow2/entries.h"
#include "block/image_control.h"
#include "runtime/timer.h"
#include "tests/unit/block/qcow2_memory_image.h"

using namespace gantry;
using namespace gantry::test;
using block::Preallocation;
using block::WriteFlags;

namespace {

using Op = MemoryDisk::Op;

/// Contents that compress well.
Bytes text(size_t size, uint8_t seed) {
    Bytes data(size);
    for (size_t i = 0; i < size; i++) data[i] = static_cast<uint8_t>(seed + i / 100);
    return data;
}

/// Whole-image faults: writes to L2 tables fail while `on`.
struct TableFault {
    explicit TableFault(MemoryImage& f) : disk(f.disk) {
        const auto& l1 = f.image().metadata()->l1();
        const uint64_t cluster = f.image().geometry().cluster_size();
        std::set<uint64_t> tables;
        for (uint64_t i = 0; i < l1.size(); i++) {
            if (const uint64_t table = block::qcow2::l2_table_offset(l1.get(i))) tables.insert(table / cluster);
        }
        disk->set_fault([tables, cluster](Op op, uint64_t offset, uint64_t) {
            return op == Op::kWrite && tables.contains(offset / cluster) ? EIO : 0;
        });
    }
    ~TableFault() { disk->set_fault(nullptr); }
    std::shared_ptr<MemoryDisk> disk;
};

}  // namespace

TEST_CASE("qcow2: with a full mapping log and a failing medium no entry names a place that is free",
          "[qcow2][write][log][faults]") {
    if (MemoryImage::tools_missing()) return;
    constexpr uint64_t kCluster = 512, kSize = 32 << 20;
    MemoryImage f;
    f.create("cluster_size=512", kSize);
    f.put_backing(pattern(4096, 3));
    UniqueFd log(::memfd_create("mapping-log", MFD_CLOEXEC));
    f.graph->mapping_log_source = [&](const std::string&) -> Result<UniqueFd> { return UniqueFd(::dup(log.get())); };
    REQUIRE(f.open(",'l2-cache-size':33554432") == "");
    // Every table exists, nothing waits, and the place of a later write is known to hold something.
    for (uint64_t at = 0; at < kSize; at += kCluster * 64) {
        REQUIRE(error_of(f.run(node_write(f.q(), at, pattern(kCluster, 1)))) == "");
    }
    REQUIRE(error_of(f.run(node_flush(f.q()))) == "");
    const uint64_t capacity = block::qcow2::MappingLog::capacity();
    {
        TableFault fault(f);
        // Zeroes change entries and write nothing else, until the log has no room and cannot be emptied.
        uint64_t at = 0;
        while (f.run(node_zero(f.q(), at, kCluster * 64, WriteFlags::kMayUnmap))) at += kCluster * 64;
        REQUIRE(at / kCluster > capacity - 128);
        while (f.run(node_zero(f.q(), at, kCluster, WriteFlags::kMayUnmap))) at += kCluster;
        const uint64_t last = kSize - kCluster * 64;
        CHECK(error_of(f.run(node_write(f.q(), last, text(kCluster, 7), WriteFlags::kCompressed))) != "");
        CHECK(error_of(f.run(node_write(f.q(), last + kCluster, pattern(kCluster, 8)))) != "");
        CHECK(error_of(f.run(node_flush(f.q()))) != "");
    }
    REQUIRE(error_of(f.run(node_flush(f.q()))) == "");
    // Other data takes what is free now.
    for (uint64_t i = 0; i < 200; i++) {
        REQUIRE(error_of(f.run(node_write(f.q(), (i * 64 + 3) * kCluster, pattern(kCluster, 9)))) == "");
    }
    const auto seen = f.run(node_read(f.q(), kSize - kCluster * 64, kCluster));
    REQUIRE(seen);
    CHECK((*seen == text(kCluster, 7) || *seen == pattern(kCluster, 1)));
    REQUIRE(f.close() == "");
    CHECK(f.qemu_check() == 0);
    INFO(f.report);
    CHECK(f.report.find("No errors were found") != std::string::npos);
}

TEST_CASE("qcow2: a growth over a longer backing file can be preallocated in every version",
          "[qcow2][resize][preallocation]") {
    if (MemoryImage::tools_missing()) return;
    const auto options = GENERATE(as<std::string>{}, "compat=0.10,cluster_size=4k", "cluster_size=4k",
                                  "extended_l2=on,cluster_size=16k");
    const auto mode = GENERATE(Preallocation::kMetadata, Preallocation::kFalloc, Preallocation::kFull);
    INFO(options << " mode " << static_cast<int>(mode));
    constexpr uint64_t kOld = 300 * 512, kNew = 2 << 20;
    MemoryImage f;
    f.create(options, kOld);
    const Bytes below = pattern(1 << 20, 5);
    f.put_backing(below);
    REQUIRE(f.open() == "");
    REQUIRE(error_of(f.run(block::resize_image(*f.graph, *f.q(), kNew, mode, false))) == "");
    const auto seen = f.run(node_read(f.q(), 0, kNew));
    REQUIRE(seen);
    CHECK(std::equal(seen->begin(), seen->begin() + kOld, below.begin()));
    CHECK(std::all_of(seen->begin() + kOld, seen->end(), [](uint8_t b) { return b == 0; }));
    REQUIRE(f.close() == "");
    CHECK(f.qemu_check() == 0);
    INFO(f.report);
}

TEST_CASE("qcow2: a preallocation that is given up leaves no entry that names what is behind the file",
          "[qcow2][resize][preallocation][faults]") {
    if (MemoryImage::tools_missing()) return;
    const auto options = GENERATE(as<std::string>{}, "cluster_size=4k", "extended_l2=on,cluster_size=64k");
    INFO(options);
    MemoryImage f;
    f.create(options, 1 << 20);
    REQUIRE(f.open() == "");
    int asked = 0;
    const auto some = [&asked](uint64_t, uint64_t) { return ++asked < 4; };
    const Result<> resized =
        f.run(block::resize_image(*f.graph, *f.q(), 256 << 20, Preallocation::kMetadata, false, some));
    CHECK(error_of(resized) == "Operation canceled");
    CHECK(f.q()->size() == 1 << 20);
    REQUIRE(f.close() == "");
    CHECK(f.qemu_check() == 0);
    INFO(f.report);
    CHECK(f.report.find("No errors were found") != std::string::npos);
}
