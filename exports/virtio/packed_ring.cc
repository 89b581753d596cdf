#include "exports/virtio/packed_ring.h"

#include <utility>

#include "exports/virtio/chain_reader.h"
#include "exports/virtio/packed_inflight.h"
#include "exports/virtio/shared.h"
#include "runtime/check.h"

namespace gantry::virtio {

namespace {

// The areas of both sides are one word (VIRTIO 1.2, section 2.8.14): slot, wrap counter, and in the upper half
constexpr uint32_t kEventsAlways = 0U << 16, kEventsNever = 1U << 16, kEventsAtPlace = 2U << 16, kEventsMask = 3U << 16;

uint32_t place_bits(PackedPlace place) { return place.slot | (place.wrap ? 0x8000U : 0); }
PackedPlace place_of(uint32_t bits) { return {static_cast<uint16_t>(bits & 0x7fff), (bits & 0x8000) != 0}; }

class PackedRing final : public Ring {
  public:
    PackedRing(RingShape shape, RingPlace place, std::unique_ptr<Inflight> inflight)
        : Ring(shape, place), inflight_(std::move(inflight)), ids_(shape.size) {
        descriptors_.reserve(shape.size);
    }

    Result<> begin(uint32_t base) {
        const Result<> told = check_base(base);
        if (!inflight_) return told;
        // A front end that has lost its back end does not know where that was: `base` counts for a new region only.
        if (inflight_.is_new()) CHECK_OK(told);
        TRY(auto found, inflight_.recover(shape_.size, place_.descriptors, used_));
        return found.went_on ? go_on(std::move(found)) : told;
    }

    bool has_more() const override {
        if (!fault_.empty()) return false;
        return again_next_ != again_.size() || is_available(load<uint16_t>(at(next_.slot) + 14));
    }

    Take take(Chain& chain, AddressSpace& space) override {
        if (!fault_.empty()) [[unlikely]]
            return Take::kBroken;
        if (again_next_ != again_.size()) [[unlikely]]
            return take_again(chain, space);
        if (!is_available(load<uint16_t>(at(next_.slot) + 14, std::memory_order_acquire))) return Take::kNothing;
        if (!read_ring(chain, space)) [[unlikely]]
            return Take::kBroken;
        if (is_in_flight(chain.id)) [[unlikely]] {
            reader_.broken("buffer {} is made available again before it was used", chain.id);
            return Take::kBroken;
        }
        set_in_flight(chain.id);
        slots_ += chain.slots;
        next_.advance(chain.slots, shape_.size);
        if (inflight_) inflight_.taken(descriptors_);
        return Take::kChain;
    }

    bool publish(std::span<const Used> done) override {
        if (done.empty()) return false;
        for (const Used& one : done) {
            CHECK(is_in_flight(one.id) && one.slots <= slots_, "only what was taken is published, and once");
            ids_[one.id] = false;
        }
        uint32_t slots = 0;
        if (inflight_) {
            for (const Used& one : done) {
                PackedPlace after = used_;
                after.advance(one.slots, shape_.size);
                inflight_.finishing(one.id, after);
                write_used(used_, one, std::memory_order_release);
                inflight_.finished(one.id);
                used_ = after;
                slots += one.slots;
            }
        } else {
            // The driver waits for the first one and then finds them all.
            const PackedPlace first = used_;
            used_.advance(done[0].slots, shape_.size);
            for (const Used& one : done.subspan(1)) {
                write_used(used_, one, std::memory_order_relaxed);
                used_.advance(one.slots, shape_.size);
                slots += one.slots;
            }
            write_used(first, done[0], std::memory_order_release);
            slots += done[0].slots;
        }
        slots_ -= slots;
        return wants_signal(slots);
    }

    void quiet() override { set_events(kEventsNever); }

    bool listen() override {
        set_events(shape_.event_idx ? kEventsAtPlace | place_bits(next_) : kEventsAlways);
        // The driver adds and then looks at what we have just written; we look whether it has added before.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        return has_more();
    }

    uint32_t base() const override { return place_bits(next_) | place_bits(used_) << 16; }
    void move(RingPlace place) override { place_ = place; }

  private:
    std::byte* at(uint16_t slot) const { return place_.descriptors + kDescBytes * slot; }
    bool is_available(uint16_t flags) const {
        return ((flags & kPackedAvail) != 0) == next_.wrap && ((flags & kPackedUsed) != 0) != next_.wrap;
    }

    bool is_in_flight(uint16_t id) const { return id < ids_.size() && ids_[id]; }
    void set_in_flight(uint16_t id) {
        if (id >= ids_.size()) [[unlikely]]
            ids_.resize(1 << 16);  // drivers may use any number, and do not
        ids_[id] = true;
    }

    /// Without a record of what is in flight, nothing is.
    Result<> check_base(uint32_t base) {
        next_ = place_of(base);
        // From a front end that knows of one place only.
        used_ = base >> 16 == 0 ? next_ : place_of(base >> 16);
        if (next_.slot >= shape_.size || used_.slot >= shape_.size)
            return fail(ErrorKind::kInvalid, "{:#x} names slots {} and {} of a packed ring of {}", base, next_.slot,
                        used_.slot, shape_.size);
        if (next_ != used_)
            return fail(ErrorKind::kInvalid,
                        "{:#x} says that a packed ring has chains in flight, and nothing says which (slots {} and {})",
                        base, next_.slot, used_.slot);
        return {};
    }

    Result<> go_on(PackedInflight::Recovered found) {
        used_ = next_ = found.used;
        next_.advance(found.slots, shape_.size);
        slots_ = found.slots;
        again_ = std::move(found.chains);
        for (const auto& chain : again_) set_in_flight(chain.back().id);
        return {};
    }

    Take take_again(Chain& chain, AddressSpace& space) {
        ChainReader::clear(chain);
        const auto& descriptors = again_[again_next_];
        for (const PackedDescriptor& d : descriptors)
            if (!read_descriptor(d, chain, space)) return Take::kBroken;
        chain.id = descriptors.back().id;
        chain.slots = static_cast<uint16_t>(descriptors.size());
        if (++again_next_ == again_.size()) {
            again_ = {};
            again_next_ = 0;
        }
        return Take::kChain;
    }

    bool read_ring(Chain& chain, AddressSpace& space) {
        ChainReader::clear(chain);
        descriptors_.clear();
        uint16_t slot = next_.slot;
        for (uint32_t left = shape_.size - slots_; left != 0; left--) {
            const auto rest = load<uint64_t>(at(slot) + 8);
            const PackedDescriptor d{.address = load<uint64_t>(at(slot)),
                                     .length = static_cast<uint32_t>(rest),
                                     .id = static_cast<uint16_t>(rest >> 32),
                                     .flags = static_cast<uint16_t>(rest >> 48)};
            if (!read_descriptor(d, chain, space)) return false;
            ++chain.slots;
            if (inflight_) descriptors_.push_back(d);
            if (!(d.flags & kDescNext)) {
                chain.id = d.id;
                return true;
            }
            if (++slot == shape_.size) slot = 0;
        }
        return reader_.broken(
            "a chain at slot {} takes up more than the {} descriptors of the ring that are not in use", next_.slot,
            shape_.size - slots_);
    }

    bool read_descriptor(const PackedDescriptor& d, Chain& chain, AddressSpace& space) {
        if (!(d.flags & kDescIndirect)) [[likely]]
            return reader_.add(chain, space, d.address, d.length, d.flags & kDescWrite);
        uint32_t count = 0;
        const RawDescriptor* const table = reader_.table(space, d.address, d.length, d.flags, shape_.indirect, count);
        if (!table) return false;
        for (uint32_t i = 0; i < count; i++) {
            // Section 2.8.8: all of the table, in order; buffer ids mean nothing, and of the flags only WRITE.
            const uint16_t flags = table[i].next;
            if (flags & kDescIndirect) return reader_.broken("an indirect descriptor in an indirect table");
            if (!reader_.add(chain, space, table[i].address, table[i].length, flags & kDescWrite)) return false;
        }
        return true;
    }

    void write_used(PackedPlace place, const Used& one, std::memory_order order) {
        const auto flags =
            static_cast<uint16_t>((place.wrap ? kPackedAvail | kPackedUsed : 0) | (one.length != 0 ? kDescWrite : 0));
        store<uint64_t>(at(place.slot) + 8, one.length | uint64_t{one.id} << 32 | uint64_t{flags} << 48, order);
        log_write(kDescBytes * place.slot + 8, 8);
    }

    bool wants_signal(uint32_t slots) {
        // The driver looks at the descriptors after it has said what it waits for, we do it the other way round.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        const auto events = load<uint32_t>(place_.driver);
        if ((events & kEventsMask) == kEventsNever) return false;
        const bool first = std::exchange(first_, false);  // see SplitRing
        if (!shape_.event_idx || (events & kEventsMask) != kEventsAtPlace) return true;
        const PackedPlace event = place_of(events);
        const auto at = static_cast<uint16_t>(event.wrap == used_.wrap ? event.slot : event.slot - shape_.size);
        return static_cast<uint16_t>(used_.slot - at - 1) < slots || first;
    }

    void set_events(uint32_t events) {
        if (events_ == events) return;
        events_ = events;
        store<uint32_t>(place_.device, events);
    }

    PackedPlace next_, used_;
    uint32_t slots_ = 0;            // of the ring, in flight
    uint32_t events_ = UINT32_MAX;  // our area, as written; unknown at first
    bool first_ = true;             // nothing was published yet
    ChainReader reader_{fault_};
    PackedInflight inflight_;
    std::vector<bool> ids_;                             // in flight
    std::vector<PackedDescriptor> descriptors_;         // of one chain, for the record
    std::vector<std::vector<PackedDescriptor>> again_;  // taken by the process before this one
    size_t again_next_ = 0;
};

}  // namespace

Result<std::unique_ptr<Ring>> make_packed_ring(RingShape shape, RingPlace place, uint32_t base,
                                               std::unique_ptr<Inflight> inflight) {
    auto ring = std::make_unique<PackedRing>(shape, place, std::move(inflight));
    CHECK_OK(ring->begin(base));
    return ring;
}

}  // namespace gantry::virtio
