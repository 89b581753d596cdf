// Rings, split and packed: what a well-behaved driver and ours tell each other.

#include <catch2/catch.hpp>
#include <map>
#include <random>

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
    const bool packed = GENERATE(false);
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
