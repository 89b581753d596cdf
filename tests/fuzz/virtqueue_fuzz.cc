// A guest that writes what it likes into its ring, its tables and (by its front end) the inflight region: whatever the
// ring hands out lies in the guest's memory, and whatever it is told to publish stays in the ring.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <vector>

#include "exports/virtio/chain_reader.h"
#include "exports/virtio/ring.h"
#include "exports/virtio/shared.h"
#include "tests/fuzz/input.h"
#include "tests/support/virtio_driver.h"

namespace {

using namespace gantry;
using namespace gantry::virtio;
using gantry::fuzz::Input;
using gantry::test::Driver;
using gantry::test::Guest;
using gantry::test::Piece;

constexpr uint64_t kNear = 0x10000, kNearSize = 0x8000, kNext = kNear + kNearSize, kNextSize = 0x1000;
constexpr uint64_t kFar = 0x100000, kFarSize = 0x1000;

/// Most of what a guest would say, and some of what it would not.
uint64_t address_of(Input& in) {
    const uint16_t word = in.word();
    switch (word >> 14) {
        case 0:
            return kNear + (word & 0x3fff) * 2;
        case 1:
            return kNext - 0x100 + (word & 0x3ff);
        case 2:
            return kFar - 0x10 + (word & 0x1fff);
        default:
            return word & 1 ? UINT64_MAX - (word & 0x3fff) : uint64_t{word} << (word & 0x1f);
    }
}

uint32_t length_of(Input& in) {
    const uint8_t byte = in.byte();
    if (byte < 160) return byte;
    return byte < 250 ? byte * 64U : UINT32_MAX - byte;
}

struct Run {
    Run(Guest& guest, Input in) : guest(guest), in(in) {}

    void shape_and_memory() {
        const uint8_t choice = in.byte();
        constexpr uint32_t kSizes[] = {2, 4, 8, 16, 3, 5, 7, 64};
        shape = {.size = kSizes[choice & 7],
                 .packed = (choice & 8) != 0,
                 .event_idx = (choice & 16) != 0,
                 .indirect = (choice & 32) == 0};
        driver = Driver::create(guest, {.size = shape.packed || (shape.size & (shape.size - 1)) == 0 ? shape.size : 4,
                                        .packed = shape.packed,
                                        .event_idx = shape.event_idx,
                                        .indirect = true});
        if (choice & 64) {
            auto made = InflightFile::create(1, static_cast<uint16_t>(shape.size + (choice >> 7)), shape.packed);
            EXPECT(made.has_value());
            file = std::move(*made);
        }
        memory = guest.memory();
        // A table of regions of the input's own, over the same bytes.
        if (const uint8_t count = in.byte(); count & 1) {
            std::vector<Region> regions;
            const Region& whole = guest.memory()->regions()[0];
            for (uint8_t i = 0; i < count % 12; i++) {
                const uint64_t at = uint64_t{in.byte()} * 16, guest_at = address_of(in) & ~uint64_t{in.byte() & 15U};
                regions.push_back({guest_at, length_of(in), guest_at, whole.mapping, whole.host + at});
            }
            if (auto made = GuestMemory::create(regions)) {
                memory = std::move(*made);
                EXPECT(memory->regions().size() == regions.size());
            }
        }
        space = AddressSpace(memory, nullptr);
        base = in.byte() & 1 ? driver->first_base() : in.word() | uint32_t{in.word()} << 16;
    }

    bool start() {
        std::unique_ptr<Inflight> inflight;
        if (file) inflight = std::make_unique<Inflight>(Inflight{file, file->region(0), file->queue_size()});
        auto made = Ring::create(shape, driver->place(), base, std::move(inflight));
        if (!made) {
            EXPECT(!made.error().message().empty());
            return false;
        }
        ring = std::move(*made);
        taken.clear();
        return true;
    }

    void take() {
        const bool was_broken = ring->is_broken();
        const Take take = ring->take(chain, space);
        EXPECT(!was_broken || (take == Take::kBroken && !ring->has_more()));
        EXPECT((take == Take::kBroken) == ring->is_broken());
        EXPECT(ring->is_broken() == !ring->fault().empty());
        if (take != Take::kChain) return;
        uint64_t readable = 0, writable = 0;
        EXPECT(!chain.parts.empty() && chain.readable <= chain.parts.size() && chain.parts.size() <= kMaxChainParts);
        for (size_t i = 0; i < chain.parts.size(); i++) {
            const iovec& part = chain.parts[i];
            EXPECT(part.iov_len != 0);
            const auto* const from = static_cast<const std::byte*>(part.iov_base);
            bool inside = false;
            for (const Region& r : memory->regions())
                inside |= from >= r.host && from < r.host + r.size &&
                          part.iov_len <= r.size - static_cast<uint64_t>(from - r.host);
            EXPECT(inside);
            (i < chain.readable ? readable : writable) += part.iov_len;
        }
        EXPECT(readable == chain.readable_bytes && writable == chain.writable_bytes);
        for (const Used& one : taken) EXPECT(one.id != chain.id);
        taken.push_back({.id = chain.id, .slots = chain.slots, .length = in.word()});
        uint32_t slots = 0;
        for (const Used& one : taken) slots += shape.packed ? one.slots : 1;
        EXPECT(slots <= shape.size);
    }

    void publish() {
        const size_t count = taken.empty() ? 0 : in.byte() % (taken.size() + 1);
        std::vector<Used> done;
        for (size_t i = 0; i < count; i++) {
            const size_t at = in.byte() % taken.size();
            done.push_back(taken[at]);
            taken.erase(taken.begin() + static_cast<ptrdiff_t>(at));
        }
        ring->publish(done);
    }

    void descriptor() {
        const uint8_t slot = in.byte();
        std::byte* const at = slot & 0x80 ? guest.at(kNear + (slot & 0x7f) * 16, 16)  // of a table
                                          : driver->place().descriptors + 16 * (slot % driver->shape().size);
        store<uint64_t>(at, address_of(in));
        store<uint32_t>(at + 8, length_of(in));
        const uint8_t flags = in.byte();
        const uint16_t low = flags & 7, third = in.byte();
        store<uint16_t>(at + 12, shape.packed ? third : low);
        store<uint16_t>(at + 14, shape.packed
                                     ? static_cast<uint16_t>(low | (flags & 8 ? 0x80 : 0) | (flags & 16 ? 0x8000 : 0))
                                     : third);
    }

    void add() {
        std::vector<Piece> pieces;
        const uint8_t how = in.byte();
        for (uint8_t i = 0; i <= how % 4; i++) pieces.push_back({address_of(in), length_of(in), i >= (how >> 2) % 4});
        driver->add(pieces, static_cast<Driver::Form>((how >> 4) % 3));
        driver->kick();
    }

    void go() {
        shape_and_memory();
        if (!start()) return;
        while (!in.empty()) {
            switch (in.byte() % 10) {
                case 0:
                    descriptor();
                    break;
                case 1: {  // one more available
                    std::byte* const avail = driver->place().driver;
                    const auto index = load<uint16_t>(avail + 2);
                    if (shape.packed) break;
                    store<uint16_t>(avail + 4 + 2 * (index % driver->shape().size), in.byte());
                    store<uint16_t>(avail + 2, static_cast<uint16_t>(index + 1));
                    break;
                }
                case 2: {
                    std::byte* const area = in.byte() & 1 ? driver->place().driver : driver->place().device;
                    const uint64_t bytes =
                        std::min(area_needs(driver->shape()).driver, area_needs(driver->shape()).device);
                    store<uint16_t>(area + in.byte() % (bytes / 2) * 2, in.word());
                    break;
                }
                case 3:
                    take();
                    break;
                case 4:
                    publish();
                    break;
                case 5:
                    ring->listen();
                    break;
                case 6:
                    ring->quiet();
                    break;
                case 7: {  // killed, or stopped
                    if (!file && !taken.empty()) break;
                    base = ring->base();
                    if (file && in.byte() & 1)
                        file->region(0)[in.byte() % (file->size())] = static_cast<std::byte>(in.byte());
                    if (!start()) return;
                    break;
                }
                case 8:
                    add();
                    break;
                case 9:
                    try {
                        driver->reap();
                    } catch (const std::runtime_error&) {
                        // What the input has written over is not the ring's fault.
                    }
                    break;
            }
        }
    }

    Guest& guest;
    Input in;
    RingShape shape;
    std::unique_ptr<Driver> driver;
    std::shared_ptr<InflightFile> file;
    std::shared_ptr<const GuestMemory> memory;
    AddressSpace space;
    uint32_t base = 0;
    std::unique_ptr<Ring> ring;
    std::vector<Used> taken;
    Chain chain;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static Guest& guest = *new Guest({{kNear, kNearSize}, {kNext, kNextSize}, {kFar, kFarSize}});
    guest.clear();
    Run(guest, Input{data, size}).go();
    return 0;
}
