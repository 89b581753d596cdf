// Compaction: the file gets small, nothing in it changes.

#include <random>

#include "tests/unit/block/qcow2_ops_fixture.h"

using namespace gantry;
using namespace gantry::test;

TEST_CASE("qcow2: a compacted file ends where its contents end", "[qcow2][compact][interop]") {
    if (OpsFixture::tools_missing()) return;
    const auto options = GENERATE(as<std::string>{}, "cluster_size=512", "cluster_size=4k", "cluster_size=64k",
                                  "extended_l2=on,cluster_size=16k", "compat=0.10", "refcount_bits=64");
    INFO(options);
    OpsFixture f;
    f.create(options, 8 << 20);
    REQUIRE(f.open() == "");
    f.write(0, 8 << 20, 1);
    f.close();
    f.sh("qemu-io -f qcow2 -c 'discard 0 5M' -c 'discard 6M 1M' " + f.path);
    std::fill_n(f.disk.begin(), 5 << 20, uint8_t{0});
    std::fill_n(f.disk.begin() + (6 << 20), 1 << 20, uint8_t{0});
    REQUIRE(f.open() == "");
    const uint64_t before = f.file_bytes();
    REQUIRE(before > (8 << 20));
    f.compact();
    f.verify_file();
    // 2 MiB of data and what describes 8 MiB.
    CHECK(f.file_bytes() < (3 << 20) + (options == "cluster_size=512" ? 1 << 20 : 0));
    f.write(1 << 20, 2 << 20, 3);
    f.verify_file();
    const uint64_t small = f.file_bytes();
    f.compact();
    CHECK(f.file_bytes() <= small);
    f.verify_file();
}

TEST_CASE("qcow2: compaction in any order with everything else", "[qcow2][compact][interop]") {
    if (OpsFixture::tools_missing()) return;
    const auto options = GENERATE(as<std::string>{}, "cluster_size=512", "cluster_size=4k,compression_type=zstd",
                                  "cluster_size=64k", "refcount_bits=8,cluster_size=2k", "refcount_bits=1");
    const unsigned seed = std::random_device{}();
    INFO(options << " seed " << seed);
    std::mt19937 random(seed);
    OpsFixture f;
    f.create(options, 4 << 20);
    REQUIRE(f.open() == "");
    const size_t most_snapshots = options == "refcount_bits=1" ? 0 : 3;
    for (int i = 0; i < 40; i++) {
        uint64_t at = random() % f.disk.size();
        const uint64_t length = std::min<uint64_t>(random() % 500000 + 1, f.disk.size() - at);
        const unsigned what = random() % 16;
        INFO("step " << i << " kind " << what << " at " << at << "+" << length);
        if (what < 4) {
            f.write(at, length, static_cast<uint8_t>(random()));
        } else if (what < 7) {
            f.zero(at, length, true);
        } else if (what < 11) {
            const uint64_t cluster = f.node->cluster_size();
            at = at / cluster * cluster;
            for (int n = 0; n < 12 && at + cluster <= f.disk.size(); n++, at += cluster) {
                f.write_compressed(at, cluster, static_cast<uint8_t>(random()));
            }
        } else if (what < 12 && f.snapshots.size() < most_snapshots) {
            f.snapshot("s" + std::to_string(i));
        } else if (what < 13 && !f.snapshots.empty()) {
            f.remove(f.snapshots.begin()->first);
        } else {
            f.compact();
            if (what == 15) f.verify_file();
        }
        f.verify();
    }
    f.compact();
    f.verify_file();
}

TEST_CASE("qcow2: a compaction that is given up leaves a whole image", "[qcow2][compact][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    f.create("cluster_size=4k", 4 << 20);
    REQUIRE(f.open() == "");
    f.write(0, 4 << 20, 1);
    f.zero(0, 3 << 20, true);
    int calls = 0;
    const Result<> done = f.rt.run(block::compact_image(*f.graph, *f.node, [&](uint64_t, uint64_t) {
        calls++;
        return calls < 2;
    }));
    REQUIRE_FALSE(done);
    CHECK(done.error().kind() == ErrorKind::kCancelled);
    f.verify_file();
    f.compact();
    f.verify_file();
    CHECK(f.file_bytes() < (2 << 20));
}
