#include "block/formats/qcow2/cluster_allocator.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <random>
#include <thread>

#include "tests/unit/block/qcow2_alloc_rig.h"

using namespace gantry;
using namespace gantry::block::qcow2;
using Catch::Matchers::Contains;
using gantry::test::AllocRig;
using gantry::test::RecordingFile;

namespace {

/// All clusters of `run` from the allocator, refilled as needed.
std::vector<HostRun> take_all(AllocRig& rig, uint64_t clusters, uint64_t near = 0) {
    std::vector<HostRun> runs;
    while (clusters != 0) {
        HostRun run = rig.allocator->take(clusters, near);
        if (run.clusters == 0) {
            REQUIRE(AllocRig::text(rig.run(rig.allocator->refill(clusters))) == "");
            continue;
        }
        near = run.offset + run.clusters * rig.cluster;
        clusters -= run.clusters;
        runs.push_back(run);
    }
    return runs;
}

std::string free_text(AllocRig& rig, uint64_t offset, uint64_t bytes) {
    auto freed = rig.run(rig.allocator->free(offset, bytes));
    if (!freed) return freed.error().message();
    std::string text;
    for (const HostRun& run : *freed) {
        text += fmt::format("{}{}+{}", text.empty() ? "" : " ", run.offset / rig.cluster, run.clusters);
    }
    return text;
}

void write_at(AllocRig& rig, uint64_t offset, uint64_t bytes) {
    const std::vector<uint8_t> data(bytes, 0xd5);
    REQUIRE(rig.run(rig.file.write(offset, data, "data")).has_value());
}

}  // namespace

TEST_CASE("qcow2: clusters come in rows from a reservation that grows with use", "[qcow2][allocator]") {
    AllocRig rig(16, 4);
    ClusterAllocator& a = *rig.allocator;
    CHECK(a.take(1, 0).clusters == 0);
    REQUIRE(rig.run(a.refill(1)).has_value());
    CHECK(a.reserved() == 16);
    const HostRun first = a.take(3, 0);
    CHECK(first.offset == 3 * rig.cluster);
    CHECK(first.clusters == 3);
    CHECK(first.fresh);
    const HostRun second = a.take(100, first.offset + 3 * rig.cluster);
    CHECK(second.offset == 6 * rig.cluster);
    CHECK(second.clusters == 13);
    uint64_t last = 0;
    for (int i = 0; i < 40; i++) {
        REQUIRE(rig.run(a.refill(1)).has_value());
        const HostRun run = a.take(~uint64_t{0} >> 20, 0);
        CHECK(run.clusters <= (uint64_t{64} << 20) / rig.cluster);
        last = run.clusters;
        // Data makes the file larger, and so the share that may be reserved.
        write_at(rig, run.offset + run.clusters * rig.cluster - 1, 1);
    }
    CHECK(last >= 32);
    CHECK(last <= std::max<uint64_t>(16, rig.node->size() / rig.cluster / 8));
    // More than a reservation as a rule has.
    REQUIRE(rig.run(a.refill(5000)).has_value());
    CHECK(a.take(5000, 0).clusters == 5000);
}

TEST_CASE("qcow2: what is given back is taken next, fresh only when it was not written", "[qcow2][allocator]") {
    AllocRig rig(16, 4);
    ClusterAllocator& a = *rig.allocator;
    REQUIRE(rig.run(a.refill(1)).has_value());
    const HostRun run = a.take(4, 0);
    a.give_back({run.offset + 2 * rig.cluster, 2, true}, false);  // adjoins
    CHECK(a.reserved() == 14);
    const HostRun again = a.take(14, 0);
    CHECK(again.offset == run.offset + 2 * rig.cluster);
    CHECK(again.clusters == 14);
    CHECK(again.fresh);
    a.give_back(again, true);
    const HostRun stale = a.take(1, 0);
    CHECK(stale.offset == again.offset);
    CHECK_FALSE(stale.fresh);
    a.give_back({}, true);
    CHECK(a.reserved() == 13);
}

TEST_CASE("qcow2: settling returns the reservation exactly", "[qcow2][allocator]") {
    AllocRig rig(9, 6);
    const auto runs = take_all(rig, 100);
    REQUIRE(rig.run(rig.allocator->refill(300)).has_value());
    REQUIRE(AllocRig::text(rig.run(rig.allocator->settle())) == "");
    CHECK(rig.allocator->reserved() == 0);
    CHECK(rig.allocator->take(1, 0).clusters == 0);
    REQUIRE(rig.write_back() == "");
    const auto stored = AllocRig::stored(rig.node->bytes);
    auto expected = stored.metadata;
    for (const HostRun& run : runs) {
        for (uint64_t i = 0; i < run.clusters; i++) expected[run.offset / rig.cluster + i]++;
    }
    CHECK(stored.counts == expected);
}

TEST_CASE("qcow2: a failed settling keeps what it could not return", "[qcow2][allocator]") {
    AllocRig rig(9, 6);
    (void)take_all(rig, 10);
    const uint64_t reserved = rig.allocator->reserved();
    REQUIRE(rig.write_back() == "");
    // Push the block out of the cache, so that it has to be read again.
    REQUIRE(rig.run(rig.file.flush()).has_value());
    for (uint64_t i = 1; i < 12; i++) REQUIRE(rig.change(i * 64 * 5 + 1000, 1, 1) == "");
    REQUIRE(rig.write_back() == "");
    for (uint64_t i = 1; i < 12; i++) (void)rig.get(i * 64 * 5 + 1000);
    rig.node->fault = [](RecordingFile::Kind kind) { return kind == RecordingFile::Kind::kRead ? EIO : 0; };
    CHECK_THAT(AllocRig::text(rig.run(rig.allocator->settle())), Contains("injected read error"));
    CHECK(rig.allocator->reserved() == reserved);
    rig.node->fault = nullptr;
    CHECK(AllocRig::text(rig.run(rig.allocator->settle())) == "");
    CHECK(rig.allocator->reserved() == 0);
}

TEST_CASE("qcow2: holes are filled before the file grows", "[qcow2][allocator][once]") {
    AllocRig rig(16, 4);
    const uint64_t clusters = 8000;
    REQUIRE(rig.change(3, clusters - 3, 1) == "");
    write_at(rig, clusters * rig.cluster - 1, 1);
    SECTION("a useful one") {
        REQUIRE(rig.change(5000, 40, -1) == "");
        const auto runs = take_all(rig, 40);
        CHECK(runs.front().offset == 5000 * rig.cluster);
        CHECK_FALSE(runs.front().fresh);
        CHECK(take_all(rig, 1).front().offset >= clusters * rig.cluster);
    }
    SECTION("crumbs only when there are many") {
        for (uint64_t i = 0; i < 500; i++) REQUIRE(rig.change(1000 + i * 2, 1, -1) == "");
        const HostRun beyond = take_all(rig, 1).front();
        CHECK(beyond.offset >= clusters * rig.cluster);
        CHECK(beyond.fresh);
        REQUIRE(rig.run(rig.allocator->settle()).has_value());
        for (uint64_t i = 0; i < 1000; i++) REQUIRE(rig.change(2000 + i * 2, 1, -1) == "");
        const auto crumbs = take_all(rig, 100);
        CHECK(crumbs.size() == 100);
        for (const HostRun& crumb : crumbs) {
            CHECK(crumb.offset < 4001 * rig.cluster);
            CHECK_FALSE(crumb.fresh);
        }
    }
    SECTION("the end of the file is no border") {
        REQUIRE(rig.change(clusters - 10, 10, -1) == "");
        const auto runs = take_all(rig, 16);
        REQUIRE(runs.size() == 2);
        CHECK(runs[0].offset == (clusters - 10) * rig.cluster);
        CHECK(runs[0].clusters == 10);
        CHECK_FALSE(runs[0].fresh);
        CHECK(runs[1].offset == clusters * rig.cluster);
        CHECK(runs[1].fresh);
    }
    SECTION("for metadata even the smallest") {
        REQUIRE(rig.change(5000, 1, -1) == "");
        CHECK(rig.run(rig.allocator->allocate_row(1)).value().offset == 5000 * rig.cluster);
        const HostRun row = rig.run(rig.allocator->allocate_row(9)).value();
        CHECK(row.offset >= clusters * rig.cluster);
        CHECK(row.clusters == 9);
        CHECK(row.fresh);
        CHECK(rig.get(row.offset / rig.cluster + 8) == 1);
    }
}

TEST_CASE("qcow2: freed clusters are reported and used again, but not as fresh ones", "[qcow2][allocator]") {
    AllocRig rig(16, 4);
    const uint64_t c = rig.cluster;
    const HostRun run = take_all(rig, 8).front();
    REQUIRE(run.clusters == 8);
    REQUIRE(rig.run(rig.allocator->settle()).has_value());
    const uint64_t first = run.offset / c;
    REQUIRE(rig.change(first + 3, 1, 1) == "");
    CHECK(free_text(rig, run.offset + 1, c * 6) == fmt::format("{}+3 {}+3", first, first + 4));
    CHECK(free_text(rig, run.offset + 3 * c, c) == fmt::format("{}+1", first + 3));
    CHECK_THAT(free_text(rig, run.offset, c), Contains("negative"));
    const HostRun again = take_all(rig, 7).front();
    CHECK(again.offset == run.offset);
    CHECK_FALSE(again.fresh);
}

TEST_CASE("qcow2: an allocation in uncounted metadata is refused", "[qcow2][allocator]") {
    AllocRig rig(9, 4);
    rig.overlap->add(Structure::kActiveL1, 20 * 512, 512);
    const auto refilled = rig.run(rig.allocator->refill(100));
    REQUIRE_FALSE(refilled);
    CHECK(refilled.error().kind() == ErrorKind::kCorrupt);
    CHECK_THAT(refilled.error().message(), Contains("overlaps with active L1 table"));
    const auto row = rig.run(rig.allocator->allocate_row(30));
    REQUIRE_FALSE(row);
    CHECK(row.error().kind() == ErrorKind::kCorrupt);
}

TEST_CASE("qcow2: a device is used up to its last cluster", "[qcow2][allocator]") {
    AllocRig rig(9, 4, 0, false, 200);
    uint64_t got = 0;
    for (; got < 150; got++) REQUIRE(take_all(rig, 1).size() == 1);
    // What is reserved for data serves metadata when there is nothing else.
    for (; got < 197; got++) REQUIRE(rig.run(rig.allocator->allocate_row(1)).has_value());
    const auto row = rig.run(rig.allocator->allocate_row(1));
    REQUIRE_FALSE(row);
    CHECK(row.error().kind() == ErrorKind::kNoSpace);
    const auto none = rig.run(rig.allocator->refill(1));
    REQUIRE_FALSE(none);
    CHECK(none.error().kind() == ErrorKind::kNoSpace);
    CHECK(free_text(rig, 100 * 512, 512) == "100+1");
    const auto runs = take_all(rig, 1);
    CHECK(runs.front().offset == 100 * 512);
    CHECK_FALSE(runs.front().fresh);
}

TEST_CASE("qcow2: compressed blobs are packed one behind the other", "[qcow2][allocator]") {
    const uint32_t order = GENERATE(0u, 1u, 4u);
    CAPTURE(order);
    AllocRig rig(9, order);
    auto blob = [&](uint64_t bytes) { return rig.run(rig.allocator->allocate_bytes(bytes)).value(); };
    const uint64_t a = blob(200);
    CHECK(a % 512 == 0);
    const uint64_t b = blob(200);
    if (order == 0) {
        // A count of one has no room for a second blob.
        CHECK(b == a + 512);
        CHECK(rig.get(a / 512) == 1);
        return;
    }
    CHECK(b == a + 200);
    const uint64_t c = blob(300);  // on into the next cluster, which is reserved
    CHECK(c == a + 400);
    CHECK(rig.get(a / 512) == 3);
    CHECK(rig.get(a / 512 + 1) == 1);
    const uint64_t d = blob(512 - 188);
    CHECK(d == a + 700);
    const uint64_t e = blob(10);  // the cluster is full to the last byte
    CHECK(e == a + 1024);
    CHECK(free_text(rig, a, 200) == "");
    CHECK(free_text(rig, b, 200) == "");
    CHECK(free_text(rig, c, 300) == fmt::format("{}+1", a / 512));
    SECTION("a cluster that nobody refers to any more is not appended to") {
        CHECK(free_text(rig, e, 10) == fmt::format("{}+1", e / 512));
        CHECK(blob(10) != e + 10);
    }
    SECTION("nor one that was emptied by others") {
        REQUIRE(rig.change(e / 512, 1, -1) == "");
        CHECK(blob(10) % 512 == 0);
    }
    SECTION("a neighbour that is used ends the run") {
        REQUIRE(rig.run(rig.allocator->settle()).has_value());
        REQUIRE(rig.change(e / 512 + 1, 1, 1) == "");
        const uint64_t f = blob(510);
        CHECK(f % 512 == 0);
        CHECK(f / 512 != e / 512 + 1);
    }
    SECTION("a free neighbour does not") {
        REQUIRE(rig.run(rig.allocator->settle()).has_value());
        REQUIRE(rig.get(e / 512 + 1) == 0);
        CHECK(blob(510) == e + 10);
        CHECK(rig.get(e / 512 + 1) == 1);
        CHECK(rig.get(e / 512) == 2);
    }
    SECTION("a count at its limit begins a new cluster") {
        if (order != 1) return;
        CHECK(blob(10) == e + 10);
        CHECK(blob(10) == e + 20);
        CHECK(blob(10) % 512 == 0);
    }
}

TEST_CASE("qcow2: random allocations agree with a plain list", "[qcow2][allocator]") {
    const uint32_t order = GENERATE(1u, 4u, 6u);
    const unsigned seed = GENERATE(1u, 2u, 3u);
    CAPTURE(order, seed);
    AllocRig rig(9, order, 4096);
    std::mt19937 random(seed);
    std::map<uint64_t, uint64_t> model;               // references by cluster
    std::vector<std::pair<uint64_t, uint64_t>> held;  // offset, bytes
    auto hold = [&](uint64_t offset, uint64_t bytes, bool fresh, bool shared) {
        for (uint64_t c = offset / 512; c <= (offset + bytes - 1) / 512; c++) {
            if (!shared) REQUIRE(model.find(c) == model.end());
            REQUIRE_FALSE(rig.overlap->hits(c * 512, 512));
            model[c]++;
        }
        if (fresh) {
            for (uint64_t i = offset; i < std::min(offset + bytes, rig.node->size()); i++) {
                REQUIRE(rig.node->bytes[i] == 0);
            }
        }
        write_at(rig, offset, bytes);
        held.emplace_back(offset, bytes);
    };
    for (int round = 0; round < 3000; round++) {
        const uint64_t what = random() % 20;
        if (what < 6) {
            for (const HostRun& run : take_all(rig, 1 + random() % 20, random() % 2 ? 0 : rig.node->size())) {
                if (random() % 8 == 0) {
                    const bool written = random() % 2;
                    if (written) write_at(rig, run.offset, 512);
                    rig.allocator->give_back(run, written);
                } else {
                    hold(run.offset, run.clusters * 512, run.fresh, false);
                }
            }
        } else if (what < 8) {
            const HostRun row = rig.run(rig.allocator->allocate_row(1 + random() % 9)).value();
            hold(row.offset, row.clusters * 512, row.fresh, false);
        } else if (what < 11) {
            const uint64_t bytes = 1 + random() % 512;
            hold(rig.run(rig.allocator->allocate_bytes(bytes)).value(), bytes, false, true);
        } else if (what < 18) {
            if (held.empty()) continue;
            const size_t at = random() % held.size();
            auto [offset, bytes] = held[at];
            held.erase(held.begin() + static_cast<ptrdiff_t>(at));
            std::string zero;
            uint64_t from = 0, n = 0;
            auto emit = [&] {
                if (n) zero += fmt::format("{}{}+{}", zero.empty() ? "" : " ", from, n);
                n = 0;
            };
            for (uint64_t c = offset / 512; c <= (offset + bytes - 1) / 512; c++) {
                if (--model[c] != 0) {
                    emit();
                    continue;
                }
                model.erase(c);
                if (n++ == 0) from = c;
            }
            emit();
            REQUIRE(free_text(rig, offset, bytes) == zero);
        } else if (what == 18) {
            REQUIRE(rig.write_back() == "");
        } else if (random() % 10 == 0) {
            REQUIRE(rig.run(rig.allocator->settle()).has_value());
            REQUIRE(rig.write_back() == "");
            const auto stored = AllocRig::stored(rig.node->bytes);
            auto expected = model;
            for (const auto& [c, n] : stored.metadata) expected[c] += n;
            REQUIRE(stored.counts == expected);
            if (random() % 3 == 0) rig.open();
        }
    }
}

TEST_CASE("qcow2: threads take from one reservation without meeting", "[qcow2][allocator][stress]") {
    AllocRig rig(16, 4);
    REQUIRE(rig.run(rig.allocator->refill(40000)).has_value());
    const uint64_t all = rig.allocator->reserved();
    std::vector<std::atomic<uint8_t>> taken(all + 64);
    std::atomic<bool> met{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; t++) {
        threads.emplace_back([&, t] {
            std::mt19937 random(static_cast<unsigned>(t));
            uint64_t near = 0;
            for (int i = 0; i < 3000; i++) {
                const HostRun run = rig.allocator->take(1 + random() % 4, near);
                for (uint64_t c = 0; c < run.clusters; c++) {
                    if (taken[run.offset / rig.cluster + c].fetch_add(1) != 0) met = true;
                }
                near = run.offset + run.clusters * rig.cluster;
                if (random() % 3) continue;
                for (uint64_t c = 0; c < run.clusters; c++) taken[run.offset / rig.cluster + c].fetch_sub(1);
                rig.allocator->give_back(run, random() % 2);
            }
        });
    }
    for (auto& thread : threads) thread.join();
    CHECK_FALSE(met);
    uint64_t used = 0;
    for (const auto& t : taken) used += t.load();
    CHECK(used + rig.allocator->reserved() == all);
}
