// Runtime options of an open image: what they do to the file below, and their change by a reopen.

#include <catch2/catch.hpp>

#include "block/image_control.h"
#include "tests/unit/block/qcow2_write_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::WriteFlags;
using block::qcow2::Structure;

namespace {

using Op = MemoryDisk::Op;

struct OptionsFixture : WriteFixture {
    /// Puts an image that qemu-img makes onto the memory disk; `more`: further commands, %s is the image.
    void make(const std::string& options, uint64_t size, std::string more = "") {
        const std::string path = create(options, size);
        for (size_t at; (at = more.find("%s")) != std::string::npos;) more.replace(at, 2, path);
        if (!more.empty()) sh(more);
        const std::vector<uint8_t> bytes = bytes_of(path);
        auto disk = MemoryDisk::named("image");
        disk->resize(0);
        disk->write(0, bytes.data(), bytes.size());
    }
    std::string open_made(json::object options = {}) {
        options["file"] = file();
        return open_writable(std::move(options));
    }
    static json::object file() {
        return {{"driver", "memory"}, {"disk", "image"}, {"discard", "unmap"}, {"growable", true}};
    }
    /// The node as it was opened, with `more`.
    std::string reopen(json::object more, bool read_only = false) {
        more["driver"] = "qcow2";
        more["node-name"] = "q";
        more["file"] = file();
        more["read-only"] = read_only;
        more.emplace("discard", "unmap");
        std::vector<json::object> list;
        list.push_back(std::move(more));
        return text_of(rt.run(graph->reopen(std::move(list))));
    }
    /// 0: clean, of the closed image.
    int check_made() {
        auto disk = MemoryDisk::named("image");
        const std::vector<uint8_t> bytes = disk->bytes(0, disk->size());
        const std::string path = dir.file("made.qcow2");
        std::ofstream(path, std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        return check(path);
    }
};

/// Discards that reach the file while it lives.
struct Discards {
    explicit Discards(const char* name = "image") : disk(MemoryDisk::named(name)) {
        disk->set_fault([this](Op op, uint64_t offset, uint64_t length) {
            const std::lock_guard lock(mutex);
            if (op == Op::kDiscard) seen.emplace_back(offset, length);
            return 0;
        });
    }
    ~Discards() { disk->set_fault(nullptr); }
    uint64_t bytes() {
        const std::lock_guard lock(mutex);
        uint64_t sum = 0;
        for (const auto& [offset, length] : seen) sum += length;
        return sum;
    }
    std::shared_ptr<MemoryDisk> disk;
    std::mutex mutex;
    std::vector<std::pair<uint64_t, uint64_t>> seen;
};

}  // namespace

TEST_CASE("qcow2: pass-discard-request decides about the space of discards and zeroes", "[qcow2][options][interop]") {
    if (no_qemu()) return;
    const auto [option, node_discard, passed] = GENERATE(table<std::optional<bool>, const char*, bool>(
        {{std::nullopt, "unmap", true}, {true, "unmap", true}, {false, "unmap", false}, {true, "ignore", false}}));
    INFO(node_discard << (option ? (*option ? " true" : " false") : " default"));
    OptionsFixture f;
    f.make("", 8 << 20);
    json::object options{{"discard", node_discard}};
    if (option) options["pass-discard-request"] = *option;
    REQUIRE(f.open_made(options) == "");
    REQUIRE(f.write(0, 4 << 20, 7) == "");
    REQUIRE(f.flush() == "");
    Discards discards;
    REQUIRE(f.discard(0, 1 << 20) == "");
    REQUIRE(f.flush() == "");
    f.settle();
    REQUIRE(f.flush() == "");
    // A node with discard=ignore never hears of the discard.
    CHECK(discards.bytes() == (passed ? 1 << 20 : 0));
    CHECK(f.filled_with(0, 1 << 20) == (std::string_view(node_discard) == "ignore" ? 7 : 0));
    const uint64_t before = discards.bytes();
    REQUIRE(f.zero(2 << 20, 1 << 20, WriteFlags::kMayUnmap) == "");
    REQUIRE(f.flush() == "");
    f.settle();
    REQUIRE(f.flush() == "");
    CHECK(discards.bytes() - before == (passed ? 1 << 20 : 0));
    CHECK(f.filled_with(2 << 20, 1 << 20) == 0);
    f.close();
    CHECK(f.check_made() == 0);
}

TEST_CASE("qcow2: pass-discard-request decides about the space of an external data file", "[qcow2][options][interop]") {
    if (no_qemu()) return;
    const bool passed = GENERATE(true, false);
    OptionsFixture f;
    f.make("-o data_file=" + f.dir.file("named"), 8 << 20);
    MemoryDisk::forget("data");
    json::object data = OptionsFixture::file();
    data["disk"] = "data";
    MemoryDisk::named("data")->resize(8 << 20);
    REQUIRE(f.open_made({{"data-file", data}, {"pass-discard-request", passed}}) == "");
    REQUIRE(f.write(0, 4 << 20, 7) == "");
    REQUIRE(f.flush() == "");
    {
        Discards discards("data");
        REQUIRE(f.discard(1 << 20, 1 << 20) == "");
        REQUIRE(f.zero(3 << 20, 1 << 19, WriteFlags::kMayUnmap) == "");
        REQUIRE(f.flush() == "");
        CHECK(discards.bytes() == (passed ? 3 << 19 : 0));
    }
    CHECK(f.filled_with(1 << 20, 1 << 20) == 0);
    CHECK(f.filled_with(3 << 20, 1 << 19) == 0);
    CHECK(f.filled_with(2 << 20, 1 << 20) == 7);
    f.close();
    MemoryDisk::forget("data");
}

TEST_CASE("qcow2: pass-discard-snapshot decides about the space of snapshots that go", "[qcow2][options][interop]") {
    if (no_qemu()) return;
    const auto [option, passed] =
        GENERATE(table<std::optional<bool>, bool>({{std::nullopt, true}, {true, true}, {false, false}}));
    OptionsFixture f;
    f.make("", 8 << 20, "qemu-io -f qcow2 -c 'write -P 5 0 1M' %s && qemu-img snapshot -c s %s");
    json::object options;
    if (option) options["pass-discard-snapshot"] = *option;
    REQUIRE(f.open_made(options) == "");
    REQUIRE(f.write(0, 1 << 20, 6) == "");
    Discards discards;
    REQUIRE(WriteFixture::text_of(f.rt.run(block::delete_snapshot(*f.graph, *f.node, "", "s"))) == "");
    CHECK((discards.bytes() >= 1 << 20) == passed);
    if (!passed) CHECK(discards.bytes() == 0);
    f.close();
    CHECK(f.check_made() == 0);
}

TEST_CASE("qcow2: pass-discard-other decides about the space of metadata", "[qcow2][options][interop]") {
    if (no_qemu()) return;
    const auto [option, passed] =
        GENERATE(table<std::optional<bool>, bool>({{std::nullopt, false}, {true, true}, {false, false}}));
    OptionsFixture f;
    f.make("", 8 << 20, "qemu-img bitmap --add -g 512 %s b");
    json::object options;
    if (option) options["pass-discard-other"] = *option;
    REQUIRE(f.open_made(options) == "");
    Discards discards;
    REQUIRE(f.rt.run(f.image().remove_stored_bitmap("b")));
    CHECK((discards.bytes() != 0) == passed);
    f.close();
    CHECK(f.check_made() == 0);
}

TEST_CASE("qcow2: each structure is guarded by its own switch of overlap-check", "[qcow2][options][overlap][corrupt]") {
    // An image with everything: cluster 6 snapshot table, 7 inactive L1, 8 inactive L2, 9 bitmap directory and 10 its
    // table. The entry of guest cluster 1 points where nothing but metadata may be.
    constexpr uint64_t kCluster = TinyImage::kCluster;
    TinyImage image;
    image.grow(12 * kCluster);
    for (uint64_t i = 0; i < 12; i++) image.put16(TinyImage::kRefcountBlock + i * 2, 1);
    image.snapshots(1, 6 * kCluster).snapshot_entry(6 * kCluster, 7 * kCluster, 1, '1', 's', TinyImage::kDiskSize);
    image.put64(7 * kCluster, (8 * kCluster) | TinyImage::kCopied);
    image.bitmaps_extension(1, 0, 32, 9 * kCluster).bitmap_entry(9 * kCluster, 10 * kCluster, 1, 2, 1, 9, "b");
    struct Row {
        const char* option;
        uint64_t place;
        const char* name;
        bool constant, cached;
    };
    const Row row = GENERATE_COPY(Row{"active-l1", TinyImage::kL1, "active L1 table", true, true},
                                  Row{"active-l2", TinyImage::kL2, "active L2 table", false, true},
                                  Row{"refcount-table", TinyImage::kRefcountTable, "refcount table", true, true},
                                  Row{"refcount-block", TinyImage::kRefcountBlock, "refcount block", false, true},
                                  Row{"snapshot-table", 6 * kCluster, "snapshot table", true, true},
                                  Row{"inactive-l1", 7 * kCluster, "inactive L1 table", false, true},
                                  Row{"inactive-l2", 8 * kCluster, "inactive L2 table", false, false},
                                  Row{"bitmap-directory", 9 * kCluster, "bitmap directory", true, true});
    INFO(row.option);
    image.put64(TinyImage::kL2 + 8, row.place | TinyImage::kCopied);

    const auto guarded = [&](json::value check) {
        OptionsFixture f;
        REQUIRE(f.open_tiny(image, {{"overlap-check", std::move(check)}}) == "");
        auto disk = MemoryDisk::named("image");
        const std::vector<uint8_t> before = disk->bytes(row.place, kCluster);
        const std::string refused = f.write(kCluster, kCluster, 'x');
        f.settle();
        if (refused.empty()) {
            CHECK(f.observer.events.empty());
            CHECK(disk->bytes(72, 8)[7] == 0);
            CHECK(disk->bytes(row.place, kCluster) == std::vector<uint8_t>(kCluster, 'x'));
            return false;
        }
        CHECK(refused ==
              fmt::format("node 'q': image is corrupt: Preventing invalid write on metadata (overlaps with {})",
                          row.name));
        REQUIRE(f.observer.events.size() == 1);
        CHECK(f.observer.events[0].fatal);
        CHECK(f.observer.events[0].offset == row.place);
        CHECK(f.observer.events[0].size == kCluster);
        CHECK(disk->bytes(72, 8)[7] == 2);  // corrupt
        CHECK(disk->bytes(row.place, kCluster) == before);
        // Reopened, it can be read only.
        f.close();
        CHECK(f.open({{"file", OptionsFixture::file()}, {"read-only", false}}).find("Image is corrupt") !=
              std::string::npos);
        CHECK(f.open({{"file", OptionsFixture::file()}}) == "");
        return true;
    };
    CHECK(guarded(json::object{{"template", "none"}, {row.option, true}}));
    CHECK_FALSE(guarded(json::object{{"template", "all"}, {row.option, false}}));
    CHECK_FALSE(guarded("none"));
    CHECK(guarded("constant") == row.constant);
    CHECK(guarded("cached") == row.cached);
    CHECK(guarded("all"));
}

TEST_CASE("qcow2: what an entry gives up is not taken from metadata", "[qcow2][options][overlap][corrupt]") {
    const uint64_t place =
        GENERATE(TinyImage::kL1, TinyImage::kL2, TinyImage::kRefcountTable, TinyImage::kRefcountBlock);
    const std::string action = GENERATE("discard", "zeroes", "discard without unref", "write", "compressed");
    INFO(action << " at " << place);
    TinyImage image;
    uint64_t entry = place | (action == "write" ? 0 : TinyImage::kCopied);
    if (action == "compressed") entry = place | uint64_t{1} << 62;
    image.put64(TinyImage::kL2 + 8, entry);
    OptionsFixture f;
    f.put_memory(image);
    const std::vector<uint8_t> before = MemoryDisk::named("image")->bytes(place, TinyImage::kCluster);
    REQUIRE(f.open_made({{"discard-no-unref", action == "discard without unref"}}) == "");
    std::string refused;
    if (action == "write") {
        refused = f.write(TinyImage::kCluster, TinyImage::kCluster, 'x');
    } else if (action == "zeroes") {
        refused = f.zero(TinyImage::kCluster, TinyImage::kCluster, WriteFlags::kMayUnmap);
    } else {
        refused = f.discard(TinyImage::kCluster, TinyImage::kCluster);
    }
    if (refused.empty()) refused = f.flush();
    f.settle();
    if (refused.empty()) refused = f.flush();
    CAPTURE(refused);
    const auto disk = MemoryDisk::named("image");
    REQUIRE(f.observer.events.size() == 1);
    CHECK(f.observer.events[0].fatal);
    CHECK(disk->bytes(72, 8)[7] == 2);
    // Only the table that holds the entry may have changed, by losing it; and counts, by those of new clusters.
    const std::vector<uint8_t> after = disk->bytes(place, TinyImage::kCluster);
    for (uint64_t i = 0; i < after.size(); i++) {
        if (place == TinyImage::kL2 && i / 8 == 1) continue;
        if (place < TinyImage::kL1 && action == "write" && before[i] == 0) continue;
        if (after[i] != before[i]) FAIL("byte " << i << " has changed");
    }
    f.close();
    REQUIRE(f.open({{"file", OptionsFixture::file()}}) == "");
    CHECK(f.filled_with(0, TinyImage::kCluster) == 'a');
}

TEST_CASE("qcow2: the header is no place for data even where nobody counts it", "[qcow2][options][overlap][corrupt]") {
    // No entry can name it: place 0 is no place. But its cluster may seem to be free.
    const json::value check =
        GENERATE(json::value("constant"), json::value("none"), json::value(json::object{{"main-header", false}}));
    TinyImage image;
    image.put16(TinyImage::kRefcountBlock, 0);
    OptionsFixture f;
    f.put_memory(image);
    REQUIRE(f.open_made({{"overlap-check", check}}) == "");
    const std::vector<uint8_t> before = MemoryDisk::named("image")->bytes(0, 72);
    CHECK(f.write(4096, 20 * TinyImage::kCluster, 'x') == "");
    CHECK(f.filled_with(4096, 20 * TinyImage::kCluster) == 'x');
    f.close();
    CHECK(MemoryDisk::named("image")->bytes(0, 72) == before);
    CHECK(f.open_made() == "");
    CHECK(f.filled_with(4096, 20 * TinyImage::kCluster) == 'x');
}

TEST_CASE("qcow2: a reopen changes the caches", "[qcow2][options][reopen][cache][interop]") {
    if (no_qemu()) return;
    OptionsFixture f;
    f.make("-o cluster_size=4k", 64 << 20);  // 128 KiB of L2 entries
    REQUIRE(f.open_made({{"l2-cache-size", 8192}}) == "");
    CHECK(f.image().l2_cache().slice_bytes() == 4096);
    CHECK(f.image().l2_cache().slots() == 8);
    for (unsigned i = 0; i < 64; i++) REQUIRE(f.write(i << 20, 9000, static_cast<uint8_t>(i + 1)) == "");
    CHECK(f.image().l2_cache().dirty_count() != 0);

    // Larger, other slices, with changes that are not written yet.
    REQUIRE(f.reopen({{"l2-cache-entry-size", 512}, {"cache-size", 1 << 20}, {"cache-clean-interval", 0}}) == "");
    CHECK(f.image().l2_cache().slice_bytes() == 512);
    CHECK(f.image().l2_cache().slots() == 256);
    CHECK(f.image().image().caches.refcount_bytes == 16384);
    CHECK(f.image().image().caches.clean_interval_s == 0);
    for (unsigned i = 0; i < 64; i++) CHECK(f.filled_with(i << 20, 9000) == static_cast<int>(i + 1));
    for (unsigned i = 0; i < 64; i++) REQUIRE(f.write((i << 20) + 5000, 9000, static_cast<uint8_t>(i + 100)) == "");

    // A refusal changes nothing.
    CHECK(f.reopen({{"l2-cache-entry-size", 1000}}).starts_with("L2 cache entry size must be a power of two"));
    CHECK(f.reopen({{"cache-size", 4096}, {"l2-cache-size", 8192}})
              .starts_with("l2-cache-size may not exceed cache-size"));
    CHECK(f.image().l2_cache().slice_bytes() == 512);
    CHECK(f.image().image().caches.clean_interval_s == 0);
    REQUIRE(f.write(20 << 20, 512, 250) == "");

    // What is not said is the default again; together with options of writing.
    REQUIRE(f.reopen({{"refcount-cache-size", 65536}, {"overlap-check", "all"}}) == "");
    CHECK(f.image().l2_cache().slice_bytes() == 4096);
    CHECK(f.image().l2_cache().slots() == 32);
    CHECK(f.image().image().caches.refcount_bytes == 65536);
    CHECK(f.image().image().caches.clean_interval_s == 600);
    CHECK(f.image().metadata()->options().overlap == block::qcow2::kOverlapAll);
    CHECK(f.filled_with((21 << 20) + 5000, 9000) == 121);
    CHECK(f.filled_with(20 << 20, 512) == 250);
    REQUIRE(f.write(40 << 20, 70'000, 251) == "");

    // Read-only and back.
    REQUIRE(f.rt.run(f.graph->set_perms(*f.root, {block::Perm::kConsistentRead, block::Perm::kAll})));
    REQUIRE(f.reopen({{"l2-cache-size", 4096}, {"l2-cache-entry-size", 1024}}, true) == "");
    CHECK(f.image().l2_cache().slice_bytes() == 1024);
    CHECK(f.filled_with(40 << 20, 70'000) == 251);
    REQUIRE(f.reopen({}) == "");
    REQUIRE(
        f.rt.run(f.graph->set_perms(*f.root, {block::Perm::kConsistentRead | block::Perm::kWrite, block::Perm::kAll})));
    REQUIRE(f.write(50 << 20, 4096, 252) == "");
    f.close();
    CHECK(f.check_made() == 0);
    REQUIRE(f.open_made() == "");
    CHECK(f.filled_with((7 << 20) + 5000, 9000) == 107);
    CHECK(f.filled_with(50 << 20, 4096) == 252);
}

TEST_CASE("qcow2: a reopen changes what happens to discards and counts", "[qcow2][options][reopen][interop]") {
    if (no_qemu()) return;
    OptionsFixture f;
    f.make("-o cluster_size=4k", 8 << 20);
    REQUIRE(f.open_made({{"pass-discard-request", false}}) == "");
    REQUIRE(f.write(0, 1 << 20, 7) == "");
    REQUIRE(f.flush() == "");
    Discards discards;
    REQUIRE(f.discard(0, 65536) == "");
    REQUIRE(f.flush() == "");
    f.settle();
    REQUIRE(f.flush() == "");
    CHECK(discards.bytes() == 0);
    REQUIRE(f.reopen({{"lazy-refcounts", true}}) == "");
    REQUIRE(f.discard(65536, 65536) == "");
    REQUIRE(f.flush() == "");
    f.settle();
    REQUIRE(f.flush() == "");
    CHECK(discards.bytes() == 65536);
    REQUIRE(f.write(2 << 20, 65536, 8) == "");
    REQUIRE(f.flush() == "");
    CHECK(discards.disk->bytes(72, 8)[7] == 1);  // dirty
    REQUIRE(f.reopen({}) == "");
    CHECK(discards.disk->bytes(72, 8)[7] == 0);
    REQUIRE(f.write(3 << 20, 65536, 9) == "");
    REQUIRE(f.flush() == "");
    CHECK(discards.disk->bytes(72, 8)[7] == 0);
    f.close();
    CHECK(f.check_made() == 0);
}

TEST_CASE("qcow2: the L2 cache follows the size of the disk", "[qcow2][options][resize][cache][interop]") {
    if (no_qemu()) return;
    OptionsFixture f;
    f.make("", 1 << 20);
    REQUIRE(f.open_made() == "");
    CHECK(f.image().l2_cache().slots() == 8);
    REQUIRE(f.write(0, 4096, 1) == "");
    f.close();
    // No root may hold the size.
    REQUIRE(f.rt.run(f.graph->add({{"driver", "qcow2"}, {"node-name", "q"}, {"file", OptionsFixture::file()}})));
    auto& node = dynamic_cast<block::qcow2::Qcow2Node&>(*f.graph->find("q"));
    const auto resized = [&](uint64_t size) {
        return WriteFixture::text_of(
            f.rt.run(block::resize_image(*f.graph, node, size, block::Preallocation::kOff, true)));
    };
    REQUIRE(resized(uint64_t{128} << 30) == "");
    CHECK(node.l2_cache().slots() == 4096);  // 16 MiB
    REQUIRE(resized(uint64_t{1} << 40) == "");
    CHECK(node.l2_cache().slots() == 8192);  // 32 MiB, the most by default
    REQUIRE(resized(1 << 20) == "");
    CHECK(node.l2_cache().slots() == 8);
    REQUIRE(f.rt.run(f.graph->remove("q")));
    CHECK(f.check_made() == 0);
}

TEST_CASE("qcow2: concurrent flushes share the flushes of the file", "[qcow2][options][flush][interop]") {
    if (no_qemu()) return;
    OptionsFixture f;
    f.make("", 8 << 20);
    REQUIRE(f.open_made() == "");
    REQUIRE(f.write(0, 1 << 20, 7) == "");
    auto disk = MemoryDisk::named("image");
    const uint64_t before = disk->count(Op::kFlush);
    struct Many {
        static Task<void> one(block::Channel* channel, unsigned* failed) {
            const Result<> done = co_await channel->flush();
            *failed += !done;
        }
        static Task<unsigned> all(block::Channel* channel, MemoryDisk* disk) {
            unsigned failed = 0;
            TaskScope scope;
            disk->close_gate();
            for (int i = 0; i < 100; i++) scope.spawn(one(channel, &failed));
            (void)co_await wait_until([disk] { return disk->at_gate() != 0; });
            disk->open_gate();
            co_await scope.join();
            co_return failed;
        }
    };
    CHECK(f.rt.run_on_io(Many::all(f.channel, disk.get())) == 0);
    // The one that was running when the others came, and one for all of them; each may need a barrier before entries.
    CHECK(disk->count(Op::kFlush) - before >= 1);
    CHECK(disk->count(Op::kFlush) - before <= 4);
}
