#include <catch2/catch.hpp>
#include <random>
#include <thread>

#include "block/bitmap.h"

using namespace gantry;
using gantry::block::DirtyBitmap;

namespace {

std::shared_ptr<DirtyBitmap> make(uint64_t size, uint32_t granularity) {
    return DirtyBitmap::create("b", size, granularity).value();
}

/// One flag per granule.
struct Model {
    uint64_t size;
    uint32_t granularity;
    std::vector<bool> dirty;
    Model(uint64_t s, uint32_t g) : size(s), granularity(g), dirty((s + g - 1) / g) {}
    void set(uint64_t offset, uint64_t length, bool value) {
        if (offset >= size || length == 0) return;
        const uint64_t end = std::min(size - offset, length) + offset;
        for (uint64_t i = offset / granularity; i <= (end - 1) / granularity; i++) dirty[i] = value;
    }
    uint64_t next(uint64_t offset, bool value) const {
        for (; offset < size; offset = (offset / granularity + 1) * granularity) {
            if (dirty[offset / granularity] == value) return offset;
        }
        return size;
    }
    uint64_t bytes() const {
        uint64_t total = 0;
        for (uint64_t i = 0; i < dirty.size(); i++) {
            if (dirty[i]) total += std::min<uint64_t>(granularity, size - i * granularity);
        }
        return total;
    }
};

}  // namespace

TEST_CASE("bitmap: impossible granularities and sizes are refused", "[block][bitmap]") {
    for (const uint32_t g : {0u, 1u, 256u, 513u, 1000u, 3u << 20}) {
        auto made = DirtyBitmap::create("b", 1 << 20, g);
        REQUIRE_FALSE(made.has_value());
        CHECK(made.error().message() == "Granularity must be power of 2 and at least 512");
    }
    CHECK(DirtyBitmap::create("b", uint64_t{1} << 62, 512).error().kind() == ErrorKind::kTooLarge);
    CHECK(DirtyBitmap::create("b", 0, 512).has_value());
    CHECK(DirtyBitmap::create("b", uint64_t{1} << 42, 1u << 31).has_value());
}

TEST_CASE("bitmap: marks touch whole granules, are clipped, and stop when it does not record", "[block][bitmap]") {
    auto b = make(1000000, 65536);
    b->mark(65535, 2);
    CHECK(b->dirty_bytes() == 2 * 65536);
    b->mark(999999, UINT64_MAX);
    CHECK(b->dirty_bytes() == 2 * 65536 + 1000000 % 65536);
    b->mark(5000000, 10);
    b->mark(200000, 0);
    b->set_recording(false);
    b->mark(200000, 10);
    CHECK_FALSE(b->is_dirty(200000));
    CHECK(b->next_dirty(0) == 0);
    CHECK(b->next_dirty(70000) == 70000);
    CHECK(b->next_clean(70000) == 131072);
    CHECK(b->next_dirty(131072) == 15 * 65536);
    CHECK(b->next_clean(15 * 65536) == 1000000);
    b->clear_all();
    CHECK(b->dirty_bytes() == 0);
    CHECK(b->next_dirty(0) == 1000000);
}

TEST_CASE("bitmap: behaves as a plain list of flags", "[block][bitmap]") {
    std::mt19937_64 random(GENERATE(1, 2, 3, 4, 5, 6, 7, 8));
    const uint32_t granularity = 512u << (random() % 4);
    const uint64_t size = 1 + random() % (granularity * uint64_t{20000});
    auto b = make(size, granularity);
    Model model(size, granularity);
    const auto at = [&] { return random() % (size + size / 10 + 1); };
    for (int i = 0; i < 2000; i++) {
        const uint64_t offset = at();
        const uint64_t length = random() % 3 ? random() % (granularity * 5) : at() / 2;
        switch (random() % 8) {
            case 0:
            case 1:
                b->mark(offset, length);
                model.set(offset, length, true);
                break;
            case 2:
                b->clear_range(offset, length);
                model.set(offset, length, false);
                break;
            case 3:
                REQUIRE(b->is_dirty(offset) == (offset < size && model.dirty[offset / granularity]));
                break;
            case 4:
            case 5:
                REQUIRE(b->next_dirty(offset) ==
                        std::max(model.next(std::min(offset, size), true), std::min(offset, size)));
                break;
            case 6:
                REQUIRE(b->next_clean(offset) == model.next(std::min(offset, size), false));
                break;
            case 7:
                if (i % 20 == 0) {
                    b->clear_all();
                    model.set(0, size, false);
                }
                break;
        }
        if (i % 100 == 0) REQUIRE(b->dirty_bytes() == model.bytes());
    }
    auto copy = b->snapshot("copy");
    CHECK(copy->dirty_bytes() == model.bytes());
    CHECK_FALSE(copy->recording());
    b->clear_all();
    CHECK(copy->dirty_bytes() == model.bytes());
}

TEST_CASE("bitmap: growth is dirty, shrinking forgets", "[block][bitmap]") {
    std::mt19937_64 random(GENERATE(11, 12, 13));
    auto b = make(300000, 512);
    Model model(300000, 512);
    for (int i = 0; i < 200; i++) {
        const uint64_t size = random() % 600000;
        const uint64_t old = model.size;
        REQUIRE(b->resize(size).has_value());
        Model next(size, 512);
        for (uint64_t g = 0; g < std::min(next.dirty.size(), model.dirty.size()); g++) next.dirty[g] = model.dirty[g];
        if (size > old) next.set(old, size - old, true);
        model = next;
        REQUIRE(b->size() == size);
        REQUIRE(b->dirty_bytes() == model.bytes());
        const uint64_t offset = random() % (size + 1);
        b->clear_range(offset, 10000);
        model.set(offset, 10000, false);
        REQUIRE(b->dirty_bytes() == model.bytes());
    }
}

TEST_CASE("bitmap: merge takes any granularity but only the same size", "[block][bitmap]") {
    auto coarse = make(1 << 20, 65536);
    auto fine = make(1 << 20, 512);
    fine->mark(70000, 10);
    fine->mark(1000000, 10);
    REQUIRE(coarse->merge(*fine).has_value());
    CHECK(coarse->dirty_bytes() == 2 * 65536);
    fine->clear_all();
    REQUIRE(fine->merge(*coarse).has_value());
    CHECK(fine->dirty_bytes() == 2 * 65536);
    CHECK(fine->next_dirty(0) == 65536);
    CHECK(coarse->merge(*make(1 << 19, 512)).error().kind() == ErrorKind::kInvalid);
}

TEST_CASE("bitmap: marks of several threads are not lost, also while ranges are cleared", "[block][bitmap]") {
    auto b = make(uint64_t{1} << 30, 4096);
    // Threads mark disjoint granules of the same words while this thread clears others.
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 3; t++) {
        threads.emplace_back([&b, t] {
            for (uint64_t i = 0; i < 60000; i++) b->mark((i * 4 + t) * 4096, 4096);
        });
    }
    for (uint64_t i = 0; i < 60000; i++) b->clear_range((i * 4 + 3) * 4096, 4096);
    for (auto& thread : threads) thread.join();
    CHECK(b->dirty_bytes() == uint64_t{3} * 60000 * 4096);
    // The summary knows every one of them.
    uint64_t found = 0;
    for (uint64_t pos = b->next_dirty(0); pos < b->size();) {
        const uint64_t end = b->next_clean(pos);
        found += end - pos;
        pos = b->next_dirty(end);
    }
    CHECK(found == b->dirty_bytes());
}
