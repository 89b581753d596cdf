// Internal snapshots against a model of their contents; qemu-img agrees about every image.

#include <random>

#include "block/formats/qcow2/snapshot_table.h"
#include "tests/unit/block/qcow2_check_fixture.h"
#include "tests/unit/block/qcow2_ops_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::qcow2::Snapshot;

TEST_CASE("qcow2: a snapshot table reads as it was written", "[qcow2][snapshot]") {
    std::vector<Snapshot> snapshots(3);
    snapshots[0] = {.l1_table_offset = 0x10000, .l1_size = 3, .date_sec = 7, .date_nsec = 8, .vm_clock_ns = 9};
    snapshots[0].disk_size = 4096;
    snapshots[0].id = "1";
    snapshots[0].name = "a name";
    snapshots[1].vm_state_size = uint64_t{1} << 40;
    snapshots[1].icount = 77;
    snapshots[1].unknown_extra = {1, 2, 3, 4, 5};
    snapshots[1].id = "22";
    const auto bytes = block::qcow2::encode_snapshot_table(snapshots, 12345);
    CHECK(bytes.size() % 8 == 0);
    auto parsed = block::qcow2::parse_snapshot_table(bytes, 3, true, "n");
    REQUIRE(parsed);
    REQUIRE(*parsed);
    const std::vector<Snapshot>& found = **parsed;
    CHECK(found[0].l1_table_offset == 0x10000);
    CHECK(found[0].l1_size == 3);
    CHECK(found[0].date_nsec == 8);
    CHECK(found[0].vm_clock_ns == 9);
    CHECK(found[0].disk_size == 4096);
    CHECK(found[0].name == "a name");
    CHECK_FALSE(found[0].icount);
    CHECK(found[1].vm_state_size == uint64_t{1} << 40);
    CHECK(found[1].icount == 77);
    CHECK(found[1].unknown_extra == std::vector<uint8_t>{1, 2, 3, 4, 5});
    CHECK(found[2].disk_size == 12345);
    CHECK(block::qcow2::next_snapshot_id(snapshots) == "23");
    CHECK(block::qcow2::next_snapshot_id({}) == "1");
}

TEST_CASE("qcow2: a snapshot keeps what the disk held", "[qcow2][snapshot][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    f.create("", 8 << 20);
    REQUIRE(f.open() == "");
    f.write(0, 300000, 1);
    const std::string first = f.snapshot("one");
    CHECK(first == "1");
    f.write(100000, 100000, 2);
    f.verify_file();
    CHECK_THAT(f.output("qemu-img snapshot -U -l " + f.path), Catch::Contains("one") && Catch::Contains("2023-11-14"));
    const std::string second = f.snapshot("two");
    f.zero(0, 1 << 20, true);
    f.verify_file();
    f.apply(first);
    f.verify_file();
    f.write(50000, 200000, 3);
    f.verify_file();
    f.remove(first);
    f.verify_file();
    f.apply(second);
    f.remove(second);
    f.verify_file();
    CHECK(f.output("qemu-img snapshot -U -l " + f.path) == "");
}

TEST_CASE("qcow2: snapshots, writes and sizes in any order", "[qcow2][snapshot][interop]") {
    if (OpsFixture::tools_missing()) return;
    const auto options =
        GENERATE(as<std::string>{}, "cluster_size=512", "cluster_size=4k", "cluster_size=64k", "compat=0.10",
                 "extended_l2=on,cluster_size=16k", "refcount_bits=8,cluster_size=2k", "lazy_refcounts=on");
    const unsigned seed = std::random_device{}();
    INFO(options << " seed " << seed);
    std::mt19937 random(seed);
    OpsFixture f;
    constexpr uint64_t kMost = 3 << 20;
    const bool v2 = options == "compat=0.10";
    f.create(options, 1 << 20);
    REQUIRE(f.open() == "");
    const auto place = [&](uint64_t& at, uint64_t& length) {
        at = random() % f.disk.size();
        length = std::min<uint64_t>(random() % 200000 + 1, f.disk.size() - at);
    };
    for (int i = 0; i < 80; i++) {
        uint64_t at = 0, length = 0;
        place(at, length);
        const unsigned what = random() % 20;
        INFO("step " << i << " kind " << what << " at " << at << "+" << length);
        std::string some;
        if (!f.snapshots.empty()) some = std::next(f.snapshots.begin(), random() % f.snapshots.size())->first;
        if (what < 8) {
            f.write(at, length, static_cast<uint8_t>(random()));
        } else if (what < 10) {
            f.zero(at, length, random() % 2);
        } else if (what < 11) {
            const uint64_t cluster = f.node->cluster_size();
            at = at / cluster * cluster;
            if (at + cluster <= f.disk.size()) f.write_compressed(at, cluster, static_cast<uint8_t>(random()));
        } else if (what < 14 && f.snapshots.size() < 6) {
            f.snapshot("s" + std::to_string(i));
        } else if (what < 16 && !some.empty()) {
            f.remove(some);
        } else if (what < 18 && !some.empty()) {
            f.apply(some);
        } else if (what < 19 && !(v2 && !f.snapshots.empty())) {
            f.resize((random() % kMost + 512) / 512 * 512);
        } else if (what == 19) {
            f.verify_file();
        }
        f.verify();
    }
    f.verify_file();
    while (!f.snapshots.empty()) f.remove(f.snapshots.begin()->first);
    f.verify_file();
}

TEST_CASE("qcow2: narrow counts refuse a snapshot and change nothing", "[qcow2][snapshot][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    SECTION("one bit") {
        f.create("refcount_bits=1", 1 << 20);
        REQUIRE(f.open() == "");
        f.write(0, 200000, 1);
        const Result<> made = f.rt.run(block::create_snapshot(*f.graph, *f.node, {.name = "x"}));
        REQUIRE_FALSE(made);
        CHECK(made.error().kind() == ErrorKind::kInvalid);
        f.write(0, 100000, 2);
        f.verify_file();
        CHECK(f.image().image().snapshots.empty());
    }
    SECTION("two bits: three references") {
        f.create("refcount_bits=2", 1 << 20);
        REQUIRE(f.open() == "");
        f.write(0, 200000, 1);
        f.snapshot("a");
        f.snapshot("b");
        CHECK_FALSE(f.rt.run(block::create_snapshot(*f.graph, *f.node, {.name = "c"})));
        CHECK_FALSE(f.rt.run(block::apply_snapshot(*f.graph, *f.node, "1")));
        f.write(100000, 100000, 2);
        f.verify_file();
        f.remove("1");
        f.snapshot("c");
        f.verify_file();
    }
}

TEST_CASE("qcow2: what cannot be done with snapshots is said as the reference says it", "[qcow2][snapshot][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    const auto create = [&] { return error_of(f.rt.run(block::create_snapshot(*f.graph, *f.node, {.name = "x"}))); };
    const auto apply = [&](std::string s) { return error_of(f.rt.run(block::apply_snapshot(*f.graph, *f.node, s))); };
    const auto remove = [&](std::string id, std::string name) {
        return error_of(f.rt.run(block::delete_snapshot(*f.graph, *f.node, id, name)));
    };
    SECTION("an external data file") {
        f.create("data_file=" + f.dir.file("d.raw"), 1 << 20);
        REQUIRE(f.open() == "");
        CHECK_THAT(create(), Catch::StartsWith("Operation not supported"));
        CHECK_THAT(apply("x"), Catch::StartsWith("Failed to load snapshot: Operation not supported"));
    }
    SECTION("read-only") {
        f.create("", 1 << 20);
        REQUIRE(f.open() == "");
        f.snapshot("x");
        f.close();
        REQUIRE(f.open({{"read-only", true}}) != "");  // the test's root wants to write
        CHECK_THAT(create(), Catch::Contains("read-only"));
        CHECK_THAT(remove("1", ""), Catch::Contains("read-only"));
    }
    SECTION("names") {
        f.create("", 1 << 20);
        REQUIRE(f.open() == "");
        f.snapshot("2");
        f.write(0, 1000, 1);
        f.snapshot("x");
        f.write(0, 1000, 2);
        CHECK_THAT(apply("y"), Catch::StartsWith("Failed to load snapshot: No such file or directory"));
        CHECK(remove("", "y") == "Snapshot with id 'null' and name 'y' does not exist on device 'q'");
        CHECK(remove("1", "x") == "Snapshot with id '1' and name 'x' does not exist on device 'q'");
        CHECK(remove("", "") == "Name or id must be provided");
        f.apply("2");  // an id is meant before a name
        f.verify();
        CHECK(remove("1", "2") == "");
        CHECK(remove("", "x") == "");
        f.snapshots.clear();
        f.verify_file();
    }
}

TEST_CASE("qcow2: disk size, dates and foreign bytes of snapshots survive", "[qcow2][snapshot][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    f.create("", 1 << 20);
    f.sh("qemu-img snapshot -c theirs " + f.path);
    REQUIRE(f.open() == "");
    f.snapshots["1"] = f.disk;
    f.resize(5 << 20);
    f.write(4 << 20, 1000, 3);
    f.snapshot("ours");
    f.resize(2 << 20);
    f.verify_file();
    CHECK(f.image().image().snapshots[0].disk_size == 1 << 20);
    CHECK(f.image().image().snapshots[1].disk_size == 5 << 20);
    f.apply("2");
    f.verify_file();
    f.close();
    f.sh("qemu-img snapshot -a theirs " + f.path);
    REQUIRE(f.open() == "");
    f.disk = f.snapshots["1"];
    f.verify_file();
}

TEST_CASE("qcow2: snapshot entries without extra data are no longer than they are", "[qcow2][snapshot][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    f.create("compat=0.10,cluster_size=512", 65536);
    f.sh("qemu-io -f qcow2 -c 'write -P 1 0 1k' " + f.path);
    for (const char name : std::string("abcdefgh")) f.sh("qemu-img snapshot -c " + std::string(1, name) + " " + f.path);
    // As old programs wrote them: 40 bytes and the names. The table shrinks from two clusters to one.
    ImageBytes image(f.path);
    const uint64_t table = image.word(64);
    std::vector<uint8_t> entries;
    uint64_t at = table;
    for (int i = 0; i < 8; i++) {
        const uint8_t* entry = &image.bytes.at(at);
        const uint64_t extra = image.half(at + 36), names = image.get16(at + 12) + image.get16(at + 14);
        const size_t begin = entries.size();
        entries.insert(entries.end(), entry, entry + 40);
        std::fill_n(entries.begin() + static_cast<ptrdiff_t>(begin) + 36, 4, uint8_t{0});
        entries.insert(entries.end(), entry + 40 + extra, entry + 40 + extra + names);
        entries.resize((entries.size() + 7) & ~size_t{7});
        at += (40 + extra + names + 7) & ~uint64_t{7};
    }
    REQUIRE(at - table > 512);
    REQUIRE(entries.size() <= 512);
    image.bytes.resize(std::max<size_t>(image.bytes.size(), table + 1024));
    std::fill_n(image.bytes.begin() + static_cast<ptrdiff_t>(table), 1024, uint8_t{0});
    std::ranges::copy(entries, image.bytes.begin() + static_cast<ptrdiff_t>(table));
    image.save(f.path);
    (void)f.output("qemu-img check -r leaks " + f.path);
    f.sh("qemu-io -f qcow2 -c 'write -P 2 8k 16k' " + f.path);  // takes what has become free
    const auto judged = [&f] {
        f.close();
        const std::string report = f.output("qemu-img check " + f.path);
        INFO(report);
        CHECK(f.status == 0);
    };
    judged();
    REQUIRE(f.open() == "");
    SECTION("a snapshot is made") { f.need(f.rt.run(block::create_snapshot(*f.graph, *f.node, {.name = "i"}))); }
    SECTION("one is deleted") { f.need(f.rt.run(block::delete_snapshot(*f.graph, *f.node, "", "c"))); }
    SECTION("the image becomes one of version 3") { CHECK(f.amend({{"driver", "qcow2"}, {"compat", "1.1"}}) == ""); }
    SECTION("the image is made compact") { f.compact(); }
    judged();
    REQUIRE(f.open() == "");
    for (const block::qcow2::Snapshot& s : f.image().image().snapshots) CHECK(s.disk_size.value_or(65536) == 65536);
}
