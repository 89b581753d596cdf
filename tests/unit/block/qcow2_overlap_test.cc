#include <atomic>
#include <catch2/catch.hpp>
#include <map>
#include <random>
#include <thread>

#include "block/formats/qcow2/overlap_map.h"
#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block::qcow2;
using Catch::Matchers::Contains;

namespace {

Geometry clusters_of(uint32_t bits) {
    Geometry g;
    g.cluster_bits = bits;
    return g;
}

Result<StructureSet> flags_of(const std::string& text) {
    const json::object object = test::options_of(text);
    return overlap_flags(schema::Options(object));
}

}  // namespace

TEST_CASE("qcow2: option overlap-check names a template or single structures", "[qcow2][overlap]") {
    CHECK(flags_of("{}").value() == kOverlapCached);
    CHECK(flags_of("{'overlap-check': 'none'}").value() == kOverlapNone);
    CHECK(flags_of("{'overlap-check': 'constant'}").value() == kOverlapConstant);
    CHECK(flags_of("{'overlap-check': 'cached'}").value() == kOverlapCached);
    CHECK(flags_of("{'overlap-check': 'all'}").value() == kOverlapAll);
    CHECK(flags_of("{'overlap-check': {'active-l2': false}}").value() ==
          (kOverlapCached & ~bit_of(Structure::kActiveL2)));
    CHECK(flags_of("{'overlap-check': {'template': 'none', 'inactive-l2': true, 'main-header': true}}").value() ==
          (bit_of(Structure::kInactiveL2) | bit_of(Structure::kMainHeader)));
    const auto unknown = flags_of("{'overlap-check': 'some'}");
    REQUIRE_FALSE(unknown);
    CHECK_THAT(unknown.error().message(),
               Contains("Unsupported value 'some' for qcow2 option 'overlap-check'. Allowed are any of the following: "
                        "none, constant, cached, all"));
    CHECK(kOverlapAll == 0x1ff);
}

TEST_CASE("qcow2: the overlap map knows whole clusters, and only those that are checked", "[qcow2][overlap]") {
    OverlapMap map(clusters_of(16), kOverlapCached);
    const uint64_t c = 65536;
    map.add(Structure::kMainHeader, 0, 512);
    map.add(Structure::kActiveL1, 10 * c + 5, 2 * c);
    map.add(Structure::kInactiveL2, 40 * c, c);  // not checked
    map.add(Structure::kActiveL2, (uint64_t{1} << 56) - c, 8 * c);
    map.add(Structure::kActiveL2, uint64_t{1} << 60, c);
    CHECK(map.hits(100, 1));
    CHECK_FALSE(map.hits(c, 9 * c));
    CHECK(map.hits(c, 9 * c + 1));
    CHECK(map.hits(12 * c, 1));
    CHECK_FALSE(map.hits(13 * c, 27 * c));
    CHECK_FALSE(map.hits(40 * c, c));
    CHECK_FALSE(map.hits(10 * c, 0));
    CHECK(map.hits((uint64_t{1} << 56) - 1, 1));
    CHECK_FALSE(map.hits(uint64_t{1} << 60, c));
    CHECK(map.touched(0, ~uint64_t{0}) ==
          (bit_of(Structure::kMainHeader) | bit_of(Structure::kActiveL1) | bit_of(Structure::kActiveL2)));
    CHECK(map.what(11 * c, c) == Structure::kActiveL1);
    CHECK(structure_name(*map.what(11 * c, c)) == "active L1 table");
    CHECK(map.what(20 * c, c) == std::nullopt);
    map.add(Structure::kInactiveL1, 11 * c, c);
    map.remove(Structure::kActiveL1, 10 * c, 3 * c);
    CHECK_FALSE(map.hits(10 * c, c));
    CHECK(map.what(11 * c, c) == Structure::kInactiveL1);
    OverlapMap none(clusters_of(16), kOverlapNone);
    none.add(Structure::kMainHeader, 0, c);
    CHECK_FALSE(none.hits(0, c));
}

TEST_CASE("qcow2: the overlap map agrees with a plain list", "[qcow2][overlap]") {
    const uint32_t bits = GENERATE(9u, 16u, 21u);
    OverlapMap map(clusters_of(bits), kOverlapAll);
    std::map<uint64_t, StructureSet> model;
    std::mt19937_64 random(bits);
    auto place = [&] {
        // Near, far, and at the same places again.
        const uint64_t cluster = random() % 3 ? random() % 3000 : (random() % 40) << (56 - bits - 6);
        return cluster;
    };
    for (int round = 0; round < 30000; round++) {
        const uint64_t first = place(), count = 1 + random() % 40;
        const auto s = static_cast<Structure>(random() % 9);
        const bool adds = random() % 2;
        if (round % 3) {
            StructureSet expected = 0;
            for (auto i = model.lower_bound(first); i != model.end() && i->first < first + count; ++i)
                expected |= i->second;
            REQUIRE(map.touched(first << bits, count << bits) == expected);
            REQUIRE(map.hits(first << bits, count << bits) == (expected != 0));
            continue;
        }
        for (uint64_t c = first; c < first + count; c++) {
            StructureSet& set = model[c];
            set = static_cast<StructureSet>(adds ? set | bit_of(s) : set & ~bit_of(s));
        }
        if (adds) {
            map.add(s, first << bits, count << bits);
        } else {
            map.remove(s, first << bits, count << bits);
        }
    }
}

TEST_CASE("qcow2: marks that were there before are seen by every thread while the map grows",
          "[qcow2][overlap][stress]") {
    OverlapMap map(clusters_of(16), kOverlapAll);
    map.add(Structure::kMainHeader, 0, 65536);
    std::atomic<uint64_t> marked{1};  // clusters 16 * i for i below it
    std::atomic<bool> stop{false}, missed{false}, invented{false};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 3; t++) {
        threads.emplace_back([&, t] {
            std::mt19937 random(t);
            while (!stop) {
                const uint64_t known = marked.load(std::memory_order_acquire);
                const uint64_t i = random() % known;
                if (!map.hits(i * 16 << 16, 1)) missed = true;
                if (map.hits((i * 16 + 1) << 16, 15 << 16)) invented = true;
            }
        });
    }
    for (uint64_t i = 1; i < 20000; i++) {
        map.add(Structure::kActiveL2, i * 16 << 16, 65536);
        marked.store(i + 1, std::memory_order_release);
    }
    stop = true;
    for (auto& thread : threads) thread.join();
    CHECK_FALSE(missed);
    CHECK_FALSE(invented);
}
