// Rings, split and packed: what a well-behaved driver and ours tell each other.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <map>
#include <random>
#include <thread>

#include "exports/virtio/ring.h"
#include "exports/virtio/shared.h"
#include "tests/support/virtio_driver.h"

using namespace gantry;
using namespace gantry::virtio;
using gantry::test::Driver;
using gantry::test::Guest;
using gantry::test::Piece;

namespace {

RingShape shape_of(bool packed, bool event_idx = false, uint32_t size = 16) {
    return {.size = size, .packed = packed, .event_idx = event_idx, .indirect = true};
}

std::unique_ptr<Ring> ring_of(const Driver& driver) {
    auto ring = Ring::create(driver.shape(), driver.place(), driver.first_base(), nullptr);
    REQUIRE(ring.has_value());
    return std::move(*ring);
}

Used used(const Chain& chain, uint32_t length = 0) { return {.id = chain.id, .slots = chain.slots, .length = length}; }

bool publish(Ring& ring, const Chain& chain, uint32_t length = 0) {
    const Used one = used(chain, length);
    return ring.publish(std::span(&one, 1));
}

}  // namespace

TEST_CASE("virtio ring: a chain is found where the guest has it", "[virtio][ring][once]") {
    const bool packed = GENERATE(false, true);
    const auto form = GENERATE(Driver::Form::kDirect, Driver::Form::kIndirect, Driver::Form::kMixed);
    CAPTURE(packed, static_cast<int>(form));
    Guest guest;
    const auto driver = Driver::create(guest, shape_of(packed));
    const auto ring = ring_of(*driver);
    AddressSpace space = guest.space();
    Chain chain;
    CHECK_FALSE(ring->has_more());
    CHECK(ring->take(chain, space) == Take::kNothing);

    // The second one lies across the border of two regions.
    const Piece pieces[] = {
        {0x100040, 16, false}, {Guest::kBorder - 100, 512, false}, {0x180000, 4096, true}, {0x190003, 1, true}};
    const auto id = driver->add(pieces, form);
    REQUIRE(id);
    driver->kick();
    CHECK(ring->has_more());
    REQUIRE(ring->take(chain, space) == Take::kChain);
    CHECK(chain.id == *id);
    CHECK(chain.slots == (!packed ? 0 : form == Driver::Form::kDirect ? 4 : form == Driver::Form::kIndirect ? 1 : 2));
    CHECK(chain.readable == 3);
    CHECK(chain.readable_bytes == 528);
    CHECK(chain.writable_bytes == 4097);
    REQUIRE(chain.parts.size() == 5);
    CHECK(chain.parts[0].iov_base == guest.at(0x100040));
    CHECK(chain.parts[1].iov_base == guest.at(Guest::kBorder - 100));
    CHECK(chain.parts[1].iov_len == 100);
    CHECK(chain.parts[2].iov_base == guest.at(Guest::kBorder));
    CHECK(chain.parts[2].iov_len == 412);
    CHECK(chain.parts[3].iov_base == guest.at(0x180000));
    CHECK(chain.parts[4].iov_base == guest.at(0x190003));
    CHECK_FALSE(ring->has_more());
    CHECK(driver->reap().empty());

    publish(*ring, chain, 4097);
    const auto done = driver->reap();
    REQUIRE(done.size() == 1);
    CHECK(done[0].id == *id);
    CHECK(done[0].length == 4097);
}

TEST_CASE("virtio ring: chains are used in any order, lap after lap", "[virtio][ring][once]") {
    const bool packed = GENERATE(false, true);
    const bool event_idx = GENERATE(false, true);
    // A size that is no power of two is for packed rings.
    const uint32_t size = GENERATE(2U, 5U, 16U, 256U);
    if (!packed && size == 5) return;
    CAPTURE(packed, event_idx, size);
    std::mt19937 random(size * 4 + packed * 2 + event_idx);
    const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
    Guest guest;
    const auto driver = Driver::create(guest, shape_of(packed, event_idx, size));
    auto ring = ring_of(*driver);
    AddressSpace space = guest.space();
    std::map<uint16_t, std::vector<Piece>> shown;  // what the device has not taken, by id
    std::map<uint16_t, uint32_t> answers;          // what the driver will find
    std::vector<uint16_t> order;                   // in which they were added
    size_t order_next = 0;
    std::vector<Used> taken;
    uint64_t published = 0, reaped = 0, wanted = 0, total = 0;  // slots of a packed ring, chains of a split one
    bool first = true, wants = true;
    const auto units = [&](const Used& one) -> uint64_t { return packed ? one.slots : 1; };
    if (event_idx) driver->want_signal();

    for (int step = 0; step < 30'000; step++) {
        switch (below(4)) {
            case 0: {  // the driver adds some
                for (uint32_t n = below(4) + 1; n-- > 0;) {
                    std::vector<Piece> pieces;
                    const uint32_t readable = below(3), writable = below(3) + !readable;
                    for (uint32_t i = 0; i < readable + writable; i++)
                        pieces.push_back({0x100000 + 64 * below(20'000), below(60) + 1, i >= readable});
                    const auto id = driver->add(pieces, static_cast<Driver::Form>(below(3)));
                    if (!id) break;
                    shown[*id] = pieces;
                    order.push_back(*id);
                }
                driver->kick();
                break;
            }
            case 1: {  // the device takes some
                for (uint32_t n = below(6); n-- > 0;) {
                    Chain chain;
                    REQUIRE(ring->has_more() == (order_next < order.size()));
                    const Take take = ring->take(chain, space);
                    if (order_next == order.size()) {
                        REQUIRE(take == Take::kNothing);
                        break;
                    }
                    REQUIRE(ring->fault() == "");
                    REQUIRE(take == Take::kChain);
                    REQUIRE(chain.id == order[order_next++]);
                    const auto pieces = shown.extract(chain.id).mapped();
                    REQUIRE(chain.parts.size() == pieces.size());
                    for (size_t i = 0; i < pieces.size(); i++) {
                        REQUIRE(chain.parts[i].iov_base == guest.at(pieces[i].address));
                        REQUIRE(chain.parts[i].iov_len == pieces[i].length);
                        REQUIRE((i >= chain.readable) == pieces[i].writable);
                    }
                    taken.push_back(used(chain, below(3) ? static_cast<uint32_t>(random()) : 0));
                }
                break;
            }
            case 2: {  // it answers some
                std::ranges::shuffle(taken, random);
                std::vector<Used> done;
                for (uint32_t n = below(5); n-- > 0 && !taken.empty();) {
                    done.push_back(taken.back());
                    answers[taken.back().id] = taken.back().length;
                    taken.pop_back();
                }
                const uint64_t before = published;
                for (const Used& one : done) published += units(one);
                total += done.size();
                const bool tell = ring->publish(done);
                if (done.empty()) {
                    REQUIRE_FALSE(tell);
                } else if (!event_idx) {
                    REQUIRE(tell == wants);
                } else if (wants && before <= wanted && wanted < published) {
                    REQUIRE(tell);
                } else if (!first && wants && (!packed || published - std::min(wanted, published) <= size)) {
                    // (A place in a packed ring comes round with each lap.)
                    REQUIRE_FALSE(tell);
                }
                first = first && (done.empty() || !wants);
                break;
            }
            case 3: {  // the driver looks
                for (const Used& one : driver->reap()) {
                    reaped += units(one);
                    REQUIRE(answers.at(one.id) == one.length);
                    answers.erase(one.id);
                }
                REQUIRE(answers.empty());
                const auto skip = static_cast<uint16_t>(below(3) ? 0 : below(size));
                wants = below(4) != 0;
                wanted = reaped + (event_idx ? skip : 0);
                if (wants) {
                    driver->want_signal(skip);
                } else {
                    driver->want_no_signal();
                }
                break;
            }
        }
        if (taken.empty() && below(50) == 0) {  // another process goes on
            const uint32_t base = ring->base();
            auto next = Ring::create(driver->shape(), driver->place(), base, nullptr);
            REQUIRE(next.has_value());
            ring = std::move(*next);
            REQUIRE(ring->base() == base);
            first = true;
        }
    }
    CHECK(total > 2'000);
}

TEST_CASE("virtio ring: the driver's kicks are wanted when the device listens", "[virtio][ring][once]") {
    const bool packed = GENERATE(false, true);
    const bool event_idx = GENERATE(false, true);
    CAPTURE(packed, event_idx);
    Guest guest;
    const auto driver = Driver::create(guest, shape_of(packed, event_idx, 4));
    const auto ring = ring_of(*driver);
    AddressSpace space = guest.space();
    const Piece piece{0x100000, 512, true};
    Chain chain;
    // More than 2^16 chains, so that every index has come round.
    for (int i = 0; i < 70'000; i++) {
        ring->quiet();
        if (i % 3 == 0) {
            // Added before the device listens: it has to look itself.
            REQUIRE(driver->add(std::span(&piece, 1)));
            if (driver->kick()) REQUIRE((event_idx && !packed));  // what it listened for last may come round
            REQUIRE(ring->listen());
        } else {
            REQUIRE_FALSE(ring->listen());
            REQUIRE(driver->add(std::span(&piece, 1)));
            REQUIRE(driver->kick());
        }
        REQUIRE(ring->take(chain, space) == Take::kChain);
        publish(*ring, chain);
        REQUIRE(driver->reap().size() == 1);
    }
}

TEST_CASE("virtio ring: no signal and no kick is lost between two threads", "[virtio][ring][once]") {
    const bool packed = GENERATE(false, true);
    const bool event_idx = GENERATE(false, true);
    CAPTURE(packed, event_idx);
    Guest guest;
    const auto driver = Driver::create(guest, shape_of(packed, event_idx, 8));
    const auto ring = ring_of(*driver);
    constexpr uint64_t kChains = 20'000;
    std::atomic<uint64_t> kicks{0}, signals{0};
    std::atomic<bool> late{false};
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    const auto wait_for = [&](std::atomic<uint64_t>& events, uint64_t& seen) {
        while (events.load() == seen) {
            if (late || std::chrono::steady_clock::now() > deadline) {
                late = true;
                return false;
            }
            std::this_thread::yield();
        }
        seen = events.load();
        return true;
    };
    std::thread device([&] {
        AddressSpace space = guest.space();
        Chain chain;
        std::vector<Used> done;
        uint64_t seen = 0, answered = 0;
        while (answered < kChains && !late) {
            ring->quiet();
            done.clear();
            while (done.size() < 3 && ring->take(chain, space) == Take::kChain) done.push_back(used(chain, 7));
            answered += done.size();
            if (!done.empty() && ring->publish(done)) ++signals;
            if (!done.empty()) continue;
            if (ring->listen()) continue;
            if (!wait_for(kicks, seen)) return;
        }
    });
    uint64_t seen = 0, added = 0, finished = 0;
    const Piece piece{0x100000, 512, true};
    while (finished < kChains && !late) {
        driver->want_no_signal();
        while (added < kChains && driver->add(std::span(&piece, 1))) ++added;
        if (driver->kick()) ++kicks;
        uint64_t more = driver->reap().size();
        if (more == 0) {
            driver->want_signal();
            more = driver->reap().size();
            if (more == 0 && !wait_for(signals, seen)) break;
        }
        finished += more;
    }
    device.join();
    CHECK_FALSE(late);
    CHECK(ring->fault() == "");
    CHECK(finished == kChains);
}

TEST_CASE("virtio ring: what its place must be", "[virtio][ring][once]") {
    Guest guest;
    const auto driver = Driver::create(guest, shape_of(false));
    const RingPlace place = driver->place();
    const auto refused = [&](RingShape shape, RingPlace where, uint32_t base = 0) {
        const auto ring = Ring::create(shape, where, base, nullptr);
        return ring ? "" : ring.error().message();
    };
    const RingShape split{.size = 16}, packed{.size = 16, .packed = true};
    CHECK(refused(split, place) == "");
    CHECK(refused({.size = 1}, place) == "a ring of 1 descriptors; 2 to 1024 are possible");
    CHECK(refused({.size = 2048}, place) == "a ring of 2048 descriptors; 2 to 1024 are possible");
    CHECK(refused({.size = 12}, place) == "a split ring of 12 descriptors; its size must be a power of two");
    CHECK(refused({.size = 12, .packed = true}, place, 0x80008000) == "");
    const std::string misplaced = "an area of the ring is not aligned (descriptors 16, driver 2, device 4)";
    CHECK(refused(split, {place.descriptors + 8, place.driver, place.device}) == misplaced);
    CHECK(refused(split, {place.descriptors, place.driver + 1, place.device}) == misplaced);
    CHECK(refused(split, {place.descriptors, place.driver, place.device + 2}) == misplaced);
    CHECK(refused(split, {place.descriptors, nullptr, place.device}) == misplaced);
    CHECK(refused(split, place, 0x10000) == "0x10000 is no index of an available ring");
    // Packed: both halves, or the lower one alone.
    CHECK(refused(packed, place, 0x80058005) == "");
    CHECK(refused(packed, place, 0x8005) == "");
    CHECK(refused(packed, place, 0x00058005).find("has chains in flight, and nothing says which") != std::string::npos);
    CHECK(refused(packed, place, 0x80108010) == "0x80108010 names slots 16 and 16 of a packed ring of 16");
}

TEST_CASE("virtio ring: it goes on where its memory is found elsewhere", "[virtio][ring][once]") {
    const bool packed = GENERATE(false, true);
    CAPTURE(packed);
    Guest guest;
    const auto driver = Driver::create(guest, shape_of(packed));
    const auto ring = ring_of(*driver);
    AddressSpace space = guest.space();
    const Piece piece{0x100000, 512, true};
    Chain one, two;
    REQUIRE(driver->add(std::span(&piece, 1)));
    REQUIRE(driver->add(std::span(&piece, 1)));
    driver->kick();
    REQUIRE(ring->take(one, space) == Take::kChain);
    Guest copy(guest);
    const auto same = driver->clone(copy);
    ring->move(same->place());
    publish(*ring, one, 5);
    AddressSpace there = copy.space();
    REQUIRE(ring->take(two, there) == Take::kChain);
    CHECK(two.parts[0].iov_base == copy.at(0x100000));
    CHECK(driver->reap().empty());
    CHECK(same->reap().size() == 1);
}

TEST_CASE("virtio ring: what it writes to itself is logged", "[virtio][ring][once]") {
    const bool packed = GENERATE(false, true);
    CAPTURE(packed);
    Guest guest;
    const auto driver = Driver::create(guest, shape_of(packed));
    const auto ring = ring_of(*driver);
    AddressSpace space = guest.space();
    gantry::UniqueFd fd(::memfd_create("log", 0));
    REQUIRE(::ftruncate(fd.get(), 4096) == 0);
    auto log = DirtyLog::create(fd.get(), 0, 4096);
    auto look = Mapping::create(fd.get(), 0, 4096);
    REQUIRE((log.has_value() && look.has_value()));
    // The log says which pages of some address space; here the ring lies across pages 9 and 10.
    ring->set_log(*log, 10 * DirtyLog::kPage - 16);
    const Piece piece{0x100000, 512, true};
    Chain chain;
    REQUIRE(driver->add(std::span(&piece, 1)));
    REQUIRE(driver->add(std::span(&piece, 1)));
    driver->kick();
    REQUIRE(ring->take(chain, space) == Take::kChain);
    CHECK(load<uint8_t>((*look)->data() + 1) == 0);
    publish(*ring, chain);
    // Page 9: its first entry, and the index of a split ring.
    CHECK(load<uint8_t>((*look)->data()) == 0);
    CHECK(load<uint8_t>((*look)->data() + 1) == 1 << 1);
    REQUIRE(ring->take(chain, space) == Take::kChain);
    publish(*ring, chain);
    CHECK(load<uint8_t>((*look)->data() + 1) == (1 << 1 | 1 << 2));
    CHECK_FALSE((*log)->beyond());
    (*log)->mark(4096 * 8 * DirtyLog::kPage - 1, 1);
    CHECK_FALSE((*log)->beyond());
    CHECK(load<uint8_t>((*look)->data() + 4095) == 0x80);
    (*log)->mark(4096 * 8 * DirtyLog::kPage - 1, 2);
    CHECK((*log)->beyond());
    (*log)->mark(UINT64_MAX - 1, 100);
    ring->set_log(nullptr, 0);
}
