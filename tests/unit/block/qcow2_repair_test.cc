// Repair of qcow2 metadata: afterwards qemu-img finds nothing wrong, and what could be read still can.

#include <catch2/catch.hpp>
#include <functional>
#include <map>
#include <random>

#include "tests/support/power_cut.h"
#include "tests/unit/block/qcow2_check_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::CheckRepair;

namespace {

using Damage = std::function<void(ImageBytes&)>;

uint64_t data_cluster(const ImageBytes& i, uint64_t index = 0) {
    return i.word(i.l2() + index * 8) & ImageBytes::kOffset;
}

/// The guest's disk as qemu-img sees it.
std::vector<uint8_t> disk_of(CheckFixture& f, const std::string& name) {
    CheckFixture::sh("qemu-img convert -f qcow2 -O raw " + f.path(name) + " " + f.path(name) + ".raw");
    return ImageBytes(f.path(name) + ".raw").bytes;
}

void make_image(CheckFixture& f) {
    f.create("a", "", "16M");
    f.io("a", {"write -P 1 0 300k", "write -P 2 5M 1M", "write -P 3 9M 70k"});
}

}  // namespace

TEST_CASE("qcow2 repair: counts, flags and refcount structures are mended without loss", "[qcow2][repair][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    const std::map<std::string, Damage> kinds{
        {"a count is too low", [](ImageBytes& i) { i.put16(i.count_at(data_cluster(i) >> 16), 0); }},
        {"a count is too high", [](ImageBytes& i) { i.put16(i.count_at(data_cluster(i) >> 16), 2); }},
        {"all counts are gone",
         [](ImageBytes& i) { std::fill_n(i.bytes.begin() + static_cast<int64_t>(i.refcount_block()), 65536, 0); }},
        {"all counts are garbage",
         [](ImageBytes& i) { std::fill_n(i.bytes.begin() + static_cast<int64_t>(i.refcount_block()), 1000, 0x5a); }},
        {"COPIED is missing", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) & ~i.kCopied); }},
        {"COPIED is missing in L1", [](ImageBytes& i) { i.put(i.l1(), i.l1_entry(0) & ~i.kCopied); }},
        {"reserved bits in an L2 entry", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) | 0x6); }},
        {"reserved bits in an L1 entry", [](ImageBytes& i) { i.put(i.l1(), i.l1_entry(0) | 0x8); }},
        {"stray low bits in an L2 entry", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) + 512); }},
        {"stray low bits in an L1 entry", [](ImageBytes& i) { i.put(i.l1(), i.l1_entry(0) + 0x1200); }},
        {"a refcount block beyond the end", [](ImageBytes& i) { i.put(i.refcount_table(), uint64_t{1} << 40); }},
        {"an unaligned refcount block", [](ImageBytes& i) { i.put(i.refcount_table(), i.refcount_block() + 512); }},
        {"reserved bits in the refcount table",
         [](ImageBytes& i) { i.put(i.refcount_table(), i.refcount_block() | 4); }},
        {"two table entries for one refcount block",
         [](ImageBytes& i) { i.put(i.refcount_table() + 8, i.refcount_block()); }},
        {"the refcount table points to data", [](ImageBytes& i) { i.put(i.refcount_table(), data_cluster(i)); }},
        {"the refcount table points to an L2 table", [](ImageBytes& i) { i.put(i.refcount_table(), i.l2()); }},
        {"no refcount block", [](ImageBytes& i) { i.put(i.refcount_table(), 0); }},
        {"the header points to no refcount table", [](ImageBytes& i) { i.put(48, uint64_t{1} << 40); }},
        {"the refcount table is the L1 table", [](ImageBytes& i) { i.put(48, i.l1()); }},
        {"dirty",
         [](ImageBytes& i) {
             i.put(72, 1);
             i.put16(i.count_at(data_cluster(i) >> 16), 0);
         }},
        {"marked corrupt", [](ImageBytes& i) { i.put(72, 2); }},
    };
    CheckFixture f;
    make_image(f);
    for (const auto& [what, damage] : kinds) {
        INFO(what);
        ImageBytes image(f.path("a"));
        damage(image);
        image.save(f.path("b"));
        const CheckNumbers ours = f.check("b", CheckRepair::kAll);
        INFO(f.said());
        CHECK(ours.found() == "errors 0 corruptions 0 leaks 0");
        const CheckNumbers theirs = f.reference("b");
        CHECK(theirs.found() == "errors 0 corruptions 0 leaks 0");
        CHECK(ours.statistics() == theirs.statistics());
        CHECK(ImageBytes(f.path("b")).word(72) == 0);
        CHECK((disk_of(f, "b") == disk_of(f, "a")));
    }
}

TEST_CASE("qcow2 repair: the numbers of what was mended are those of qemu-img", "[qcow2][repair][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    const std::map<std::string, Damage> kinds{
        {"a count is too low", [](ImageBytes& i) { i.put16(i.count_at(data_cluster(i, 1) >> 16), 0); }},
        {"a count is too high", [](ImageBytes& i) { i.put16(i.count_at(data_cluster(i) >> 16), 2); }},
        {"leaked clusters",
         [](ImageBytes& i) {
             i.put(i.l2(), 0);
             i.put(i.l2() + 8, 0);
         }},
        {"COPIED is missing", [](ImageBytes& i) { i.put(i.l2(), i.word(i.l2()) & ~i.kCopied); }},
        {"two entries for one cluster", [](ImageBytes& i) { i.put(i.l2() + 8, i.word(i.l2())); }},
    };
    const auto [repair, words] =
        GENERATE(table<CheckRepair, std::string>({{CheckRepair::kLeaks, "-r leaks"}, {CheckRepair::kAll, "-r all"}}));
    CheckFixture f;
    make_image(f);
    for (const auto& [what, damage] : kinds) {
        if (repair == CheckRepair::kLeaks && what == "a count is too low") continue;  // qemu-img gives up there
        INFO(words << ": " << what);
        ImageBytes image(f.path("a"));
        damage(image);
        image.save(f.path("b"));
        image.save(f.path("c"));
        const CheckNumbers theirs = f.reference("c", words);
        const CheckNumbers ours = f.check("b", repair);
        INFO(f.said());
        CHECK(ours.found() == theirs.found());
        CHECK(ours.fixed() == theirs.fixed());
        // qemu-img makes all refcounts anew where one was 0.
        if (what != "a count is too low") CHECK(ours.statistics() == theirs.statistics());
    }
}

TEST_CASE("qcow2 repair: what cannot be read becomes zeroes, the rest stays", "[qcow2][repair][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    make_image(f);
    std::vector<uint8_t> expected = disk_of(f, "a");
    ImageBytes image(f.path("a"));
    bool zero_first = true;
    SECTION("data beyond the end") { image.put(image.l2(), (uint64_t{1} << 40) | image.kCopied); }
    SECTION("an unaligned entry whose cluster is not known") { image.put(image.l2(), 0x700200 | image.kCopied); }
    SECTION("a compressed cluster beyond the end") { image.put(image.l2(), (uint64_t{1} << 40) | uint64_t{1} << 62); }
    SECTION("two entries for one cluster: both are kept") {
        image.put(image.l2() + 8, image.word(image.l2()));
        zero_first = false;
        std::copy_n(expected.begin(), 65536, expected.begin() + 65536);
    }
    image.save(f.path("b"));
    const CheckNumbers fixed = f.check("b", CheckRepair::kAll);
    INFO(f.said());
    CHECK(fixed.clean());
    CHECK(f.reference("b").clean());
    if (zero_first) std::fill_n(expected.begin(), 65536, 0);
    CHECK((disk_of(f, "b") == expected));
}

TEST_CASE("qcow2 repair: a backing file does not show through a lost cluster", "[qcow2][repair][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    make_image(f);
    const std::string options = GENERATE(as<std::string>(), "", "extended_l2=on");
    CheckFixture::sh("qemu-img create -f qcow2 " + (options.empty() ? "" : "-o " + options) + " -b " + f.path("a") +
                     " -F qcow2 " + f.path("b"));
    f.io("b", {"write -P 9 0 64k"});
    ImageBytes image(f.path("b"));
    image.put(image.l2(), (uint64_t{1} << 40) | image.kCopied);
    image.save(f.path("b"));
    CHECK(f.check("b", CheckRepair::kAll).clean());
    CHECK(f.reference("b").clean());
    std::vector<uint8_t> expected = disk_of(f, "a");
    std::fill_n(expected.begin(), 65536, 0);
    CHECK((disk_of(f, "b") == expected));
}

TEST_CASE("qcow2 repair: subcluster bitmaps keep what is stored", "[qcow2][repair][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    f.create("a", "extended_l2=on", "16M");
    f.io("a", {"write -P 5 0 64k", "write -P 6 64k 10k"});
    std::vector<uint8_t> expected = disk_of(f, "a");
    ImageBytes image(f.path("a"));
    SECTION("allocated and zero") { image.put(image.l2() + 8, 0x0000000fffffffff); }
    SECTION("bits of an unallocated cluster") {
        image.put(image.l2() + 32, 0);
        image.put(image.l2() + 40, 0x3);
    }
    SECTION("bit 0 has no meaning") { image.put(image.l2(), image.word(image.l2()) | 1); }
    image.save(f.path("b"));
    CHECK(f.check("b").corruptions == 1);
    CHECK(f.check("b", CheckRepair::kAll).clean());
    CHECK(f.reference("b").clean());
    CHECK((disk_of(f, "b") == expected));
}

TEST_CASE("qcow2 repair: snapshots survive", "[qcow2][repair][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    const std::string options = GENERATE(as<std::string>(), "", "compat=0.10", "cluster_size=4k,refcount_bits=8");
    CheckFixture f;
    f.create("a", options, "8M");
    f.io("a", {"write -P 1 0 1M", "write -c -P 7 4M 64k"});
    CheckFixture::sh("qemu-img snapshot -c one " + f.path("a"));
    f.io("a", {"write -P 2 256k 128k"});
    const std::vector<uint8_t> now = disk_of(f, "a");
    ImageBytes image(f.path("a"));
    // Every count is gone: blocks are emptied, flags are wrong.
    const uint64_t cs = image.cluster_size();
    for (uint64_t i = 0; i < 4 && image.refcount_block(i) != 0; i++)
        std::fill_n(image.bytes.begin() + static_cast<int64_t>(image.refcount_block(i)), cs, 0);
    image.put(image.l2(), image.word(image.l2()) | image.kCopied);
    image.save(f.path("b"));
    CHECK(f.check("b", CheckRepair::kAll).clean());
    CHECK(f.reference("b").clean());
    CHECK((disk_of(f, "b") == now));
    f.copy("a", "a1");
    f.copy("b", "b1");
    CheckFixture::sh("qemu-img snapshot -a one " + f.path("a1"));
    CheckFixture::sh("qemu-img snapshot -a one " + f.path("b1"));
    CHECK((disk_of(f, "b1") == disk_of(f, "a1")));
    CHECK(f.reference("b1").clean());
}

TEST_CASE("qcow2 repair: incomplete snapshot entries are completed", "[qcow2][repair][interop]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    f.create("a", "", "8M");
    f.io("a", {"write -P 1 0 1M"});
    CheckFixture::sh("qemu-img snapshot -c one " + f.path("a"));
    CheckFixture::sh("qemu-img snapshot -c two " + f.path("a"));
    // The first entry loses its extra data; the second one moves up.
    ImageBytes image(f.path("a"));
    const uint64_t table = image.word(64), extra = image.half(table + 36);
    const uint64_t names = image.get16(table + 12) + image.get16(table + 14);
    const auto at = [&image](uint64_t offset) { return image.bytes.begin() + static_cast<int64_t>(offset); };
    image.bytes.resize(std::max<uint64_t>(image.bytes.size(), table + 65536));
    const uint64_t first = (40 + extra + names + 7) & ~7u, shorter = (40 + names + 7) & ~7u;
    std::copy(at(table + 40 + extra), at(table + 40 + extra + names), at(table + 40));
    std::copy(at(table + first), at(table + first + 200), at(table + shorter));
    image.put(table + 32, image.word(table + 32) & 0xffffffff00000000);
    image.save(f.path("b"));
    CHECK(f.check("b").corruptions == 1);
    CHECK(f.check("b", CheckRepair::kAll).clean());
    INFO(f.said());
    CHECK(f.reference("b").clean());
    CHECK((disk_of(f, "b") == disk_of(f, "a")));
    CheckFixture::sh("qemu-img snapshot -d one " + f.path("b"));
    CheckFixture::sh("qemu-img snapshot -a two " + f.path("b"));
    CHECK((disk_of(f, "b") == disk_of(f, "a")));
    CHECK(f.reference("b").clean());
}

TEST_CASE("qcow2 repair: an undamaged image is not written to", "[qcow2][repair]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    make_image(f);
    const std::vector<uint8_t> before = ImageBytes(f.path("a")).bytes;
    CHECK(f.check("a", CheckRepair::kAll).clean());
    CHECK((ImageBytes(f.path("a")).bytes == before));
}

TEST_CASE("qcow2 repair: leaks are kept while references cannot be followed", "[qcow2][repair]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    make_image(f);
    ImageBytes image(f.path("a"));
    image.put(image.l1(), image.l1_entry(0) + 0x1200);  // the data below looks leaked
    image.save(f.path("b"));
    const CheckNumbers kept = f.check("b", CheckRepair::kLeaks);
    CHECK(kept.leaks > 0);
    CHECK(kept.leaks_fixed == 0);
    CHECK((ImageBytes(f.path("b")).bytes == image.bytes));
    CHECK(f.check("b", CheckRepair::kAll).clean());
    CHECK((disk_of(f, "b") == disk_of(f, "a")));
}

TEST_CASE("qcow2 repair: counts beyond the end of the file are leaks too", "[qcow2][repair]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    CheckFixture f;
    make_image(f);
    ImageBytes image(f.path("a"));
    for (uint64_t c = 1000; c < 1010; c++) image.put16(image.count_at(c), 1);
    image.save(f.path("b"));
    const CheckNumbers n = f.check("b", CheckRepair::kLeaks);
    CHECK(n.leaks_fixed == 10);
    CHECK(n.clean());
    CHECK((ImageBytes(f.path("b")).bytes == ImageBytes(f.path("a")).bytes));
}

TEST_CASE("qcow2 repair: cut off anywhere, it can be done again", "[qcow2][repair][crash][once]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    const std::map<std::string, Damage> kinds{
        {"counts and flags",
         [](ImageBytes& i) {
             i.put16(i.count_at(data_cluster(i) >> 12), 3);
             i.put16(i.count_at(data_cluster(i, 1) >> 12), 0);
             i.put(i.l2() + 16, i.word(i.l2() + 16) & ~i.kCopied);
             i.put(i.l2() + 24, i.word(i.l2() + 24) | 4);
         }},
        {"a refcount block is gone", [](ImageBytes& i) { i.put(i.refcount_table(), 0); }},
        {"the refcount table is lost", [](ImageBytes& i) { i.put(48, i.l2()); }},
        {"a stray pointer to a table", [](ImageBytes& i) { i.put(i.l1(), i.l1_entry(0) + 512); }},
    };
    CheckFixture f;
    f.drivers.push_back(kJournalDriver);
    f.graph = std::make_unique<block::Graph>(*f.rt.runtime, f.drivers, nullptr);
    f.create("a", "cluster_size=4k", "2M");
    f.io("a", {"write -P 1 0 300k", "write -P 2 1M 100k"});
    CheckFixture::sh("qemu-img snapshot -c one " + f.path("a"));
    f.io("a", {"write -P 4 10k 50k"});
    const std::vector<uint8_t> expected = disk_of(f, "a");
    std::mt19937_64 random(3);
    for (const auto& [what, damage] : kinds) {
        ImageBytes image(f.path("a"));
        damage(image);
        StampClock clock;
        auto disk = std::make_shared<JournalDisk>(clock, image.bytes);
        JournalDisk::publish("image", disk);
        const Result<block::ImageCheck> repaired =
            f.check_node({{"driver", "journal"}, {"disk", "image"}}, CheckRepair::kAll, {});
        JournalDisk::forget("image");
        REQUIRE(repaired);
        CHECK(repaired->corruptions + repaired->leaks == 0);
        CHECK(repaired->corruptions_fixed > 0);
        for (const Stamp moment : disk->moments()) {
            for (const auto loss : {JournalDisk::Loss::kAll, JournalDisk::Loss::kTorn}) {
                INFO(what << ", cut at " << moment << (loss == JournalDisk::Loss::kAll ? ", all lost" : ", torn"));
                ImageBytes left(f.path("a"));
                left.bytes = disk->after_cut(moment, loss, random);
                left.save(f.path("b"));
                const CheckNumbers again = f.check("b", CheckRepair::kAll);
                INFO(f.said());
                CHECK(again.clean());
                CHECK(f.reference("b").clean());
                CHECK((disk_of(f, "b") == expected));
            }
        }
    }
}

TEST_CASE("qcow2 repair: random damage never defeats it", "[qcow2][repair][slow][once]") {
    if (!CheckFixture::has_tool("qemu-img")) SKIP_TEST("no qemu-img");
    const std::string options = GENERATE(as<std::string>(), "cluster_size=512", "cluster_size=4k,refcount_bits=1",
                                         "extended_l2=on,cluster_size=16k", "compat=0.10,cluster_size=1k", "");
    const int rounds = std::atoi(env_or("GANTRY_SOAK", "").empty() ? "60" : "3000");
    CheckFixture f;
    f.create("a", options, "2M");
    f.io("a", {"write -P 1 0 200k", "write -P 2 1M 100k", "write -c -P 3 1536k 64k"});
    const bool snapshots = options.find("refcount_bits=1") == std::string::npos;
    if (snapshots) CheckFixture::sh("qemu-img snapshot -c one " + f.path("a"));
    f.io("a", {"write -P 4 10k 50k"});
    if (options.find("compat") == std::string::npos) {
        CheckFixture::sh("qemu-img bitmap --add -g 512 " + f.path("a") + " map");
        f.io("a", {"write -P 5 1700k 60k"});
    }
    const ImageBytes original(f.path("a"));
    const uint64_t cs = original.cluster_size();
    // Where metadata lies.
    std::vector<std::pair<uint64_t, uint64_t>> places{{original.l1(), 64}, {original.refcount_table(), 64}};
    for (uint64_t i = 0; i < original.half(36); i++)
        if (original.l2(i) != 0) places.emplace_back(original.l2(i), cs);
    for (uint64_t i = 0; i < cs / 8; i++)
        if (original.refcount_block(i) != 0) places.emplace_back(original.refcount_block(i), cs);
    if (original.half(60)) places.emplace_back(original.word(64), 8);
    std::mt19937 random(7);
    const auto upto = [&random](uint64_t n) { return std::uniform_int_distribution<uint64_t>(0, n - 1)(random); };
    int refused = 0;
    for (int round = 0; round < rounds; round++) {
        ImageBytes image = original;
        for (uint64_t hits = upto(8) + 1; hits > 0; hits--) {
            const auto& [offset, bytes] = places[upto(places.size())];
            const uint64_t at = offset + upto(bytes);
            if (at >= image.bytes.size()) continue;
            image.bytes[at] ^= static_cast<uint8_t>(1u << upto(8));
        }
        image.save(f.path("b"));
        auto leaks = f.try_check("b", CheckRepair::kLeaks);
        auto all = f.try_check("b", CheckRepair::kAll);
        CHECK(leaks.has_value() == all.has_value());
        if (!all) {  // refused by the parsers
            CHECK(all.error().kind() == ErrorKind::kCorrupt);
            refused++;
            continue;
        }
        std::string text;
        for (size_t i = 0; i < all->findings.size() && i < 10; i++) text += all->findings[i] + "\n";
        INFO(options << " round " << round << "\n" << text);
        CHECK(all->check_errors == 0);
        // Neither a broken snapshot nor counts that are too narrow can be helped.
        if (all->corruptions > 0) {
            const CheckNumbers left = f.check("b");
            const std::string said = f.said();
            INFO("left:\n" << said);
            CHECK((said.find("snapshot") != std::string::npos || said.find("overflow") != std::string::npos));
            (void)left;
        } else {
            CHECK(all->leaks == 0);
            CHECK(f.reference("b").clean());
        }
    }
    CHECK(refused < rounds);
}
