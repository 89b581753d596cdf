// Rings: what a hostile driver writes breaks its ring, with a sentence that says why, and nothing else.

#include <catch2/catch.hpp>
#include <cstring>

#include "exports/virtio/chain_reader.h"
#include "exports/virtio/ring.h"
#include "exports/virtio/shared.h"
#include "tests/support/virtio_driver.h"

using namespace gantry;
using namespace gantry::virtio;
using gantry::test::Driver;
using gantry::test::Guest;
using gantry::test::Piece;

namespace {

constexpr uint32_t kSize = 16;
const std::vector<Piece> kUsual{{0x100000, 16, false}, {0x101000, 512, true}, {0x102000, 1, true}};

/// One chain is in flight; the next one comes with `spoil`.
struct Case {
    explicit Case(bool packed, bool indirect = true)
        : driver(Driver::create(guest, {.size = kSize, .packed = packed, .indirect = indirect})), space(guest.space()) {
        auto made = Ring::create(driver->shape(), driver->place(), driver->first_base(), nullptr);
        REQUIRE(made.has_value());
        ring = std::move(*made);
        REQUIRE(driver->add(kUsual));
        driver->kick();
        REQUIRE(ring->take(before, space) == Take::kChain);
    }

    /// The sentence, once everything that goes with it holds.
    std::string fault() {
        Chain chain;
        REQUIRE(ring->has_more());
        const uint32_t base = ring->base();
        if (ring->take(chain, space) != Take::kBroken) return "taken";
        CHECK(ring->is_broken());
        CHECK_FALSE(ring->has_more());
        CHECK(ring->take(chain, space) == Take::kBroken);
        CHECK(ring->base() == base);
        const std::string text = ring->fault();
        ring->break_off("something else");
        CHECK(ring->fault() == text);
        // What was taken is still answered.
        const Used one{.id = before.id, .slots = before.slots, .length = 513};
        ring->publish(std::span(&one, 1));
        if (look) {
            const auto done = driver->reap();
            CHECK((done.size() == 1 && done[0].length == 513));
        }
        return text;
    }

    std::byte* descriptor(size_t i) { return guest.at(driver->descriptors() + 16 * i, 16); }

    Guest guest;
    std::unique_ptr<Driver> driver;
    AddressSpace space;
    std::unique_ptr<Ring> ring;
    Chain before;
    bool look = true;  // the driver is well enough to look at its ring
};

std::string fault_of(bool packed, std::vector<Piece> pieces, Driver::Form form = Driver::Form::kDirect,
                     bool indirect = true) {
    Case c(packed, indirect);
    REQUIRE(c.driver->add(pieces, form));
    c.driver->kick();
    return c.fault();
}

}  // namespace

TEST_CASE("virtio faults: buffers of either ring", "[virtio][fault][once]") {
    const bool packed = GENERATE(false, true);
    const auto form = GENERATE(Driver::Form::kDirect, Driver::Form::kIndirect, Driver::Form::kMixed);
    CAPTURE(packed, static_cast<int>(form));
    CHECK(fault_of(packed, {{0x100000, 0, false}, {0x101000, 1, true}}, form) ==
          "a descriptor at address 0x100000 has no bytes");
    CHECK(fault_of(packed, {{0x100000, 16, true}, {0x101000, 1, false}}, form) ==
          "the descriptor for address 0x101000 is readable and comes after a writable one");
    // Nowhere, beyond the end of a part that nothing follows, round the end of addresses.
    const uint64_t far = (uint64_t{1} << 32) + (1 << 20);
    for (const Piece& wrong :
         {Piece{0x1000, 512, true}, Piece{0xfffff, 2, true}, Piece{far, 1, true}, Piece{far - 511, 512, true},
          Piece{0x2fff00, 0x101, true}, Piece{UINT64_MAX - 0xfff, 0x2000, true}, Piece{0x100000, UINT32_MAX, true}}) {
        CHECK(fault_of(packed, {{0x100000, 16, false}, wrong}, form) ==
              fmt::format("a descriptor names {} bytes at address {:#x}, which are not in the guest's memory",
                          wrong.length, wrong.address));
    }
    CHECK(fault_of(packed, {{0x100000, 16, false}, {far - 512, 512, true}}, form) == "taken");
    CHECK(fault_of(packed, {{0x100000, 0x200000, true}}, form) == "taken");
    CHECK(fault_of(packed, {{0x100000, 16, false}, {0x101000, 1, true}}, Driver::Form::kIndirect, false) ==
          "an indirect descriptor, although the driver has not chosen that feature");
}

TEST_CASE("virtio faults: indirect descriptors", "[virtio][fault][once]") {
    const bool packed = GENERATE(false, true);
    CAPTURE(packed);
    Case c(packed);
    REQUIRE(c.driver->add(kUsual, Driver::Form::kIndirect));
    c.driver->kick();
    std::byte* const d = c.descriptor(3);  // the first three are in flight
    std::byte* const flags = d + (packed ? 14 : 12);
    const uint64_t table = load<uint64_t>(d);
    const auto length = [&](uint32_t bytes) { store<uint32_t>(d + 8, bytes); };
    const auto add_flags = [](std::byte* at, uint16_t more) {
        store<uint16_t>(at, static_cast<uint16_t>(load<uint16_t>(at) | more));
    };
    SECTION("WRITE means nothing") {
        add_flags(flags, kDescWrite);
        CHECK(c.fault() == "taken");
    }
    SECTION("nothing comes after") {
        add_flags(flags, kDescNext);
        CHECK(c.fault() == "an indirect descriptor is followed by another one");
    }
    SECTION("no bytes") {
        length(0);
        CHECK(c.fault() == "an indirect table has 0 bytes, which is no multiple of 16");
    }
    SECTION("half an entry") {
        length(40);
        CHECK(c.fault() == "an indirect table has 40 bytes, which is no multiple of 16");
    }
    SECTION("too long") {
        length(16 * 1025);
        CHECK(c.fault() == "an indirect table has 1025 descriptors; 1024 are possible");
    }
    SECTION("not there") {
        store<uint64_t>(d, 0x2fffe0);
        CHECK(c.fault() == "an indirect table of 48 bytes at address 0x2fffe0 is not in the guest's memory");
    }
    SECTION("in another one") {
        add_flags(c.guest.at(table + 16 + (packed ? 14 : 12)), kDescIndirect);
        CHECK(c.fault() == "an indirect descriptor in an indirect table");
    }
    SECTION("across two regions, not aligned, longer than the ring") {
        const uint64_t odd = Guest::kBorder - 16 * 10 - 5;
        std::vector<std::byte> entries(16 * 40);
        for (uint32_t i = 0; i < 40; i++) {
            const uint64_t address = 0x180000 + 8192 * i;
            const uint32_t bytes = i + 1;
            const uint16_t write = i >= 20 ? kDescWrite : 0;
            const uint16_t own = packed ? uint16_t{0} : static_cast<uint16_t>(write | (i < 39 ? kDescNext : 0));
            const auto last = static_cast<uint16_t>(packed ? write : i + 1);
            std::memcpy(entries.data() + 16 * i, &address, 8);
            std::memcpy(entries.data() + 16 * i + 8, &bytes, 4);
            std::memcpy(entries.data() + 16 * i + 12, &own, 2);
            std::memcpy(entries.data() + 16 * i + 14, &last, 2);
        }
        c.guest.write(odd, entries);
        store<uint64_t>(d, odd);
        length(16 * 40);
        Chain chain;
        REQUIRE(c.ring->take(chain, c.space) == Take::kChain);
        REQUIRE(chain.parts.size() == 40);
        CHECK(chain.readable == 20);
        CHECK(chain.readable_bytes == 210);
        CHECK(chain.writable_bytes == 610);
        for (uint32_t i = 0; i < 40; i++) CHECK(chain.parts[i].iov_base == c.guest.at(0x180000 + 8192 * i));
    }
    if (packed) return;
    SECTION("an entry links outside") {
        store<uint16_t>(c.guest.at(table + 14), 3);
        CHECK(c.fault() == "a descriptor of an indirect table is followed by descriptor 3 of 3");
    }
    SECTION("a loop") {
        store<uint16_t>(c.guest.at(table + 16 + 14), 1);
        CHECK(c.fault() == "the chain in an indirect table has more than its 3 descriptors");
    }
}

TEST_CASE("virtio faults: split rings", "[virtio][fault][once]") {
    Case c(false);
    std::byte* const avail = c.guest.at(c.driver->driver_area());
    const auto index = [&](uint16_t value) { store<uint16_t>(avail + 2, value); };
    const auto entry = [&](size_t i, uint16_t head) { store<uint16_t>(avail + 4 + 2 * i, head); };
    SECTION("the index jumps ahead") {
        index(1 + 17);
        CHECK(c.fault() == "the available index jumps from 1 to 18 in a ring of 16 descriptors");
    }
    SECTION("the index goes back") {
        index(0);
        CHECK(c.fault() == "the available index jumps from 1 to 0 in a ring of 16 descriptors");
    }
    SECTION("no such descriptor") {
        entry(1, 16);
        index(2);
        CHECK(c.fault() == "the available ring names descriptor 16 of 16");
    }
    SECTION("one in flight") {
        entry(1, c.before.id);
        index(2);
        CHECK(c.fault() == fmt::format("descriptor {} is made available again before it was used", c.before.id));
    }
    SECTION("chains") {
        const auto id = c.driver->add(kUsual);
        c.driver->kick();
        SECTION("lead outside") {
            store<uint16_t>(c.descriptor(*id) + 14, 16);
            CHECK(c.fault() == "a descriptor is followed by descriptor 16 of 16");
        }
        SECTION("are loops") {
            store<uint16_t>(c.descriptor(*id) + 14, *id);
            CHECK(c.fault() == fmt::format("the chain at descriptor {} has more than 16 descriptors", *id));
        }
    }
}

TEST_CASE("virtio faults: packed rings", "[virtio][fault][once]") {
    Case c(true);
    const auto id = c.driver->add(kUsual);
    SECTION("a buffer in flight") {
        store<uint16_t>(c.descriptor(5) + 12, c.before.id);
        CHECK(c.fault() == fmt::format("buffer {} is made available again before it was used", c.before.id));
    }
    SECTION("a chain runs into what is in flight") {
        c.look = false;
        for (size_t i = 3; i < kSize; i++) {
            store<uint64_t>(c.descriptor(i), 0x100000);
            store<uint32_t>(c.descriptor(i) + 8, 1);
            store<uint16_t>(c.descriptor(i) + 14, kDescNext | 1 << 7);
        }
        CHECK(c.fault() == "a chain at slot 3 takes up more than the 13 descriptors of the ring that are not in use");
    }
    SECTION("more than the ring has") {
        Chain chain;
        REQUIRE(c.ring->take(chain, c.space) == Take::kChain);
        while (c.driver->add(std::span(kUsual).first(1))) REQUIRE(c.ring->take(chain, c.space) == Take::kChain);
        REQUIRE_FALSE(c.ring->has_more());
        c.look = false;
        store<uint16_t>(c.descriptor(0) + 14, 1 << 15);
        CHECK(c.fault() == "a chain at slot 0 takes up more than the 0 descriptors of the ring that are not in use");
    }
    CHECK(id.has_value());
}

TEST_CASE("virtio faults: memory in very many regions", "[virtio][fault][once]") {
    Case c(false);
    std::vector<Region> regions;
    const Region& whole = c.guest.memory()->regions()[0];
    for (uint64_t i = 0; i < 5000; i++)
        regions.push_back({0x40000000 + 16 * i, 16, 0, whole.mapping, whole.host + 16 * (i * 7 % 5000)});
    auto memory = GuestMemory::create(std::move(regions));
    REQUIRE(memory.has_value());
    c.space.change(*memory);
    const Piece fits{0x40000000, 4096 * 16, true};
    REQUIRE(c.driver->add(std::span(&fits, 1)));
    c.driver->kick();
    Chain chain;
    REQUIRE(c.ring->take(chain, c.space) == Take::kChain);
    CHECK(chain.parts.size() == 4096);
    const Piece more{0x40000008, 4096 * 16, true};
    REQUIRE(c.driver->add(std::span(&more, 1)));
    c.driver->kick();
    CHECK(c.fault() == "a chain falls into more than 4096 pieces of the guest's memory");
}
