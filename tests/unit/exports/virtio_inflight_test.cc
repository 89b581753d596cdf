// Inflight regions: a process may be killed between any two instructions, and the one after it goes on.

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cstring>
#include <map>
#include <random>

#include "exports/virtio/inflight.h"
#include "exports/virtio/ring.h"
#include "exports/virtio/shared.h"
#include "tests/support/single_step.h"
#include "tests/support/virtio_driver.h"

using namespace gantry;
using namespace gantry::virtio;
using gantry::test::Driver;
using gantry::test::Guest;
using gantry::test::Piece;

namespace {

/// Of the device that is killed at each instruction; sanitizers make more of them.
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define GANTRY_SANITIZED
#endif
#endif
#ifdef GANTRY_SANITIZED
constexpr uint32_t kTurns = 4;
#else
constexpr uint32_t kTurns = 10;
#endif

constexpr uint64_t kRam = 0x10000;
constexpr uint64_t kData = kRam + 6144;  // the first buffer

std::unique_ptr<Inflight> inflight_of(const std::shared_ptr<InflightFile>& file) {
    return std::make_unique<Inflight>(Inflight{file, file->region(0), file->queue_size()});
}

/// A guest, its ring and its region, all of which a back end may be killed over, and what the driver remembers.
struct World {
    explicit World(RingShape shape) : guest({{kRam, 8192}}), driver(Driver::create(guest, shape)) {
        auto made = InflightFile::create(1, static_cast<uint16_t>(shape.size), shape.packed);
        REQUIRE(made.has_value());
        file = std::move(*made);
    }
    /// As it is now, with memory of its own.
    World(const World& other)
        : guest(other.guest), driver(other.driver->clone(guest)), chains(other.chains), added(other.added) {
        auto made = InflightFile::create(1, other.file->queue_size(), other.file->packed());
        REQUIRE(made.has_value());
        file = std::move(*made);
        std::memcpy(file->mapping()->data(), other.file->mapping()->data(), file->size());
    }

    /// What the driver finds is its own; then it adds chains of 1..`most` pieces until the ring is full or there are
    /// `count`.
    void drive(std::mt19937& random, uint32_t count, uint32_t most) {
        for (const Used& one : driver->reap()) REQUIRE(chains.erase(one.id) == 1);
        for (uint32_t i = 0; i < count; i++) {
            std::vector<Piece> pieces;
            for (uint32_t n = static_cast<uint32_t>(random() % most) + 1; n-- > 0;)
                pieces.push_back({kData + added % 1500, static_cast<uint32_t>(random() % 50 + 1), true});
            const auto id = driver->add(pieces, random() % 4 ? Driver::Form::kDirect : Driver::Form::kIndirect);
            if (!id) break;
            chains[*id] = added++;
        }
        driver->kick();
    }

    Guest guest;
    std::unique_ptr<Driver> driver;
    std::shared_ptr<InflightFile> file;
    std::map<uint16_t, uint64_t> chains;  // outstanding: number by id
    uint64_t added = 0;
};

/// Takes what there is, of which `seen` says the numbers.
void take_all(Ring& ring, World& world, std::vector<Used>& taken, std::vector<uint64_t>& seen) {
    AddressSpace space = world.guest.space();
    Chain chain;
    Take take;
    while ((take = ring.take(chain, space)) == Take::kChain) {
        const auto found = world.chains.find(chain.id);
        REQUIRE(found != world.chains.end());
        REQUIRE(chain.parts[0].iov_base == world.guest.at(kData + found->second % 1500));
        seen.push_back(found->second);
        taken.push_back({.id = chain.id, .slots = chain.slots, .length = 1});
    }
    REQUIRE(ring.fault() == "");
    REQUIRE(take == Take::kNothing);
}

/// The process is killed now: the next one finds all that is unanswered, in order and once, and the ring lives on.
void go_on_after_kill(const World& killed, uint32_t seed) {
    std::mt19937 random(seed);
    World world(killed);
    auto ring = Ring::create(world.driver->shape(), world.driver->place(), 0x1234, inflight_of(world.file));
    REQUIRE((ring ? "" : ring.error().message()) == "");
    std::vector<Used> taken;
    std::vector<uint64_t> seen;
    // What was published and the driver has not seen yet.
    for (const Used& one : world.driver->reap()) REQUIRE(world.chains.erase(one.id) == 1);
    take_all(**ring, world, taken, seen);
    std::vector<uint64_t> expected;
    for (const auto& [id, number] : world.chains) expected.push_back(number);
    std::ranges::sort(expected);
    REQUIRE(seen == expected);
    for (int lap = 0; lap < 4; lap++) {
        std::ranges::shuffle(taken, random);
        while (!taken.empty()) {
            const size_t batch = std::min<size_t>(random() % 3 + 1, taken.size());
            (*ring)->publish(std::span(taken).first(batch));
            taken.erase(taken.begin(), taken.begin() + static_cast<ptrdiff_t>(batch));
            world.drive(random, lap < 3 ? 2 : 0, 3);
        }
        if (lap == 3) break;
        take_all(**ring, world, taken, seen);
    }
    REQUIRE(world.driver->outstanding() == 0);
    REQUIRE(world.chains.empty());
}

}  // namespace

TEST_CASE("virtio inflight: a kill at any instruction loses and repeats nothing", "[virtio][inflight][once]") {
    const bool packed = GENERATE(false, true);
    const uint32_t size = packed ? 5 : 4;
    CAPTURE(packed);
    World world({.size = size, .packed = packed, .indirect = true});
    // The child counts its turns where we see it, and at each the driver does something.
    UniqueFd fd(::memfd_create("turn", 0));
    REQUIRE(::ftruncate(fd.get(), 4096) == 0);
    auto turns = Mapping::create(fd.get(), 0, 4096);
    REQUIRE(turns.has_value());
    std::byte* const turn = (*turns)->data();

    const auto device = [&] {
        auto ring = Ring::create(world.driver->shape(), world.driver->place(), world.driver->first_base(),
                                 inflight_of(world.file));
        if (!ring) return false;
        AddressSpace space = world.guest.space();
        Chain chain;
        chain.parts.reserve(16);
        std::array<Used, 8> taken;
        size_t count = 0;
        gantry::test::step_from_here();
        for (uint32_t i = 1; i <= kTurns; i++) {
            store<uint32_t>(turn, i);
            while (count < taken.size() && (*ring)->take(chain, space) == Take::kChain)
                taken[count++] = {.id = chain.id, .slots = chain.slots, .length = 1};
            if ((*ring)->is_broken()) return false;
            // Mostly several, not always all of them, the last ones first.
            const size_t batch = count < 2 ? count : 2 - i % 2 + (i % 5 == 0 && count > 2);
            (*ring)->publish(std::span(taken).subspan(count - batch, batch));
            count -= batch;
        }
        return true;
    };
    // All of the guest's memory but its buffers, and the region.
    const std::byte* const ram = world.guest.at(kRam, kData - kRam);
    const std::byte* const region = world.file->mapping()->data();
    std::vector<std::byte> before(kData - kRam + world.file->size());
    const auto changed = [&] {
        std::byte* const second = before.data() + (kData - kRam);
        if (std::memcmp(before.data(), ram, kData - kRam) == 0 && std::memcmp(second, region, world.file->size()) == 0)
            return false;
        std::memcpy(before.data(), ram, kData - kRam);
        std::memcpy(second, region, world.file->size());
        return true;
    };
    uint32_t turn_before = 0, states = 0;
    uint64_t steps = 0;
    std::mt19937 random(7 + packed);
    const auto look = [&] {
        ++steps;
        if (const auto now = load<uint32_t>(turn); now != turn_before) {
            turn_before = now;
            world.drive(random, 3, now % 3 == 0 ? size : 2);
        }
        if (!changed()) return;
        ++states;
        go_on_after_kill(world, states);
    };
    const std::string end = gantry::test::single_step(device, look);
    if (end == "no ptrace") {
        WARN("skipped: this environment does not allow ptrace");
        return;
    }
    CHECK(end == "");
    CHECK(turn_before == kTurns);
    CHECK(states > 10 * kTurns);
    CHECK(world.added > kTurns);
    CHECK(steps > states);
}

TEST_CASE("virtio inflight: a process killed while it recovers is no harm", "[virtio][inflight][once]") {
    const bool packed = GENERATE(false, true);
    const uint32_t size = packed ? 5 : 4;
    CAPTURE(packed);
    World world({.size = size, .packed = packed, .indirect = true});
    std::mt19937 random(1);
    // Killed right before it ends a batch: found by stepping until the driver sees the first used chain.
    UniqueFd fd(::memfd_create("stop", 0));
    REQUIRE(::ftruncate(fd.get(), 4096) == 0);
    world.drive(random, 4, 1);
    std::unique_ptr<World> middle;
    const auto device = [&] {
        auto ring = Ring::create(world.driver->shape(), world.driver->place(), world.driver->first_base(),
                                 inflight_of(world.file));
        AddressSpace space = world.guest.space();
        Chain chain;
        std::vector<Used> taken;
        while ((*ring)->take(chain, space) == Take::kChain)
            taken.push_back({.id = chain.id, .slots = chain.slots, .length = 1});
        gantry::test::step_from_here();
        (*ring)->publish(std::span(taken).subspan(1, 2));
        return true;
    };
    std::string end = gantry::test::single_step(device, [&] {
        if (middle) return;
        World copy(world);
        if (!copy.driver->reap().empty()) middle = std::make_unique<World>(world);
    });
    if (end == "no ptrace") {
        WARN("skipped: this environment does not allow ptrace");
        return;
    }
    REQUIRE(end == "");
    REQUIRE(middle);
    uint32_t states = 0;
    std::vector<std::byte> before(middle->file->size());
    end = gantry::test::single_step(
        [&] {
            gantry::test::step_from_here();
            return Ring::create(middle->driver->shape(), middle->driver->place(), 0, inflight_of(middle->file))
                .has_value();
        },
        [&] {
            if (std::memcmp(before.data(), middle->file->mapping()->data(), before.size()) == 0) return;
            std::memcpy(before.data(), middle->file->mapping()->data(), before.size());
            go_on_after_kill(*middle, ++states);
        });
    CHECK(end == "");
    CHECK(states > 2);
}

TEST_CASE("virtio inflight: a new region begins where the ring is", "[virtio][inflight][once]") {
    const bool packed = GENERATE(false, true);
    CAPTURE(packed);
    World world({.size = 4, .packed = packed, .indirect = true});
    std::mt19937 random(3);
    uint32_t base = world.driver->first_base();
    // Some laps without a record first.
    for (int i = 0; i < 11; i++) {
        auto ring = Ring::create(world.driver->shape(), world.driver->place(), base, nullptr);
        REQUIRE(ring.has_value());
        world.drive(random, 1, 1);
        std::vector<Used> taken;
        std::vector<uint64_t> seen;
        take_all(**ring, world, taken, seen);
        REQUIRE(taken.size() == 1);
        (*ring)->publish(taken);
        base = (*ring)->base();
    }
    world.drive(random, 2, 1);
    {
        auto ring = Ring::create(world.driver->shape(), world.driver->place(), base, inflight_of(world.file));
        REQUIRE(ring.has_value());
        std::vector<Used> taken;
        std::vector<uint64_t> seen;
        take_all(**ring, world, taken, seen);
        CHECK(taken.size() == 2);
    }
    go_on_after_kill(world, 1);
    // The driver begins anew, and so does its region.
    world.file->forget(0);
    World fresh({.size = 4, .packed = packed, .indirect = true});
    fresh.file = world.file;
    auto ring =
        Ring::create(fresh.driver->shape(), fresh.driver->place(), fresh.driver->first_base(), inflight_of(fresh.file));
    REQUIRE(ring.has_value());
    CHECK((*ring)->base() == fresh.driver->first_base());
    CHECK_FALSE((*ring)->has_more());
}

TEST_CASE("virtio inflight: a file is as long as it says", "[virtio][inflight][once]") {
    const auto made = [](uint16_t queues, uint16_t size, bool packed) {
        auto file = InflightFile::create(queues, size, packed);
        return file ? "" : file.error().message();
    };
    CHECK(made(0, 16, false) == "an inflight region for no queues");
    CHECK(made(1, 0, false) == "an inflight region for queues of 0 descriptors; 1 to 1024 are possible");
    CHECK(made(1, 1025, true) == "an inflight region for queues of 1025 descriptors; 1 to 1024 are possible");
    CHECK(made(UINT16_MAX, 1024, true) == "");
    auto file = InflightFile::create(3, 16, false);
    REQUIRE(file.has_value());
    CHECK((*file)->size() == 3 * 320);
    CHECK((*file)->region(1) == (*file)->region(0) + 320);
    CHECK((*file)->region(3) == nullptr);
    CHECK(::ftruncate((*file)->fd(), 64) != 0);  // sealed
    const auto adopted = [&](uint64_t offset, uint64_t size, uint16_t queues, uint16_t queue_size, bool packed) {
        auto same = InflightFile::adopt(UniqueFd(::dup((*file)->fd())), offset, size, queues, queue_size, packed);
        return same ? "" : same.error().message();
    };
    CHECK(adopted(0, 960, 3, 16, false) == "");
    CHECK(adopted(0, 959, 3, 16, false) == "an inflight region of 959 bytes; 3 queues of 16 descriptors need 960");
    CHECK(adopted(64, 640, 2, 16, false) == "");
    CHECK(adopted(8, 640, 2, 16, false) == "an inflight region at offset 8, which is no multiple of 64");
    CHECK(adopted(64, 960, 3, 16, false).find("mapping the inflight region: the file of shared memory has 960 bytes") ==
          0);
    CHECK(adopted(0, 960, 3, 16, true) == "an inflight region of 960 bytes; 3 queues of 16 descriptors need 1728");
    CHECK(adopted(0, UINT64_MAX, 1, 16, true).find("mapping the inflight region") == 0);
}

TEST_CASE("virtio inflight: what a region says is not trusted", "[virtio][inflight][once]") {
    const bool packed = GENERATE(false, true);
    CAPTURE(packed);
    World world({.size = 4, .packed = packed, .indirect = true});
    std::byte* const region = world.file->region(0);
    const uint64_t header = packed ? 32 : 16, bytes = packed ? 32 : 16;
    const auto entry = [&](size_t i) { return region + header + bytes * i; };
    const auto create = [&] {
        auto ring = Ring::create(world.driver->shape(), world.driver->place(), world.driver->first_base(),
                                 inflight_of(world.file));
        return ring ? "" : ring.error().message();
    };
    std::mt19937 random(5);
    world.drive(random, 4, 1);
    {
        auto ring = Ring::create(world.driver->shape(), world.driver->place(), world.driver->first_base(),
                                 inflight_of(world.file));
        REQUIRE(ring.has_value());
        std::vector<Used> taken;
        std::vector<uint64_t> seen;
        take_all(**ring, world, taken, seen);
        REQUIRE(taken.size() == 4);
        (*ring)->publish(std::span(taken).first(1));
    }
    CHECK(create() == "");
    SECTION("version") {
        store<uint16_t>(region + 8, 2);
        CHECK(create() == "the inflight region has version 2; 1 is known");
    }
    SECTION("size") {
        store<uint16_t>(region + 10, 5);
        CHECK(create() == "the inflight region says that it is for 5 descriptors, not 4");
    }
    SECTION("of another ring") {
        auto big = InflightFile::create(1, 8, packed);
        REQUIRE(big.has_value());
        auto small = InflightFile::create(1, 2, packed);
        REQUIRE(small.has_value());
        auto ring =
            Ring::create(world.driver->shape(), world.driver->place(), world.driver->first_base(), inflight_of(*small));
        REQUIRE_FALSE(ring.has_value());
        CHECK(ring.error().message() == "the inflight region has room for 2 descriptors, and the ring has 4");
        ring =
            Ring::create(world.driver->shape(), world.driver->place(), world.driver->first_base(), inflight_of(*big));
        REQUIRE(ring.has_value());
    }
    SECTION("places") {
        if (packed) {
            store<uint16_t>(region + 18, 4);
            CHECK(create() == "the inflight region knows slots 1 and 4 of a ring that has 4");
        } else {
            store<uint16_t>(region + 14, 100);
            CHECK(create() == "the inflight region knows used index 100 of a ring that is at 1");
            // With nothing in flight that is no contradiction: the driver has begun anew.
            for (size_t i = 0; i < 4; i++) store<uint8_t>(entry(i), 0);
            CHECK(create() == "");
        }
    }
    SECTION("links") {
        if (packed) {
            const auto free = load<uint16_t>(region + 12);
            store<uint16_t>(entry(free) + 2, free);
            CHECK(create() == "the free list of the inflight region is a loop");
            store<uint16_t>(entry(free) + 2, 4);
            const size_t other = (free + 1) % 4;
            store<uint16_t>(entry(other) + 6, 2);
            CHECK(create().find(fmt::format("the inflight region has a chain at {} that", other)) == 0);
            store<uint16_t>(entry(other) + 6, 1);
            store<uint16_t>(entry(other) + 4, 9);
            CHECK(create() ==
                  fmt::format("the inflight region has a chain at {} that ends at {}, not at 9", other, other));
            store<uint16_t>(entry(other) + 4, static_cast<uint16_t>(other));
            store<uint16_t>(entry(other) + 16, load<uint16_t>(entry((other + 1) % 4) + 16));
            CHECK(create().find("the inflight region has buffer") == 0);
            store<uint8_t>(entry(other), 0);
            CHECK(create() == "the inflight region has lost 1 of 4 descriptors");
        } else {
            store<uint16_t>(region + 14, 0);  // as if killed before the batch was ended
            store<uint16_t>(region + 12, 4);
            CHECK(create() == "the inflight region links to descriptor 4 of 4");
        }
    }
    SECTION("anything at all") {
        uint32_t made = 0;
        const std::vector<std::byte> saved(region, region + header + 4 * bytes);
        std::byte* const ram = world.guest.at(kRam, 8192);
        const std::vector<std::byte> saved_ram(ram, ram + 8192);
        for (int i = 0; i < 20'000; i++) {
            std::memcpy(region, saved.data(), saved.size());
            std::memcpy(ram, saved_ram.data(), saved_ram.size());
            for (int n = 0; n < 3; n++)
                region[8 + random() % (saved.size() - 8)] =
                    static_cast<std::byte>(random() % 3 ? random() % 6 : random());
            auto ring = Ring::create(world.driver->shape(), world.driver->place(), 0x80008000 * packed,
                                     inflight_of(world.file));
            if (!ring) continue;
            ++made;
            AddressSpace space = world.guest.space();
            Chain chain;
            std::vector<Used> taken;
            while ((*ring)->take(chain, space) == Take::kChain && taken.size() <= 4)
                taken.push_back({.id = chain.id, .slots = chain.slots, .length = 1});
            REQUIRE(taken.size() <= 4);
            // Whatever the driver finds: nothing but the ring and the region is written.
            (*ring)->publish(taken);
        }
        CHECK(made > 1000);
    }
}
