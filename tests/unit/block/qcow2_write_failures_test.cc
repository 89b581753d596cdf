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

namespace {

/// What a write of the header met.
enum class Fault { kOnce, kForGood };

/// Once `armed`, the flush that follows the next write of header fields at `from` or above fails although the write has
/// happened; with kForGood nothing can be written to the header any more.
struct HeaderFault {
    HeaderFault(MemoryImage& f, Fault kind, uint64_t from = 24) : disk(f.disk) {
        disk->set_fault([this, kind, from](Op op, uint64_t offset, uint64_t length) {
            if (op == Op::kWrite && offset < 512) {
                if (hit && kind == Fault::kForGood) return EIO;
                written = written || (!hit && offset >= from && offset + length <= 512);
            }
            if (op != Op::kFlush || !written) return 0;
            written = false;
            hit = true;
            return ECANCELED;
        });
    }
    ~HeaderFault() { disk->set_fault(nullptr); }
    std::shared_ptr<MemoryDisk> disk;
    bool written = false, hit = false;
};

/// The image as the next process would find it: no reference without its count, and the disk is `contents`.
void judge_copy(MemoryImage& f, const Bytes& contents) {
    const int checked = f.qemu_check();
    INFO(f.report);
    CHECK((checked == 0 || checked == 3));
    const std::string raw = f.dir.file("copy.raw");
    const ShellResult converted = shell("qemu-img convert -f qcow2 -O raw " + f.save() + " " + raw);
    INFO(converted.output);
    REQUIRE(converted.status == 0);
    std::ifstream in(raw, std::ios::binary);
    const Bytes seen{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    CHECK(seen == contents);
}

void put(MemoryImage& f, Bytes& contents, uint64_t at, uint64_t length, uint8_t seed) {
    Bytes data = pattern(length, seed);
    std::ranges::copy(data, contents.begin() + static_cast<ptrdiff_t>(at));
    REQUIRE(error_of(f.run(node_write(f.q(), at, std::move(data)))) == "");
}

bool marked_dirty(MemoryImage& f) { return (f.disk->bytes(79, 1)[0] & 1) != 0; }

constexpr uint64_t kDisk = 4 << 20;

Result<> run_operation(MemoryImage& f, int which) {
    block::Graph& g = *f.graph;
    switch (which) {
        case 0:
            return f.run(block::create_snapshot(g, *f.q(), {.name = "second"}));
        case 1:
            return f.run(block::apply_snapshot(g, *f.q(), "first"));
        case 2:
            return f.run(block::delete_snapshot(g, *f.q(), "", "first"));
        case 3:
            return f.run(block::resize_image(g, *f.q(), 4 * kDisk, Preallocation::kOff, true));
        case 4:
            return f.run(block::resize_image(g, *f.q(), kDisk / 2, Preallocation::kOff, true));
        case 5:
            return f.run(block::amend_image(g, *f.q(), {{"refcount_bits", "64"}}, false));
        default:
            return f.run(block::compact_image(g, *f.q()));
    }
}

}  // namespace

TEST_CASE("qcow2: when the header cannot be switched, what is written afterwards is where the header says",
          "[qcow2][operations][faults][once]") {
    if (MemoryImage::tools_missing()) return;
    const int which = GENERATE(range(0, 7));
    const Fault kind = GENERATE(Fault::kOnce, Fault::kForGood);
    // Steps of one operation may switch the header more than once.
    const uint64_t from = GENERATE(24, 48, 60);
    INFO("operation " << which << " fault " << static_cast<int>(kind) << " from " << from);
    MemoryImage f;
    f.create("cluster_size=4k", kDisk);
    REQUIRE(f.open() == "");
    Bytes contents(kDisk);
    put(f, contents, 0, 300'000, 1);
    put(f, contents, 2 << 20, 200'000, 2);
    REQUIRE(error_of(f.run(block::create_snapshot(*f.graph, *f.q(), {.name = "first"}))) == "");
    put(f, contents, 100'000, 300'000, 3);
    std::fill_n(contents.begin(), 65'536, uint8_t{0});
    REQUIRE(error_of(f.run(node_discard(f.q(), 0, 65'536))) == "");
    {
        HeaderFault fault(f, kind, from);
        const Result<> done = run_operation(f, which);
        if (!fault.hit) return;
        CHECK_FALSE(done);
    }
    const uint64_t size = f.q()->size();
    REQUIRE((which == 4 || size == kDisk));
    contents.resize(size);
    Bytes data = pattern(150'000, 4);
    const Result<> written = f.run(node_write(f.q(), 50'000, data));
    REQUIRE(written.has_value() == (kind == Fault::kOnce));
    if (written) {
        std::ranges::copy(data, contents.begin() + 50'000);
        REQUIRE(error_of(f.run(node_flush(f.q()))) == "");
        judge_copy(f, contents);
        put(f, contents, 1 << 20, 500'000, 5);
    }
    (void)f.close();
    if (written) {
        const int checked = f.qemu_check();
        INFO(f.report);
        // What an operation had raised before it failed is lowered again or leaks; a missing flag costs a copy.
        CHECK((checked == 0 || checked == 3));
    }
    // Opened anew, it is what its header says.
    REQUIRE(f.open() == "");
    const auto seen = f.run(node_read(f.q(), 0, f.q()->size()));
    REQUIRE(seen);
    if (written) CHECK(*seen == contents);
    CHECK(error_of(f.run(node_write(f.q(), 0, pattern(100'000, 6)))) == "");
    CHECK(f.close() == "");
    const int checked = f.qemu_check();
    INFO(f.report);
    CHECK((checked == 0 || checked == 3));
}

TEST_CASE("qcow2: counts stay behind only while the image says that it is dirty", "[qcow2][lazy][faults]") {
    if (MemoryImage::tools_missing()) return;
    MemoryImage f;
    SECTION("lazy refcounts are switched on while the image is written") {
        f.create("cluster_size=4k", kDisk);
        REQUIRE(f.open() == "");
        REQUIRE(error_of(f.run(node_write(f.q(), 0, pattern(100'000, 1)))) == "");
        REQUIRE(error_of(f.run(block::amend_image(*f.graph, *f.q(), {{"lazy_refcounts", "on"}}, false))) == "");
    }
    SECTION("the end of a session fails although it is in the file") {
        f.create("cluster_size=4k,lazy_refcounts=on", kDisk);
        REQUIRE(f.open() == "");
        REQUIRE(error_of(f.run(node_write(f.q(), 0, pattern(100'000, 1)))) == "");
        CHECK(marked_dirty(f));
        HeaderFault fault(f, Fault::kOnce, 0);
        CHECK_FALSE(f.run(block::create_snapshot(*f.graph, *f.q(), {.name = "s"})));
        CHECK(fault.hit);
    }
    REQUIRE(error_of(f.run(node_write(f.q(), 1 << 20, pattern(2'000'000, 2)))) == "");
    REQUIRE(error_of(f.run(node_flush(f.q()))) == "");
    CHECK(marked_dirty(f));
    REQUIRE(f.close() == "");
    CHECK_FALSE(marked_dirty(f));
    CHECK(f.qemu_check() == 0);
    INFO(f.report);
}

TEST_CASE("qcow2: a table that moved although its L1 entry could not be written is not lost",
          "[qcow2][compact][faults]") {
    if (MemoryImage::tools_missing()) return;
    MemoryImage f;
    f.create("cluster_size=512", kDisk);
    REQUIRE(f.open() == "");
    Bytes contents(kDisk);
    // Tables lie behind data that goes away.
    put(f, contents, 0, 300'000, 1);
    put(f, contents, 2 << 20, 200'000, 2);
    std::fill_n(contents.begin() + 32'768, 262'144, uint8_t{0});
    REQUIRE(error_of(f.run(node_discard(f.q(), 32'768, 262'144))) == "");
    REQUIRE(error_of(f.run(node_flush(f.q()))) == "");
    const uint64_t l1 = f.image().image().header.l1_table_offset;
    const int passes = GENERATE(0, 1, 3);
    int seen = 0;
    f.disk->set_fault([&](Op op, uint64_t offset, uint64_t length) {
        if (op != Op::kWrite || length != 8 || offset < l1 || offset >= l1 + 512) return 0;
        return seen++ >= passes ? EIO : 0;
    });
    CHECK_FALSE(f.run(block::compact_image(*f.graph, *f.q())));
    f.disk->set_fault(nullptr);
    REQUIRE(seen > passes);
    put(f, contents, 2 << 20, 100'000, 3);
    put(f, contents, 0, 30'000, 4);
    REQUIRE(error_of(f.run(node_flush(f.q()))) == "");
    judge_copy(f, contents);
    REQUIRE(f.close() == "");
    judge_copy(f, contents);
}
