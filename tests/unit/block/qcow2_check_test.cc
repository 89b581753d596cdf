// The check of qcow2 metadata: what it finds and counts, against qemu-img check.

#include <catch2/catch.hpp>
#include <functional>
#include <map>

#include "block/formats/qcow2/check_counts.h"
#include "tests/unit/block/qcow2_check_fixture.h"

using namespace gantry;
using namespace gantry::test;

namespace {

/// An image with a bit of everything that its options allow.
struct Recipe {
    std::string options;
    bool snapshots = true, compressed = true, bitmaps = true;
};

void make_image(CheckFixture& f, const std::string& name, const Recipe& recipe) {
    f.create(name, recipe.options, "16M");
    f.io(name, {"write -P 1 0 300k", "write -P 2 5M 1M", "write -z 6M 256k", "write -P 3 9M 70k"});
    if (recipe.snapshots) {
        CheckFixture::sh("qemu-img snapshot -c one " + f.path(name));
        f.io(name, {"write -P 4 100k 50k", "write -P 5 12M 3k", "discard 5M 128k"});
        CheckFixture::sh("qemu-img snapshot -c two " + f.path(name));
        f.io(name, {"write -P 6 5M 64k"});
    }
    if (recipe.compressed) f.io(name, {"write -c -P 7 14M 64k", "write -c -P 8 14400k 64k", "write -c -P 9 15M 64k"});
    if (recipe.bitmaps) {
        CheckFixture::sh("qemu-img bitmap --add -g 64k " + f.path(name) + " map");
        f.io(name, {"write -P 10 2M 200k"});
    }
}

}  // namespace

TEST_CASE("CountMap: counts, saturates and finds", "[qcow2][check]") {
    block::qcow2::CountMap map(100000);
    CHECK(map.get(5) == 0);
    map.add(5, 1);
    map.add(5, 65533);
    CHECK(map.get(5) == 65534);
    map.add(5, 1);
    CHECK(map.get(5) == 65535);
    map.add(5, uint64_t{1} << 40);
    CHECK(map.get(5) == 65535 + (uint64_t{1} << 40));
    map.add(5, UINT64_MAX);
    CHECK(map.get(5) == UINT64_MAX);
    map.set(5, 3);
    CHECK(map.get(5) == 3);
    map.add(70000, 2);
    CHECK(map.end() == 70001);
    CHECK(map.any(0, 10));
    CHECK_FALSE(map.any(6, 69994));
    CHECK(map.any(6, 69995));
    CHECK_FALSE(map.any(70001, 1000000));
    map.set(90000, 0);
    CHECK(map.end() == 70001);
    CHECK(map.get(1000000) == 0);
}

TEST_CASE("qcow2 check: an undamaged image is clean and its statistics are those of qemu-img",
          "[qcow2][check][interop][once]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    const auto recipe = GENERATE(values<Recipe>({
        {"compat=1.1"},
        {"compat=0.10", true, true, false},
        {"cluster_size=512"},
        {"cluster_size=2M", true, false},
        {"cluster_size=4k,refcount_bits=64"},
        {"cluster_size=1k,refcount_bits=1", false},
        {"refcount_bits=2"},
        {"extended_l2=on"},
        {"extended_l2=on,cluster_size=16k"},
        {"preallocation=metadata", true, false},
        {"compression_type=zstd,lazy_refcounts=on"},
    }));
    CheckFixture f;
    INFO(recipe.options);
    make_image(f, "a", recipe);
    const CheckNumbers ours = f.check("a"), theirs = f.reference("a");
    INFO(f.said());
    CHECK(ours.found() == theirs.found());
    CHECK(ours.clean());
    CHECK(ours.statistics() == theirs.statistics());
}

TEST_CASE("qcow2 check: clusters of an external data file are not counted", "[qcow2][check][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    f.create("a", "data_file=" + f.path("data"), "16M");
    f.io("a", {"write -P 1 0 300k", "write -P 2 5M 1M", "write -z 5M 64k"});
    const CheckNumbers ours = f.check("a"), theirs = f.reference("a");
    INFO(f.said());
    CHECK(ours.clean());
    CHECK(ours.statistics() == theirs.statistics());

    SECTION("an entry that names another place is a corruption, mended to the only possible one") {
        ImageBytes image(f.path("a"));
        image.put(image.l2() + 8, (uint64_t{0x500000}) | ImageBytes::kCopied);
        image.save(f.path("a"));
        CHECK(f.check("a").corruptions == 1);
        CHECK(f.check("a", block::CheckRepair::kAll).clean());
        CHECK(ImageBytes(f.path("a")).word(image.l2() + 8) == (0x10000 | ImageBytes::kCopied));
    }
}

TEST_CASE("qcow2 check: damage is found in the numbers of qemu-img", "[qcow2][check][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    using Damage = std::function<void(ImageBytes&)>;
    const std::map<std::string, Damage> kinds{
        {"a count is too low", [](ImageBytes& i) { i.put16(i.count_at((i.word(i.l2()) & i.kOffset) >> 16), 0); }},
        {"a count is too high", [](ImageBytes& i) { i.put16(i.count_at((i.word(i.l2()) & i.kOffset) >> 16), 2); }},
        {"a leaked cluster", [](ImageBytes& i) { i.put(i.l2(), 0); }},
        {"an L2 table is counted twice", [](ImageBytes& i) { i.put16(i.count_at(i.l2() >> 16), 2); }},
        {"COPIED is missing", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) & ~i.kCopied); }},
        {"COPIED is missing in L1", [](ImageBytes& i) { i.put(i.l1(), i.l1_entry(0) & ~i.kCopied); }},
        {"reserved bits in an L2 entry", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) | 0x6); }},
        {"reserved bits in an L1 entry", [](ImageBytes& i) { i.put(i.l1(), i.l1_entry(0) | 0x8); }},
        {"an unaligned data cluster", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) + 512); }},
        {"data beyond the end", [](ImageBytes& i) { i.put(i.l2(), (uint64_t{1} << 40) | i.kCopied); }},
        {"two entries for one cluster", [](ImageBytes& i) { i.put(i.l2() + 8, i.word(i.l2())); }},
        {"data over the L1 table", [](ImageBytes& i) { i.put(i.l2(), i.l1() | i.kCopied); }},
        {"an L2 table beyond the end", [](ImageBytes& i) { i.put(i.l1(), (uint64_t{1} << 41) | i.kCopied); }},
        {"a compressed entry with COPIED",
         [](ImageBytes& i) { i.put(i.l2(), (i.word(i.l2()) & i.kOffset) | i.kCopied | uint64_t{1} << 62); }},
        {"a refcount block beyond the end", [](ImageBytes& i) { i.put(i.refcount_table(), uint64_t{1} << 40); }},
        {"reserved bits in the refcount table",
         [](ImageBytes& i) { i.put(i.refcount_table(), i.refcount_block() | 4); }},
        {"two table entries for one refcount block",
         [](ImageBytes& i) { i.put(i.refcount_table() + 8, i.refcount_block()); }},
        {"the refcount table points to data",
         [](ImageBytes& i) { i.put(i.refcount_table(), i.word(i.l2()) & i.kOffset); }},
        {"no refcount block", [](ImageBytes& i) { i.put(i.refcount_table(), 0); }},
    };
    CheckFixture f;
    f.create("a", "", "16M");
    f.io("a", {"write -P 1 0 300k", "write -P 2 5M 1M", "write -P 3 9M 70k"});
    for (const auto& [what, damage] : kinds) {
        INFO(what);
        ImageBytes image(f.path("a"));
        damage(image);
        image.save(f.path("b"));
        const CheckNumbers theirs = f.reference("b");
        const CheckNumbers ours = f.check("b");
        INFO(f.said());
        CHECK(ours.found() == theirs.found());
        CHECK(ours.statistics() == theirs.statistics());
        CHECK_FALSE(ours.clean());
        CHECK_FALSE(f.findings.empty());
    }
}

TEST_CASE("qcow2 check: a pointer far beyond the end costs no memory", "[qcow2][check]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    f.create("a", "cluster_size=512", "1M");
    f.io("a", {"write -P 1 0 64k"});
    ImageBytes image(f.path("a"));
    for (uint64_t i = 0; i < 64; i++) image.put(image.l2() + i * 8, ((uint64_t{1} << 55) + (i << 40)) | image.kCopied);
    image.save(f.path("a"));
    const CheckNumbers n = f.check("a");
    CHECK(n.found() == f.reference("a").found());
    CHECK(n.leaks == 64);
}

TEST_CASE("qcow2 check: bitmap tables with garbage are corrupt", "[qcow2][check]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    make_image(f, "a", {"", false, false, true});
    ImageBytes image(f.path("a"));
    uint64_t directory = 0;
    for (uint64_t at = image.half(100); at < 65536 && !directory; at += 8 + ((image.half(at + 4) + 7) & ~7u)) {
        if (image.half(at) == 0x23852875) directory = image.word(at + 24);
    }
    REQUIRE(directory != 0);
    const uint64_t table = image.word(directory);
    SECTION("reserved bits") { image.put(table, image.word(table) | 0x10); }
    SECTION("an unaligned cluster") { image.put(table, (image.word(table) & ~uint64_t{1}) + 0x10200); }
    SECTION("a table beyond the end") { image.put(directory, uint64_t{1} << 40); }
    image.save(f.path("a"));
    const CheckNumbers n = f.check("a");
    INFO(f.said());
    CHECK(n.corruptions > 0);
    const CheckNumbers fixed = f.check("a", block::CheckRepair::kAll);
    INFO(f.said());
    CHECK(fixed.clean());
    CHECK(f.reference("a").clean());
}

TEST_CASE("qcow2 check: an image whose clusters cannot be counted is refused, not tried", "[qcow2][check]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    f.create("a", "cluster_size=512", "1M");
    std::error_code failed;
    std::filesystem::resize_file(f.path("a"), uint64_t{1} << 43, failed);
    if (failed) SKIP_TEST("the file system has no sparse files of 8 TiB");
    auto checked = f.try_check("a", block::CheckRepair::kNone);
    REQUIRE_FALSE(checked);
    CHECK(checked.error().kind() == ErrorKind::kTooLarge);
}

TEST_CASE("qcow2 check: tells how far it is and stops when asked", "[qcow2][check]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    make_image(f, "a", {"cluster_size=4k"});
    uint64_t calls = 0, last = 0;
    bool in_order = true;
    auto whole = f.try_check("a", block::CheckRepair::kNone, [&](uint64_t done, uint64_t total) {
        calls++;
        in_order = in_order && done >= last && done <= total;
        last = done;
        return true;
    });
    CHECK(whole);
    CHECK(in_order);
    CHECK(calls > 3);
    auto stopped = f.try_check("a", block::CheckRepair::kNone, [](uint64_t, uint64_t) { return false; });
    REQUIRE_FALSE(stopped);
    CHECK(stopped.error().kind() == ErrorKind::kCancelled);
}
