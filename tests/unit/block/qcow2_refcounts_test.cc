#include "block/formats/qcow2/refcounts.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <random>

#include "block/formats/qcow2/refcount_bits.h"
#include "tests/unit/block/qcow2_alloc_rig.h"

using namespace gantry;
using namespace gantry::block::qcow2;
using Catch::Matchers::Contains;
using gantry::test::AllocRig;
using gantry::test::RecordingFile;

namespace {

/// One count by the words of the format: bit k of a byte is the k-th from the least significant, numbers of bytes are
/// big endian.
uint64_t slow_count(const std::vector<uint8_t>& block, uint32_t order, uint64_t index) {
    const uint64_t bits = uint64_t{1} << order;
    uint64_t v = 0;
    if (bits >= 8) {
        for (uint64_t b = 0; b < bits / 8; b++) v = v << 8 | block[index * bits / 8 + b];
        return v;
    }
    for (uint64_t b = 0; b < bits; b++) {
        const uint64_t at = index * bits + b;
        v |= static_cast<uint64_t>(block[at / 8] >> (at % 8) & 1) << b;
    }
    return v;
}

}  // namespace

TEST_CASE("qcow2: counts of every width are read and written where the format says", "[qcow2][refcounts]") {
    const uint32_t order = GENERATE(0u, 1u, 2u, 3u, 4u, 5u, 6u);
    CAPTURE(order);
    std::mt19937_64 random(order + 1);
    const uint64_t entries = 512 * 8 >> order;
    alignas(8) std::vector<uint8_t> block(512);
    std::vector<uint64_t> model(entries);
    for (int round = 0; round < 4000; round++) {
        const uint64_t at = random() % entries;
        model[at] = random() % 3 == 0 ? 0 : random() & max_refcount(order);
        set_refcount_in_block(block, order, at, model[at]);
    }
    for (uint64_t i = 0; i < entries; i++) {
        REQUIRE(refcount_in_block(block, order, i) == model[i]);
        REQUIRE(slow_count(block, order, i) == model[i]);
    }
    for (int round = 0; round < 500; round++) {
        // Few zeroes, few others, or a mixture.
        if (round % 50 == 0) {
            const uint64_t kind = random() % 3;
            for (uint64_t i = 0; i < entries; i++) {
                const bool zero = kind == 0 ? random() % 40 == 0 : kind == 1 ? random() % 40 != 0 : random() % 2 == 0;
                model[i] = zero ? 0 : (random() & max_refcount(order)) | 1;
                set_refcount_in_block(block, order, i, model[i]);
            }
        }
        uint64_t from = random() % entries, to = random() % (entries + 1);
        if (from > to) std::swap(from, to);
        uint64_t zero = from, other = from, end = entries;
        while (zero < to && model[zero] != 0) zero++;
        while (other < to && model[other] == 0) other++;
        while (end > 0 && model[end - 1] == 0) end--;
        REQUIRE(find_zero_count(block, order, from, to) == zero);
        REQUIRE(find_nonzero_count(block, order, from, to) == other);
        REQUIRE(end_of_counts(block, order) == end);
    }
    std::fill(block.begin(), block.end(), uint8_t{0});
    CHECK(end_of_counts(block, order) == 0);
    CHECK(find_nonzero_count(block, order, 0, entries) == entries);
}

TEST_CASE("qcow2: counts refuse what does not fit", "[qcow2][refcounts]") {
    const uint32_t order = GENERATE(0u, 1u, 2u, 3u, 4u, 5u, 6u);
    CAPTURE(order);
    std::vector<uint8_t> block(512);
    const uint64_t most = max_refcount(order);
    CHECK(most == (order == 6 ? uint64_t{INT64_MAX} : (uint64_t{1} << (1u << order)) - 1));
    set_refcount_in_block(block, order, 5, most);
    uint64_t at = 0;
    CHECK(check_add(block, order, 0, 5, static_cast<int64_t>(most), at) == CountFault::kNone);
    CHECK(check_add(block, order, 3, 4, 1, at) == CountFault::kOverflow);
    CHECK(at == 5);
    CHECK(check_add(block, order, 5, 2, -1, at) == CountFault::kNegative);
    CHECK(at == 6);
    CHECK(check_add(block, order, 5, 1, -static_cast<int64_t>(most), at) == CountFault::kNone);
    CHECK(check_add(block, order, 5, 1, INT64_MIN, at) == CountFault::kNegative);
    if (order == 6) {
        set_refcount_in_block(block, order, 7, ~uint64_t{0});
        CHECK(check_add(block, order, 7, 1, 1, at) == CountFault::kOverflow);
    } else {
        CHECK(check_add(block, order, 0, 1, static_cast<int64_t>(most) + 1, at) == CountFault::kOverflow);
    }
}

TEST_CASE("qcow2: a change of counts happens whole or not at all", "[qcow2][refcounts]") {
    AllocRig rig(9, 1);  // 2 bits: 2048 clusters a block
    REQUIRE(rig.change(3000, 10, 2) == "");
    REQUIRE(rig.change(3005, 1, 1) == "");
    SECTION("a count at its limit") {
        const auto failed = rig.run(rig.counts->change(2000, 2000, 1));
        REQUIRE_FALSE(failed);
        CHECK(failed.error().kind() == ErrorKind::kInvalid);
        CHECK_THAT(failed.error().message(), Contains("exceed its width") && Contains("0x177a00"));
    }
    SECTION("a count below zero") {
        const auto failed = rig.run(rig.counts->change(3000, 11, -1));
        REQUIRE_FALSE(failed);
        CHECK(failed.error().kind() == ErrorKind::kCorrupt);
        CHECK_THAT(failed.error().message(), Contains("negative"));
    }
    SECTION("an absent block") {
        const auto failed = rig.run(rig.counts->change(4095, 2, -1));
        REQUIRE_FALSE(failed);
        CHECK(failed.error().kind() == ErrorKind::kCorrupt);
    }
    SECTION("beyond what offsets reach") {
        const auto raised = rig.run(rig.counts->change(uint64_t{1} << 46, 1, 1));
        REQUIRE_FALSE(raised);
        CHECK(raised.error().kind() == ErrorKind::kTooLarge);
        const auto lowered = rig.run(rig.counts->change_bytes(~uint64_t{0} - 4, 100, -1));
        REQUIRE_FALSE(lowered);
        CHECK(lowered.error().kind() == ErrorKind::kCorrupt);
    }
    SECTION("beyond the largest table") {
        const auto raised = rig.run(rig.counts->change(uint64_t{1} << 40, 1, 1));
        REQUIRE_FALSE(raised);
        CHECK(raised.error().kind() == ErrorKind::kTooLarge);
        CHECK_THAT(raised.error().message(), Contains("1048576"));
    }
    CHECK(rig.get(2000) == 0);
    CHECK(rig.get(3000) == 2);
    CHECK(rig.get(3005) == 3);
    CHECK(rig.get(3009) == 2);
    CHECK(rig.get(3010) == 0);
    CHECK(rig.run(rig.counts->end_of_use()).value() == 3010);
    CHECK(rig.run(rig.counts->change_bytes(3000 * 512 + 511, 2, -1)).has_value());
    CHECK(rig.get(3000) == 1);
    CHECK(rig.get(3001) == 1);
    CHECK(rig.get(3002) == 2);
}

TEST_CASE("qcow2: damage in the refcount table fails who needs the block and is not overwritten",
          "[qcow2][refcounts]") {
    AllocRig rig(9, 4);
    std::vector<uint8_t>& bytes = rig.node->bytes;
    const auto put = [&](uint64_t index, uint64_t place) { store_be64(bytes.data() + 512 + index * 8, place); };
    const auto refused = [&](uint64_t index) {
        auto r = rig.run(rig.counts->get(index * 256));
        if (r) return std::string();
        CHECK(r.error().kind() == ErrorKind::kCorrupt);
        return r.error().message();
    };
    put(1, 1024 + 8);
    put(2, uint64_t{1} << 40);
    put(3, 512);
    REQUIRE(rig.text(rig.run(rig.counts->reload())) == "");
    const auto before = bytes;
    CHECK(refused(0) == "");
    CHECK_THAT(refused(1), Contains("Refblock offset 0x408 unaligned (reftable index: 0x1)"));
    CHECK_THAT(refused(2), Contains("beyond the file (reftable index: 0x2)"));
    CHECK_THAT(refused(3), Contains("reftable index: 0x3"));
    CHECK_THAT(rig.change(260, 1, 1), Contains("unaligned"));
    CHECK_THAT(rig.change(600, 1, 1), Contains("beyond the file"));
    CHECK(rig.write_back() == "");
    CHECK(bytes == before);
    put(3, 1024);  // the first block again
    REQUIRE(rig.text(rig.run(rig.counts->reload())) == "");
    CHECK_THAT(refused(3), Contains("used twice"));
    CHECK_THAT(refused(0), Contains("used twice"));
}

TEST_CASE("qcow2: a new block never goes where metadata lies that nobody counts", "[qcow2][refcounts]") {
    AllocRig rig(9, 6);
    rig.overlap->add(Structure::kActiveL2, 3 * 512, 512);  // counted 0
    const auto failed = rig.run(rig.counts->change(100, 1, 1));
    REQUIRE_FALSE(failed);
    CHECK(failed.error().kind() == ErrorKind::kCorrupt);
    CHECK_THAT(failed.error().message(), Contains("refcount block (overlaps with active L2 table)"));
    CHECK(rig.node->ops.empty());
}

TEST_CASE("qcow2: new refcount blocks share one flush before their entries", "[qcow2][refcounts]") {
    AllocRig rig(9, 6);  // 64 clusters a block
    REQUIRE(rig.change(10, 64 * 5, 1) == "");
    CHECK(rig.node->ops.empty());
    CHECK(rig.counts->dirty());
    REQUIRE(rig.write_back() == "");
    CHECK_FALSE(rig.counts->dirty());
    size_t flushes = 0;
    for (const auto& op : rig.node->ops) flushes += op.kind == RecordingFile::Kind::kFlush;
    CHECK(flushes <= 2);
    const auto stored = AllocRig::stored(rig.node->bytes);
    for (uint64_t i = 10; i < 10 + 64 * 5; i++) REQUIRE(stored.counts.at(i) == 1);
    CHECK(stored.metadata.size() == 3 + 5);
    for (const auto& [at, n] : stored.metadata) CHECK(stored.counts.at(at) == 1);
    CHECK(stored.counts.size() == 64 * 5 + 8);
    CHECK(rig.overlap->touched(2 * 512, 512) == bit_of(Structure::kRefcountBlock));
    CHECK(rig.overlap->touched(rig.counts->table()[4], 1) == bit_of(Structure::kRefcountBlock));
    // Nothing changed: nothing is written.
    const size_t ops = rig.node->ops.size();
    REQUIRE(rig.write_back() == "");
    CHECK(rig.node->ops.size() == ops);
}

TEST_CASE("qcow2: only the changed part of a large refcount block is written", "[qcow2][refcounts]") {
    AllocRig rig(21, 4, 0, true, 3);
    REQUIRE(rig.change(1000, 2, 1) == "");
    REQUIRE(rig.change(9000, 1, 1) == "");
    REQUIRE(rig.write_back() == "");
    REQUIRE(rig.node->ops.size() == 1);
    CHECK(rig.node->ops[0].offset == 2 * rig.cluster);
    CHECK(rig.node->ops[0].data.size() == 5 * 4096);
}

TEST_CASE("qcow2: the refcount table grows, moves and gives its old place back", "[qcow2][refcounts][once]") {
    const uint32_t order = GENERATE(0u, 4u, 6u);
    const uint64_t cache = GENERATE(uint64_t{0}, uint64_t{1} << 20);
    CAPTURE(order, cache);
    AllocRig rig(9, order, cache);
    const uint64_t per_block = 4096 >> order, reach = 64 * per_block;
    REQUIRE(rig.change(reach - 5, 1, 1) == "");
    REQUIRE(rig.change(reach - 2, 3 * per_block, 1) == "");
    CHECK(rig.header.refcount_table_offset == 512);
    REQUIRE(rig.write_back() == "");
    CHECK(rig.header.refcount_table_offset != 512);
    CHECK(rig.header.refcount_table_clusters > 1);
    CHECK(load_be64(rig.node->bytes.data() + 48) == rig.header.refcount_table_offset);
    CHECK(load_be32(rig.node->bytes.data() + 56) == rig.header.refcount_table_clusters);
    CHECK(rig.overlap->touched(rig.header.refcount_table_offset, 512) == bit_of(Structure::kRefcountTable));
    CHECK(rig.overlap->touched(512, 512) == 0);
    CHECK(rig.get(1) == 0);
    CHECK(rig.counts->hint() <= 1);
    for (int again = 0; again < 3; again++) {
        const uint64_t coverage = rig.counts->table().size() * per_block;
        REQUIRE(rig.change(coverage + 100, 50, 1) == "");
        REQUIRE(rig.write_back() == "");
        REQUIRE(rig.counts->table().size() * per_block > coverage + 150);
    }
    // Exact, for us and for whoever opens it next.
    const auto stored = AllocRig::stored(rig.node->bytes);
    for (const auto& [at, n] : stored.metadata) CHECK((n == 1 && stored.counts.at(at) == 1));
    CHECK(stored.counts.size() == stored.metadata.size() + 1 + 3 * per_block + 3 * 50);
    rig.open();
    CHECK(rig.get(reach - 5) == 1);
    CHECK(rig.get(reach - 4) == 0);
    CHECK(rig.get(reach - 2 + 3 * per_block - 1) == 1);
    uint64_t last = 0;
    for (const auto& [at, n] : stored.counts) last = std::max(last, at);
    CHECK(rig.run(rig.counts->end_of_use()).value() == last + 1);
}

TEST_CASE("qcow2: counts stand a small cache", "[qcow2][refcounts]") {
    AllocRig rig(9, 6, 0);
    for (uint64_t i = 0; i < 60; i++) REQUIRE(rig.change(i * 64 + 40, 2, 1 + i % 3) == "");
    for (uint64_t i = 0; i < 60; i++) REQUIRE(rig.get(i * 64 + 41) == 1 + i % 3);
    CHECK(rig.node->reads > 50);
    REQUIRE(rig.write_back() == "");
    rig.open();
    for (uint64_t i = 0; i < 60; i++) REQUIRE(rig.get(i * 64 + 41) == 1 + i % 3);
}

TEST_CASE("qcow2: find_free finds the first hole, also in an almost full image", "[qcow2][refcounts][once]") {
    AllocRig rig(12, 4, uint64_t{1} << 20);  // 2048 clusters a block
    const uint64_t end = 2048 * 100;
    auto find = [&](uint64_t count, uint64_t grow_from) {
        return rig.run(rig.counts->find_free(count, grow_from)).value();
    };
    CHECK(find(1, 1) == 3);
    REQUIRE(rig.change(3, 3000, 1) == "");
    const uint64_t after = rig.run(rig.counts->end_of_use()).value();
    REQUIRE(rig.change(after, end - after, 1) == "");
    REQUIRE(rig.write_back() == "");
    const uint64_t tail = rig.run(rig.counts->end_of_use()).value();
    CHECK(find(1, tail) == tail);
    REQUIRE(rig.change(150000, 1, -1) == "");
    REQUIRE(rig.change(2048 * 80 - 3, 7, -1) == "");  // across two blocks
    CHECK(rig.counts->hint() == 150000);
    CHECK(find(1, tail) == 150000);
    CHECK(find(2, tail) == 2048 * 80 - 3);
    CHECK(find(7, tail) == 2048 * 80 - 3);
    CHECK(find(8, tail) == tail);
    CHECK(find(5000, tail) == tail);
    CHECK(find(2, 0) == std::max(tail, (rig.node->size() + 4095) / 4096));
    CHECK(rig.run(rig.counts->count_free(tail)).value() == 8);
    // Looking once more costs no reads of blocks without a place.
    REQUIRE(rig.write_back() == "");
    const auto run = rig.run(rig.counts->find_run(0, tail, 8, 8, {}));
    REQUIRE(run.has_value());
    CHECK(run->count == 0);
    const auto avoiding = rig.run(rig.counts->find_run(0, end, 3, 100, {2048 * 80 - 2, 2}));
    REQUIRE(avoiding.has_value());
    CHECK(avoiding->first == 2048 * 80);
    CHECK(avoiding->count == 4);
    REQUIRE(rig.change(2048 * 80 - 3, 7, 1) == "");
    CHECK(find(2, tail) == tail);
    CHECK(find(1, tail) == 150000);
}

TEST_CASE("qcow2: find_run agrees with a plain search", "[qcow2][refcounts]") {
    AllocRig rig(9, 6, 0);
    std::mt19937 random(7);
    const uint64_t clusters = 64 * 40;
    std::vector<bool> used(clusters);
    for (int round = 0; round < 1500; round++) {
        const uint64_t first = random() % clusters, count = 1 + random() % (round % 7 ? 6 : 150);
        const uint64_t most = std::min(count, clusters - first);
        // Whole runs of one state, so that both directions are legal.
        const auto now = rig.run(rig.counts->free_within(first, most)).value();
        if (random() % 2) {
            for (const auto& run : now) REQUIRE(rig.change(run.first, run.count, 1) == "");
        } else {
            for (uint64_t i = first; i < first + most; i++) {
                const bool metadata = rig.overlap->hits(i * 512, 512);
                if (rig.get(i) && !metadata) REQUIRE(rig.change(i, 1, -1) == "");
            }
        }
        if (round % 10) continue;
        for (uint64_t i = 0; i < clusters; i++) used[i] = rig.get(i) != 0;
        for (int ask = 0; ask < 5; ask++) {
            const uint64_t from = random() % 3 ? 0 : random() % clusters, least = 1 + random() % (ask ? 10 : 140);
            const uint64_t most = least + random() % 20;
            ClusterRun avoid{random() % clusters, random() % 3 ? 0 : random() % 100};
            ClusterRun expected;
            for (uint64_t i = std::max<uint64_t>(from, 1); i < clusters && expected.count < least;) {
                uint64_t n = 0;
                while (i + n < clusters && n < most && !used[i + n] && !(i + n >= avoid.first && i + n < avoid.end()))
                    n++;
                if (n >= least) expected = {i, n};
                i += n + 1;
            }
            const auto found = rig.run(rig.counts->find_run(from, clusters, least, most, avoid));
            REQUIRE(found.has_value());
            CAPTURE(round, from, least, most, avoid.first, avoid.count);
            REQUIRE(found->count == expected.count);
            if (expected.count) REQUIRE(found->first == expected.first);
        }
    }
}

TEST_CASE("qcow2: a full device refuses new blocks and larger tables", "[qcow2][refcounts]") {
    AllocRig rig(9, 6, 0, false, 100);
    CHECK(rig.run(rig.counts->find_free(97, 100)).value() == 3);
    const auto none = rig.run(rig.counts->find_free(98, 100));
    REQUIRE_FALSE(none);
    CHECK(none.error().kind() == ErrorKind::kNoSpace);
    // The second block finds no place of its own.
    const auto failed = rig.run(rig.counts->change(3, 97, 1));
    REQUIRE_FALSE(failed);
    CHECK(failed.error().kind() == ErrorKind::kNoSpace);
    CHECK(rig.get(3) == 0);
    CHECK(rig.change(3, 96, 1) == "");
    CHECK(rig.get(99) == 1);  // that block
}

namespace {

const bool kSoak = std::getenv("GANTRY_SOAK") != nullptr;
const int kSteps = kSoak ? 1000 : 120;
const size_t kMoments = kSoak ? 2000 : 80;

/// Random changes with write-backs now and then; what a power cut leaves at any moment, sector by sector, counts
/// every reference that may be on the disk by then.
struct CrashRun {
    explicit CrashRun(uint32_t order, uint64_t cache, unsigned seed, bool faults)
        : rig(9, order, cache), random(seed), faults(faults) {}

    void held_now() { moments.emplace_back(rig.node->ops.size(), held); }

    void lower() {
        if (model.empty()) return;
        auto at = std::next(model.begin(), static_cast<ptrdiff_t>(random() % model.size()));
        const uint64_t first = at->first;
        uint64_t count = 0;
        for (auto i = at; i != model.end() && i->first == first + count && count < 40; ++i) count++;
        for (uint64_t c = first; c < first + count; c++) {
            uint64_t& left = held[c];
            left = std::min(left, model[c] - 1);
        }
        held_now();
        if (rig.change(first, count, -1) != "") return;
        for (uint64_t c = first; c < first + count; c++) {
            if (--model[c] == 0) model.erase(c);
        }
    }
    void raise() {
        uint64_t first = 0, count = 1 + random() % 120;
        if (model.empty() || random() % 3) {
            auto found = rig.run(rig.counts->find_free(count, random() % 2 ? 1 + rig.node->size() / 512 : 0));
            if (!found) return;
            first = *found;
            if (random() % 40 == 0) first += 64 * rig.counts->clusters_per_block();
            auto free = rig.run(rig.counts->free_within(first, count));
            if (!free || free->size() != 1 || free->front().count != count) return;
        } else {
            first = std::next(model.begin(), static_cast<ptrdiff_t>(random() % model.size()))->first;
            count = 1;
        }
        if (rig.change(first, count, 1) != "") return;
        for (uint64_t c = first; c < first + count; c++) model[c]++;
    }
    void step() {
        const uint64_t what = random() % 10;
        if (what < 4) {
            raise();
        } else if (what < 7) {
            lower();
        } else if (rig.write_back() == "" && what == 9 && rig.run(rig.file.flush())) {
            held = model;
            held_now();
        }
    }

    void go(int steps) {
        held_now();
        if (faults) {
            rig.node->fault = [this](RecordingFile::Kind kind) -> int {
                if (kind == RecordingFile::Kind::kFlush || random() % 12) return 0;
                injected++;
                return random() % 2 ? EIO : ENOSPC;
            };
        }
        for (int i = 0; i < steps; i++) step();
        rig.node->fault = nullptr;
        REQUIRE(rig.write_back() == "");
        REQUIRE(rig.run(rig.file.flush()).has_value());
        held = model;
        held_now();
        check();
    }
    void check() {
        size_t moment = 0;
        const size_t stride = std::max<size_t>(1, rig.node->ops.size() / kMoments);
        for (size_t end = 0; end <= rig.node->ops.size(); end += end + stride > rig.node->ops.size() ? 1 : stride) {
            while (moment + 1 < moments.size() && moments[moment + 1].first <= end) moment++;
            for (int variant = 0; variant < (stride == 1 ? 8 : 2); variant++) {
                const std::string found = AllocRig::undercounted(rig.after_cut(end, random), moments[moment].second);
                CAPTURE(end, rig.node->ops.size());
                REQUIRE(found == "");
            }
        }
        // In the end nothing is lost and, without faults, nothing leaks.
        auto stored = AllocRig::stored(rig.node->bytes);
        auto expected = model;
        for (const auto& [at, n] : stored.metadata) expected[at] += n;
        if (!faults) CHECK(stored.counts == expected);
        for (const auto& [at, n] : expected) REQUIRE(stored.counts[at] >= n);
    }

    AllocRig rig;
    std::mt19937 random;
    bool faults;
    uint64_t injected = 0;
    std::map<uint64_t, uint64_t> model, held;
    std::vector<std::pair<size_t, std::map<uint64_t, uint64_t>>> moments;
};

}  // namespace

TEST_CASE("qcow2: a power cut at any write of refcounts leaves every reference counted",
          "[qcow2][refcounts][crash][once][long]") {
    const uint32_t order = GENERATE(3u, 6u);
    const uint64_t cache = GENERATE(uint64_t{0}, uint64_t{1} << 20);
    const unsigned seed = GENERATE(1u, 2u, 3u);
    CAPTURE(order, cache, seed);
    CrashRun run(order, cache, seed, false);
    run.go(kSteps);
    CHECK(run.rig.node->ops.size() > 50);
}

TEST_CASE("qcow2: failed writes of refcounts leave every reference counted", "[qcow2][refcounts][crash][once]") {
    const uint32_t order = GENERATE(3u, 6u);
    const uint64_t cache = GENERATE(uint64_t{0}, uint64_t{1} << 20);
    const unsigned seed = GENERATE(1u, 2u, 3u, 4u);
    CAPTURE(order, cache, seed);
    CrashRun run(order, cache, seed, true);
    run.go(kSteps);
    CHECK(run.injected > 0);
}

TEST_CASE("qcow2: each write of a growing refcount table may fail and be tried again", "[qcow2][refcounts][crash]") {
    const bool done_anyway = GENERATE(false, true);
    const bool grows_again = GENERATE(false, true);
    for (int failing = 0;; failing++) {
        CAPTURE(failing, done_anyway, grows_again);
        CrashRun run(6, uint64_t{1} << 20, 5, false);
        int writes = 0;
        run.rig.node->fault = [&](RecordingFile::Kind kind) -> int {
            if (kind != RecordingFile::Kind::kWrite || writes++ != failing) return 0;
            return done_anyway ? ENOSPC : EIO;
        };
        run.held_now();
        REQUIRE(run.rig.change(4000, 200, 1) == "");
        for (uint64_t c = 4000; c < 4200; c++) run.model[c] = 1;
        const bool failed = run.rig.write_back() != "";
        CHECK(run.rig.counts->dirty() == failed);
        REQUIRE(run.rig.change(10, 300, 1) == "");
        for (uint64_t c = 10; c < 310; c++) run.model[c] = 1;
        const uint64_t coverage = run.rig.counts->table().size() * 64;
        if (grows_again) {
            REQUIRE(run.rig.change(coverage + 10, 1, 1) == "");
            run.model[coverage + 10] = 1;
        }
        run.go(0);
        if (!failed) break;
    }
}

TEST_CASE("qcow2: refcounts stay dirty when a flush between their writes fails", "[qcow2][refcounts][crash]") {
    const int failing = GENERATE(0, 1);
    CrashRun run(6, 0, 5, false);
    int flushes = 0;
    run.rig.node->fault = [&](RecordingFile::Kind kind) -> int {
        return kind == RecordingFile::Kind::kFlush && flushes++ == failing ? EIO : 0;
    };
    run.held_now();
    REQUIRE(run.rig.change(4000, 200, 1) == "");
    CHECK_THAT(run.rig.write_back(), Contains("injected flush error"));
    CHECK(run.rig.counts->dirty());
    // The flush stays broken: nothing more becomes stable, and nothing is lost.
    CHECK_THAT(run.rig.write_back(), Contains("flush"));
    CHECK(run.rig.header.refcount_table_offset == 512);
    for (size_t end = 0; end <= run.rig.node->ops.size(); end++) {
        REQUIRE(AllocRig::undercounted(run.rig.after_cut(end, run.random), {}) == "");
    }
}
