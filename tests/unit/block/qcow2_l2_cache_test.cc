// Slices that change: pins, stores, what is dirty, and bytes from the file that may be old.

#include <catch2/catch.hpp>

#include <array>
#include <random>
#include <thread>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/l1_table.h"
#include "block/formats/qcow2/l2_slice_cache.h"
#include "runtime/task_scope.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::block::qcow2;

namespace {

constexpr uint32_t kSlice = 512;
constexpr uint32_t kWords = kSlice / 8;
using Inserted = L2SliceCache::Inserted;

std::vector<uint8_t> filled(uint64_t value) {
    std::vector<uint8_t> out(kSlice);
    for (size_t i = 0; i < kSlice; i += 8) store_be64(out.data() + i, value);
    return out;
}

std::unique_ptr<L2SliceCache> make_cache(uint64_t slots) {
    auto cache = L2SliceCache::create(kSlice, slots);
    REQUIRE(cache);
    return std::move(*cache);
}

L2SliceCache::Pin pinned(L2SliceCache& cache, uint64_t slice, uint64_t value = 0) {
    L2SliceCache::Pin pin = cache.pin(slice);
    if (!pin) REQUIRE(cache.insert_and_pin(slice, filled(value).data(), cache.ticket(slice), pin) == Inserted::kPinned);
    return pin;
}

void store(L2SliceCache::Pin& pin, uint32_t index, uint64_t value) { pin.store(index, std::array{value}); }

uint64_t word(L2SliceCache& cache, uint64_t slice, uint32_t index) {
    const auto view = cache.find(slice);
    REQUIRE(view);
    const uint64_t value = view->word(index);
    REQUIRE(view->still_valid());
    return value;
}

void write_out(L2SliceCache& cache) {
    const auto taken = cache.take_dirty();
    cache.written(taken.slices);
}

Task<void> pin_when_there_is_room(L2SliceCache* cache, uint64_t slice, int* tries, bool* done) {
    L2SliceCache::RoomWish wish(*cache);
    L2SliceCache::Pin pin;
    for (;;) {
        ++*tries;
        const auto bytes = filled(slice);
        const auto got = cache->insert_and_pin(slice, bytes.data(), cache->ticket(slice), pin);
        if (got == Inserted::kPinned) break;
        co_await wish.made();
    }
    *done = true;
}

Task<void> wait_for_a_place(L2SliceCache* cache, std::vector<L2SliceCache::Pin>* pins, int* tries, bool* done) {
    TaskScope scope;
    scope.spawn(pin_when_there_is_room(cache, 100 * cache->slots(), tries, done));
    const bool waited = !*done;
    pins->front().release();
    co_await scope.join();
    *done = *done && waited;
}

}  // namespace

TEST_CASE("qcow2: a pinned slice stays, and a set full of pins takes nothing more", "[qcow2][cache]") {
    auto cache = make_cache(8);
    std::vector<L2SliceCache::Pin> pins;
    for (uint64_t s = 0; s < 8; s++) pins.push_back(pinned(*cache, s, s + 1));
    for (uint64_t s = 8; s < 40; s++) cache->insert(s, filled(s).data());
    cache->clean();
    cache->clean();
    for (uint64_t s = 0; s < 8; s++) {
        CHECK(word(*cache, s, 5) == s + 1);
        CHECK(pins[s].slice() == s);
        CHECK(pins[s].word(63) == s + 1);
    }
    L2SliceCache::Pin late;
    CHECK(cache->insert_and_pin(9, filled(9).data(), cache->ticket(9), late) == Inserted::kFull);
    CHECK_FALSE(late);

    int tries = 0;
    bool done = false;
    test::TestRuntime rt;
    rt.run(wait_for_a_place(cache.get(), &pins, &tries, &done));
    CHECK(done);
    CHECK(tries == 2);
    CHECK(word(*cache, 100 * cache->slots(), 0) == 100 * cache->slots());
    CHECK_FALSE(cache->find(0));
}

TEST_CASE("qcow2: a store is seen by readers and taken once", "[qcow2][cache]") {
    auto cache = make_cache(8);
    auto pin = pinned(*cache, 3, 7);
    const auto before = cache->find(3);
    const std::array<uint64_t, 2> words{11, 12};
    pin.store(kWords - 2, words);
    CHECK_FALSE(before->still_valid());
    CHECK(word(*cache, 3, kWords - 1) == 12);
    CHECK(word(*cache, 3, 0) == 7);
    store(pin, 0, 1);
    CHECK(cache->dirty_count() == 1);

    auto taken = cache->take_dirty();
    REQUIRE(taken.slices.size() == 1);
    CHECK(taken.slices[0].slice == 3);
    CHECK(load_be64(taken.slices[0].bytes) == 1);
    CHECK(load_be64(taken.slices[0].bytes + kSlice - 8) == 12);
    CHECK(cache->dirty_count() == 0);

    SECTION("a change meanwhile makes it dirty again") {
        store(pin, 1, 2);
        CHECK(load_be64(taken.slices[0].bytes + 8) == 7);  // what was taken is what it was
        cache->written(taken.slices);
        CHECK(cache->dirty_count() == 1);
        taken = cache->take_dirty();
        CHECK(load_be64(taken.slices[0].bytes + 8) == 2);
        cache->written(taken.slices);
    }
    SECTION("a failed write makes it dirty again, changed meanwhile or not") {
        if (GENERATE(false, true)) store(pin, 1, 2);
        cache->write_failed(taken.slices);
        CHECK(cache->dirty_count() == 1);
        taken = cache->take_dirty();
        CHECK(taken.slices.size() == 1);
        cache->written(taken.slices);
    }
    SECTION("written") { cache->written(taken.slices); }
    CHECK(cache->dirty_count() == 0);
    CHECK(cache->take_dirty().slices.empty());
}

TEST_CASE("qcow2: slices that are dirty or being written are not evicted", "[qcow2][cache]") {
    auto cache = make_cache(8);
    for (uint64_t s = 0; s < 8; s++) {
        auto pin = pinned(*cache, s);
        store(pin, 0, s + 100);
    }
    const auto crowd = [&] {
        for (uint64_t s = 8; s < 64; s++) cache->insert(s, filled(0).data());
        cache->clean();
        cache->clean();
    };
    crowd();
    const auto taken = cache->take_dirty();
    crowd();
    for (uint64_t s = 0; s < 8; s++) CHECK(word(*cache, s, 0) == s + 100);
    CHECK(cache->resident() == 8);
    cache->written(taken.slices);
    crowd();
    CHECK_FALSE(cache->find(0));
}

TEST_CASE("qcow2: bytes read before a change do not come back", "[qcow2][cache]") {
    auto cache = make_cache(8);
    const auto old = filled(1);
    const L2SliceCache::Ticket before = cache->ticket(3);  // and the file is read now
    SECTION("while the slice is here, they are not what it says") {
        CHECK(cache->insert(3, old.data(), before));
        auto pin = pinned(*cache, 3);
        store(pin, 0, 2);
        CHECK_FALSE(cache->insert(3, old.data(), before));
        CHECK(word(*cache, 3, 0) == 2);
        write_out(*cache);
    }
    SECTION("after it was changed, written and dropped, they are refused") {
        {
            auto pin = pinned(*cache, 3, 1);
            store(pin, 0, 2);
        }
        write_out(*cache);
        cache->invalidate(3);
        CHECK_FALSE(cache->insert(3, old.data(), before));
        CHECK_FALSE(cache->find(3));
        L2SliceCache::Pin pin;
        CHECK(cache->insert_and_pin(3, old.data(), before, pin) == Inserted::kStale);
        CHECK_FALSE(pin);
        CHECK(cache->insert(3, filled(2).data(), cache->ticket(3)));
        CHECK(word(*cache, 3, 5) == 2);
    }
    SECTION("the same when the ticket was taken while the changed slice was here") {
        L2SliceCache::Ticket during;
        {
            auto pin = pinned(*cache, 3, 1);
            store(pin, 0, 2);
            during = cache->ticket(3);
        }
        write_out(*cache);
        for (uint64_t s = 8; s < 64; s++) cache->insert(s, filled(0).data());
        REQUIRE_FALSE(cache->find(3));
        CHECK_FALSE(cache->insert(3, old.data(), during));
    }
    SECTION("nor after everything was dropped") {
        cache->drop_all();
        CHECK_FALSE(cache->insert(3, old.data(), before));
    }
    SECTION("what only came and went is no reason") {
        cache->insert(3, old.data());
        cache->invalidate(3);
        CHECK(cache->insert(3, old.data(), before));
        CHECK(word(*cache, 3, 0) == 1);
    }
}

TEST_CASE("qcow2: concurrent stores, write-backs, evictions and readers agree", "[qcow2][cache]") {
    // A "file" of slices: pairs of equal words that only grow. Nobody may see a pair torn or going back.
    constexpr uint64_t kSlices = 40;
    constexpr unsigned kWriters = 2, kRounds = 6000;
    auto cache = make_cache(16);
    struct File {
        std::mutex mutex;
        std::vector<std::vector<uint8_t>> slices = std::vector<std::vector<uint8_t>>(kSlices, filled(0));
        std::vector<uint8_t> read(uint64_t s) {
            std::lock_guard lock(mutex);
            return slices[s];
        }
    } file;
    // Written to the file before the change is acknowledged here.
    std::vector<std::atomic<uint64_t>> acknowledged(kSlices);
    std::atomic<uint64_t> torn{0}, stale{0}, reads{0}, write_backs{0};
    std::atomic<unsigned> writing{kWriters};
    std::mutex write_back_mutex;
    const auto write_back = [&] {
        std::lock_guard lock(write_back_mutex);
        const auto taken = cache->take_dirty();
        if (write_backs.fetch_add(1) % 7 == 0) {
            cache->write_failed(taken.slices);
            return;
        }
        for (const auto& dirty : taken.slices) {
            std::lock_guard file_lock(file.mutex);
            file.slices[dirty.slice].assign(dirty.bytes, dirty.bytes + kSlice);
        }
        cache->written(taken.slices);
    };
    std::vector<std::thread> threads;
    for (unsigned w = 0; w < kWriters; w++) {
        threads.emplace_back([&, w] {
            std::mt19937_64 random(w);
            for (unsigned round = 0; round < kRounds; round++) {
                const uint64_t s = random() % (kSlices / kWriters) * kWriters + w;  // claims: one writer a slice
                L2SliceCache::Pin pin = cache->pin(s);
                while (!pin) {
                    const auto ticket = cache->ticket(s);
                    const auto bytes = file.read(s);
                    if (cache->insert_and_pin(s, bytes.data(), ticket, pin) == Inserted::kFull) write_back();
                }
                const uint64_t next = pin.word(0) + 1;
                pin.store(0, std::array<uint64_t, 3>{next, next, next});
                acknowledged[s].store(next);
                if (round % 64 == 0) write_back();
            }
            writing.fetch_sub(1);
        });
    }
    for (unsigned r = 0; r < 2; r++) {
        threads.emplace_back([&, r] {
            std::mt19937_64 random(100 + r);
            while (writing.load() != 0 || reads.load() < 1000) {
                const uint64_t s = random() % kSlices;
                const uint64_t least = acknowledged[s].load();
                uint64_t a = 0, b = 0;
                for (;;) {
                    if (const auto view = cache->find(s)) {
                        a = view->word(0);
                        b = view->word(2);
                        if (view->still_valid()) break;
                        continue;
                    }
                    const auto ticket = cache->ticket(s);
                    const auto bytes = file.read(s);
                    a = load_be64(bytes.data());
                    b = load_be64(bytes.data() + 16);
                    if (cache->insert(s, bytes.data(), ticket)) break;
                }
                reads.fetch_add(1);
                if (a != b) torn.fetch_add(1);
                if (a < least) stale.fetch_add(1);
            }
        });
    }
    threads.emplace_back([&] {
        while (writing.load() != 0) {
            cache->clean();
            std::this_thread::yield();
        }
    });
    for (auto& thread : threads) thread.join();
    while (cache->dirty_count() != 0) write_back();
    CHECK(torn.load() == 0);
    CHECK(stale.load() == 0);
    uint64_t sum = 0;
    for (uint64_t s = 0; s < kSlices; s++) {
        CHECK(load_be64(file.read(s).data()) == acknowledged[s].load());
        sum += acknowledged[s].load();
    }
    CHECK(sum == kWriters * kRounds);
}

TEST_CASE("qcow2: the L1 table in memory tells what changed", "[qcow2][cache]") {
    L1Table l1;
    l1.assign(std::vector<uint64_t>{5, 0, 7}, 6);
    CHECK(l1.size() == 6);
    CHECK(l1.get(2) == 7);
    CHECK(l1.get(5) == 0);
    CHECK(l1.get(6) == 0);
    CHECK_FALSE(l1.changed());
    l1.set(4, 1);
    l1.set(1, 2);
    l1.set(4, 3);
    using Changes = std::vector<std::pair<uint64_t, uint64_t>>;
    CHECK(l1.take_changes() == Changes{{1, 2}, {4, 3}});
    CHECK_FALSE(l1.changed());
    l1.mark_changed(4);
    l1.set(4, 9);
    CHECK(l1.take_changes() == Changes{{4, 9}});
}
