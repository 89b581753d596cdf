// Persistent bitmaps of qcow2 images: the directory, loading, marks, storing, and crashes in between.

#include <catch2/catch.hpp>
#include <map>

#include "block/bitmap_control.h"
#include "block/bitmap_serialise.h"
#include "block/formats/qcow2/be.h"
#include "tests/support/node_io.h"
#include "tests/unit/block/qcow2_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::block::qcow2;
using gantry::test::MemoryDisk;
using gantry::test::Qcow2Fixture;
using gantry::test::TinyImage;

namespace {

/// A tiny image with bitmaps: its directory in cluster 8, tables from cluster 16 on, one each, then data. The disk has
/// 64 granules of 512 bytes: a bitmap is 8 bytes.
class BitmapImage {
  public:
    static constexpr uint64_t kDirectory = 8 * 512, kTables = 16 * 512;

    /// `word`: the only entry of the table.
    BitmapEntry& add(std::string name, uint32_t flags, uint64_t word) {
        BitmapEntry entry;
        entry.table_offset = take();
        entry.table_entries = 1;
        entry.flags = flags;
        entry.granularity_bits = 9;
        entry.name = std::move(name);
        image_.put64(entry.table_offset, word).grow(entry.table_offset + 512);
        return entries_.emplace_back(std::move(entry));
    }
    BitmapEntry& add_data(std::string name, uint32_t flags, uint8_t first_byte) {
        const uint64_t data = take();
        image_.put8(data, first_byte).grow(data + 512);
        return add(std::move(name), flags, data);
    }
    TinyImage image() {
        const std::vector<uint8_t> directory = encode_bitmap_directory(entries_);
        for (size_t i = 0; i < directory.size(); i++) image_.put8(kDirectory + i, directory[i]);
        for (uint64_t i = 0; i < (directory.size() + 511) / 512; i++) count(kDirectory / 512 + i);
        return image_.bitmaps_extension(static_cast<uint32_t>(entries_.size()), 0, directory.size(), kDirectory);
    }

  private:
    uint64_t take() {
        count(next_ / 512);
        next_ += 512;
        return next_ - 512;
    }
    void count(uint64_t cluster) { image_.put16(TinyImage::kRefcountBlock + cluster * 2, 1); }

    TinyImage image_;
    std::vector<BitmapEntry> entries_;
    uint64_t next_ = kTables;
};

const json::object kFile{{"driver", "memory"}, {"disk", "image"}, {"growable", true}};

std::vector<uint8_t> disk_bytes() {
    auto disk = MemoryDisk::named("image");
    return disk->bytes(0, disk->size());
}

struct Fixture : Qcow2Fixture {
    std::string open_image(const TinyImage& image, bool writable) {
        put_memory(image);
        return open_again(writable);
    }
    /// What the disk holds already.
    std::string open_again(bool writable) {
        json::object options{{"read-only", !writable}};
        options["file"] = kFile;
        return open(std::move(options));
    }
    DirtyBitmap& bitmap(std::string_view name) {
        auto found = find_bitmap(*node, name);
        if (!found) throw std::runtime_error("no bitmap " + std::string(name));
        return *found;
    }
    std::string state(std::string_view name) {
        const DirtyBitmap& b = bitmap(name);
        return fmt::format("{}{}{}{}", b.inconsistent ? "inconsistent " : "", b.enabled() ? "enabled " : "",
                           b.recording() ? "recording " : "", b.read_only() ? "read-only" : "");
    }
    /// The first 8 bytes.
    uint64_t bits(std::string_view name) { return bitmap(name).word(0); }
    std::string add_bitmap(BitmapSpec spec) {
        Result<> added = rt.run(block::add_bitmap(*graph, std::move(spec)));
        return added ? "" : added.error().message();
    }
    std::string remove_bitmap(std::string name) {
        Result<> removed = rt.run(block::remove_bitmap(*graph, {.node = "q", .name = std::move(name)}));
        return removed ? "" : removed.error().message();
    }
    std::string reopen(bool read_only) {
        std::vector<json::object> list;
        list.push_back({{"driver", "qcow2"}, {"node-name", "q"}, {"read-only", read_only}, {"file", kFile}});
        Result<> done = rt.run(graph->reopen(std::move(list)));
        return done ? "" : done.error().message();
    }
    void write(uint64_t offset, uint64_t bytes) {
        REQUIRE(rt.run_on_io(test::node_write(node, offset, test::Bytes(bytes, 'w'))));
    }
    /// Whatever the exit status of qemu-img check says about the bytes: 0 whole, 3 leaks only.
    int check(const std::vector<uint8_t>& bytes) {
        const std::string path = dir.path() + "/check.qcow2";
        std::ofstream(path, std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        const int status = std::system(("qemu-img check -q " + path + " > /dev/null 2>&1").c_str());
        return WEXITSTATUS(status);
    }
};

}  // namespace

TEST_CASE("qcow2: a bitmap directory is written as it is read", "[qcow2][bitmaps]") {
    std::vector<BitmapEntry> entries(3);
    for (size_t i = 0; i < entries.size(); i++) {
        entries[i].table_offset = 8192 + i * 512;
        entries[i].table_entries = 7;
        entries[i].flags = static_cast<uint32_t>(i);
        entries[i].granularity_bits = static_cast<uint8_t>(9 + i * 11);
        entries[i].name = std::string(1 + i * 511, static_cast<char>('a' + i));
        entries[i].extra.assign(i * 3, 0x5a);
    }
    const std::vector<uint8_t> bytes = encode_bitmap_directory(entries);
    CHECK(bytes.size() % 8 == 0);
    auto read = parse_bitmap_directory(bytes, {3, bytes.size(), 4096}, Geometry{.cluster_bits = 9}, "q");
    REQUIRE(read);
    REQUIRE(read->size() == 3);
    for (size_t i = 0; i < 3; i++) {
        CHECK(read->at(i).name == entries[i].name);
        CHECK(read->at(i).extra == entries[i].extra);
        CHECK(read->at(i).table_offset == entries[i].table_offset);
        CHECK(read->at(i).flags == entries[i].flags);
        CHECK(read->at(i).granularity_bits == entries[i].granularity_bits);
    }
    CHECK(encode_bitmap_directory(*read) == bytes);
    CHECK(encode_bitmap_directory({}).empty());
}

TEST_CASE("qcow2: table entries of bitmaps", "[qcow2][bitmaps]") {
    const Geometry g{.cluster_bits = 16};
    CHECK(BitmapCluster{0}.valid(g));
    CHECK(BitmapCluster{1}.valid(g));
    CHECK(BitmapCluster{1}.all_ones());
    CHECK(BitmapCluster{0x30000}.valid(g));
    CHECK_FALSE(BitmapCluster{0x30001}.valid(g));
    CHECK_FALSE(BitmapCluster{0x30200}.valid(g));
    CHECK_FALSE(BitmapCluster{2}.valid(g));
    CHECK_FALSE(BitmapCluster{uint64_t{1} << 56}.valid(g));
    CHECK(bitmap_table_entries(g, 0, 16) == 1);
    CHECK(bitmap_table_entries(g, 1, 16) == 1);
    CHECK(bitmap_table_entries(g, uint64_t{1} << 35, 16) == 1);
    CHECK(bitmap_table_entries(g, (uint64_t{1} << 35) + 1, 16) == 2);
}

TEST_CASE("qcow2: bitmaps are loaded read-only with a read-only image, which does not change", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("auto", BitmapEntry::kAuto, 0x05);
    made.add("ones", 0, BitmapCluster::kOnes);
    made.add("zeroes", BitmapEntry::kAuto, 0);
    made.add_data("used", BitmapEntry::kAuto | BitmapEntry::kInUse, 0xff);
    made.add("beyond", 0, uint64_t{1} << 40);
    made.add("reserved", 0, 2);
    made.add_data("length", 0, 0xff).table_entries = 2;
    made.add_data("unknown", 0, 0xff).extra.assign(8, 1);
    made.add_data("known", BitmapEntry::kExtraCompatible, 0x80).extra.assign(8, 1);
    REQUIRE(f.open_image(made.image(), false) == "");
    const std::vector<uint8_t> before = disk_bytes();
    CHECK(f.node->bitmaps().size() == 9);
    CHECK(f.state("auto") == "enabled read-only");
    CHECK(f.bits("auto") == 5);
    CHECK(f.state("ones") == "read-only");
    CHECK(f.bits("ones") == ~uint64_t{0});
    CHECK(f.bits("zeroes") == 0);
    CHECK(f.bits("known") == 0x80);
    for (std::string_view lost : {"used", "beyond", "reserved", "length", "unknown"}) {
        INFO(lost);
        CHECK(f.bitmap(lost).inconsistent);
        CHECK_FALSE(f.bitmap(lost).recording());
        CHECK(f.bitmap(lost).dirty_bytes() == 0);
        CHECK(f.bitmap(lost).persistent);
    }
    CHECK_THAT(f.remove_bitmap("used"), Catch::StartsWith("Bitmap 'used' is readonly and cannot be modified"));
    CHECK_THAT(f.add_bitmap({.node = "q", .name = "new", .persistent = true}),
               Catch::StartsWith("Can't make bitmap 'new' persistent in 'q': Image is read-only"));
    f.close();
    CHECK(disk_bytes() == before);
}

TEST_CASE("qcow2: bitmaps that would take too much memory are refused before they take it", "[qcow2][bitmaps][once]") {
    if (!Qcow2Fixture::has_tool("qemu-img")) {
        WARN("skipped: qemu-img is not installed");
        return;
    }
    Fixture f;
    const std::string path = f.dir.path() + "/a.qcow2";
    f.sh("qemu-img create -q -f qcow2 -o cluster_size=2M " + path + " 2T");
    // 512 MiB each.
    for (const std::string name : {"a", "b", "c"}) f.sh("qemu-img bitmap --add -g 512 " + path + " " + name);
    CHECK_THAT(f.open_file(path), Catch::StartsWith("The persistent bitmaps of node 'q' need more than 1024 MiB"));
    f.sh("qemu-img bitmap --remove " + path + " a");
    CHECK(f.open_file(path) == "");
    CHECK(f.node->bitmaps().size() == 2);
}

TEST_CASE("qcow2: bitmaps are not believed when somebody wrote who does not know them", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("b", BitmapEntry::kAuto, 0x05);
    REQUIRE(f.open_image(made.image().autoclear(0), true) == "");
    CHECK(f.node->bitmaps().empty());
}

TEST_CASE("qcow2: an image that may be written has its bitmaps marked before the first write", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("auto", BitmapEntry::kAuto, 0x05);
    made.add("off", 0, 0);
    made.add_data("left", 0, 0xff).extra.assign(8, 1);  // not ours to touch, and does not go stale
    REQUIRE(f.open_image(made.image(), true) == "");
    CHECK(f.state("auto") == "enabled recording ");
    CHECK(f.state("off") == "");
    const std::vector<uint8_t> marked = disk_bytes();
    auto flags = [&](size_t entry_at) { return load_be32(marked.data() + BitmapImage::kDirectory + entry_at + 12); };
    CHECK(flags(0) == (BitmapEntry::kAuto | BitmapEntry::kInUse));
    CHECK(flags(32) == BitmapEntry::kInUse);
    CHECK(flags(64) == 0);

    // A crash here.
    Fixture g;
    TinyImage crashed;
    crashed.bytes = marked;
    f.close();
    REQUIRE(g.open_image(crashed, true) == "");
    CHECK(g.state("auto") == "inconsistent enabled ");
    CHECK(g.bitmap("off").inconsistent);
    CHECK(g.remove_bitmap("auto") == "");
    g.close();
    REQUIRE(g.open_again(false) == "");
    CHECK(g.node->bitmaps().size() == 2);
    CHECK(g.bitmap("off").inconsistent);
}

TEST_CASE("qcow2: bitmaps are stored when the image is closed", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("auto", BitmapEntry::kAuto, 0x05);
    made.add("off", 0, BitmapCluster::kOnes);
    made.add_data("lost", BitmapEntry::kInUse, 0xff);
    REQUIRE(f.open_image(made.image(), true) == "");
    f.write(512 * 6, 600);
    CHECK(f.add_bitmap({.node = "q", .name = "late", .granularity = 1024, .persistent = true, .disabled = true}) == "");
    CHECK(f.add_bitmap({.node = "q", .name = "memory"}) == "");
    REQUIRE(set_bitmap_recording(*f.graph, {"q", "auto"}, false));
    f.close();
    if (f.has_tool("qemu-img")) CHECK(f.check(disk_bytes()) == 0);

    REQUIRE(f.open_again(false) == "");
    CHECK(f.node->bitmaps().size() == 4);
    CHECK(f.state("auto") == "read-only");
    CHECK(f.bits("auto") == 0xc5);
    CHECK(f.bits("off") == ~uint64_t{0});
    CHECK(f.bitmap("lost").inconsistent);
    CHECK(f.state("late") == "read-only");
    CHECK(f.bitmap("late").granularity() == 1024);
    const std::vector<uint8_t> stored = disk_bytes();
    REQUIRE(f.open_again(true) == "");
    f.close();
    REQUIRE(f.open_again(false) == "");
    CHECK(f.bits("auto") == 0xc5);
    CHECK(disk_bytes().size() <= stored.size() + 16 * 512);
}

TEST_CASE("qcow2: extra data of a bitmap is kept, whether it may be used or not", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("known", BitmapEntry::kExtraCompatible, 0x01).extra.assign(8, 7);
    made.add_data("unknown", BitmapEntry::kAuto, 0xff).extra.assign(3, 9);
    REQUIRE(f.open_image(made.image(), true) == "");
    CHECK(f.add_bitmap({.node = "q", .name = "new", .persistent = true}) == "");
    REQUIRE(set_bitmap_recording(*f.graph, {"q", "known"}, true));
    f.write(512 * 6, 600);
    f.close();
    REQUIRE(f.open_again(false) == "");
    CHECK(f.bits("known") == 0xc1);
    const std::vector<BitmapEntry>& entries = f.image().image().bitmaps;
    REQUIRE(entries.size() == 3);
    CHECK(entries[0].extra == std::vector<uint8_t>(8, 7));
    CHECK(entries[0].flags == (BitmapEntry::kExtraCompatible | BitmapEntry::kAuto));
    CHECK(entries[1].extra == std::vector<uint8_t>(3, 9));
    CHECK(entries[1].flags == (BitmapEntry::kInUse | BitmapEntry::kAuto));  // what was written is not in it
}

TEST_CASE("qcow2: removed bitmaps leave the image at once, the last one with the extension", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("a", BitmapEntry::kAuto, 0x05);
    made.add_data("b", 0, 0x06);
    REQUIRE(f.open_image(made.image(), true) == "");
    CHECK(f.add_bitmap({.node = "q", .name = "c", .persistent = true}) == "");
    CHECK(f.remove_bitmap("c") == "");
    CHECK(f.remove_bitmap("a") == "");
    CHECK(f.image().image().bitmaps.size() == 1);
    CHECK(f.image().image().extensions.bitmaps->count == 1);
    CHECK(f.remove_bitmap("b") == "");
    CHECK_FALSE(f.image().image().extensions.bitmaps.has_value());
    CHECK_FALSE(f.image().image().header.has_autoclear(kAutoclearBitmaps));
    f.close();
    if (f.has_tool("qemu-img")) CHECK(f.check(disk_bytes()) == 0);
    REQUIRE(f.open_again(true) == "");
    CHECK(f.node->bitmaps().empty());
}

TEST_CASE("qcow2: a removal that cannot be written changes nothing", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("a", BitmapEntry::kAuto, 0x05);
    made.add_data("b", 0, 0x06);
    REQUIRE(f.open_image(made.image(), true) == "");
    auto disk = MemoryDisk::named("image");
    disk->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kWrite ? EIO : 0; });
    CHECK(f.remove_bitmap("a") != "");
    disk->set_fault(nullptr);
    CHECK(f.node->bitmaps().size() == 2);
    CHECK(f.bits("a") == 5);
    CHECK(f.remove_bitmap("a") == "");
    f.close();
    REQUIRE(f.open_again(false) == "");
    CHECK(f.node->bitmaps().size() == 1);
    CHECK(f.bits("b") == 6);
}

TEST_CASE("qcow2: a write that is the last one leaves old bitmaps marked, or new ones right", "[qcow2][bitmaps]") {
    if (!Qcow2Fixture::has_tool("qemu-img")) {
        WARN("skipped: qemu-img is not installed");
        return;
    }
    enum class What { kClose, kRemove, kRemoveLast, kFirst };
    const What what = GENERATE(What::kClose, What::kRemove, What::kRemoveLast, What::kFirst);
    bool reached_end = false;
    std::map<std::string, int> seen;
    for (int last = 0; !reached_end && last < 200; last++) {
        Fixture f;
        BitmapImage made;
        if (what != What::kFirst) made.add_data("a", BitmapEntry::kAuto, 0x05);
        if (what == What::kClose || what == What::kRemove) made.add_data("b", BitmapEntry::kAuto, 0x06);
        REQUIRE(f.open_image(what == What::kFirst ? TinyImage() : made.image(), true) == "");
        if (what == What::kFirst)
            REQUIRE(f.add_bitmap({.node = "q", .name = "a", .granularity = 512, .persistent = true}) == "");
        f.write(512 * 6, 600);

        log::set_level(log::Level::kOff);  // every write fails from somewhere on
        auto disk = MemoryDisk::named("image");
        auto changes = std::make_shared<std::atomic<int>>(0);
        disk->set_fault([changes, last](MemoryDisk::Op op, uint64_t, uint64_t) {
            if (op == MemoryDisk::Op::kRead || op == MemoryDisk::Op::kFlush) return 0;
            return changes->fetch_add(1) < last ? 0 : EIO;
        });
        if (what == What::kRemove || what == What::kRemoveLast) (void)f.remove_bitmap("a");
        f.close();
        disk->set_fault(nullptr);
        reached_end = *changes <= last;

        INFO("changes before the end: " << last);
        const int checked = f.check(disk_bytes());
        CHECK((checked == 0 || checked == 3));
        if (reached_end) CHECK(checked == 0);
        REQUIRE(f.open_again(false) == "");
        for (const auto& bitmap : f.node->bitmaps()) {
            const std::string name = bitmap->name();
            if (bitmap->inconsistent) {
                seen[name + " marked"]++;
                continue;
            }
            seen[name + " stored"]++;
            const uint64_t expected = what == What::kFirst ? 0xc0 : name == "a" ? 0xc5 : 0xc6;
            CHECK(bitmap->word(0) == expected);
        }
        if (!find_bitmap(*f.node, "a")) seen["a absent"]++;
    }
    CHECK(reached_end);
    if (what == What::kClose) {
        CHECK(seen["a marked"] > 3);
        CHECK(seen["a stored"] > 0);
        CHECK(seen["b stored"] > 0);
        CHECK(seen["a absent"] == 0);
    } else if (what == What::kRemove) {
        CHECK(seen["a absent"] > 0);
        CHECK(seen["a stored"] == 0);
        CHECK(seen["b stored"] > 0);
    } else if (what == What::kRemoveLast) {
        CHECK(seen["a absent"] > 0);
        CHECK(seen["a marked"] > 0);
    } else {
        CHECK(seen["a absent"] > 0);
        CHECK(seen["a stored"] > 0);
    }
}

TEST_CASE("qcow2: a reopen to read-only and back keeps bitmaps and what the user wants", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("a", BitmapEntry::kAuto, 0x05);
    made.add_data("b", BitmapEntry::kAuto, 0x06);
    REQUIRE(f.open_image(made.image(), true) == "");
    REQUIRE(set_bitmap_recording(*f.graph, {"q", "b"}, false));
    CHECK(f.add_bitmap({.node = "q", .name = "new", .granularity = 512, .persistent = true}) == "");
    f.write(512 * 6, 600);
    REQUIRE(f.reopen(true) == "");
    CHECK(f.state("a") == "enabled read-only");
    CHECK(f.state("b") == "read-only");
    {
        auto copy = f.image().image().bitmaps;
        REQUIRE(copy.size() == 3);
        CHECK(copy[0].flags == BitmapEntry::kAuto);
        CHECK(copy[1].flags == 0);
    }
    REQUIRE(f.reopen(false) == "");
    CHECK(f.state("a") == "enabled recording ");
    CHECK(f.state("b") == "");
    CHECK((f.image().image().bitmaps.at(0).flags & BitmapEntry::kInUse) != 0);
    f.write(512 * 20, 1);
    f.close();
    REQUIRE(f.open_again(false) == "");
    CHECK(f.bits("a") == (0xc5 | uint64_t{1} << 20));
    CHECK(f.bits("b") == 0x06);
    CHECK(f.bits("new") == (0xc0 | uint64_t{1} << 20));
}

TEST_CASE("qcow2: a reopen to read-only that cannot store leaves the bitmaps recording", "[qcow2][bitmaps]") {
    Fixture f;
    BitmapImage made;
    made.add_data("a", BitmapEntry::kAuto, 0x05);
    // With every number of changes that succeed before the first that does not.
    for (int fails_at = 0;; fails_at++) {
        REQUIRE(fails_at < 100);
        REQUIRE(f.open_image(made.image(), true) == "");
        f.write(512 * 6, 600);
        auto disk = MemoryDisk::named("image");
        auto changes = std::make_shared<std::atomic<int>>(0);
        disk->set_fault([changes, fails_at](MemoryDisk::Op op, uint64_t, uint64_t) {
            if (op == MemoryDisk::Op::kRead || op == MemoryDisk::Op::kFlush) return 0;
            return changes->fetch_add(1) == fails_at ? EIO : 0;
        });
        const std::string refused = f.reopen(true);
        disk->set_fault(nullptr);
        INFO("fails at change " << fails_at);
        if (refused.empty()) {
            CHECK(f.state("a") == "enabled read-only");
            if (*changes <= fails_at) break;
            continue;
        }
        CHECK(f.state("a") == "enabled recording ");
        CHECK_FALSE(f.node->read_only());
        f.write(512 * 20, 1);
        f.close();
        REQUIRE(f.open_again(false) == "");
        CHECK(f.bits("a") == (0xc5 | uint64_t{1} << 20));
        if (f.has_tool("qemu-img")) {
            const int checked = f.check(disk_bytes());
            CHECK((checked == 0 || checked == 3));
        }
    }
}

TEST_CASE("qcow2: bitmaps over many clusters, some of them alike", "[qcow2][bitmaps]") {
    if (!Qcow2Fixture::has_tool("qemu-img")) {
        WARN("skipped: qemu-img is not installed");
        return;
    }
    Fixture f;
    const std::string path = f.dir.path() + "/a.qcow2";
    f.sh("qemu-img create -q -f qcow2 -o cluster_size=512 " + path + " 64M");
    REQUIRE(f.open_file(path, {{"read-only", false}}) == "");
    // 131072 granules, 16 KiB, 32 clusters.
    REQUIRE(f.add_bitmap({.node = "q", .name = "b", .granularity = 512, .persistent = true}) == "");
    DirtyBitmap& b = f.bitmap("b");
    b.set_range(0, 8 << 20);     // clusters of ones
    b.set_range(20 << 20, 512);  // a mixed one
    for (uint64_t at = 40 << 20; at < 48 << 20; at += 1024) b.set_range(at, 512);
    b.set_range((64 << 20) - 512, 512);
    auto expected = b.snapshot("expected");
    f.close();
    const std::string check = "qemu-img check -q " + path;
    CHECK(std::system(check.c_str()) == 0);
    REQUIRE(f.open_file(path) == "");
    CHECK(f.bitmap("b").dirty_bytes() == expected->dirty_bytes());
    bool same = true;
    for (uint64_t i = 0; i < expected->word_count(); i++) same = same && expected->word(i) == f.bitmap("b").word(i);
    CHECK(same);
}

TEST_CASE("qcow2: what cannot be stored is refused when the bitmap is added", "[qcow2][bitmaps]") {
    Fixture f;
    REQUIRE(f.open_image(TinyImage(), true) == "");
    const std::string name(1024, 'x');
    CHECK(f.add_bitmap({.node = "q", .name = name, .persistent = true}) ==
          "Can't make bitmap '" + name + "' persistent in 'q': Name length exceeds maximum (1023 characters)");
    CHECK(f.add_bitmap({.node = "q", .name = "b"}) == "");
    CHECK(f.bitmap("b").granularity() == 4096);
    CHECK(f.add_bitmap({.node = "q", .name = "b", .persistent = true}) == "Bitmap already exists: b");
}
