#include "exports/virtio/split_ring.h"

#include <array>
#include <utility>

#include "exports/virtio/chain_reader.h"
#include "exports/virtio/shared.h"
#include "exports/virtio/split_inflight.h"
#include "runtime/check.h"

namespace gantry::virtio {

namespace {

// Offsets in the driver area (available ring) and the device area (used ring).
constexpr uint64_t kFlags = 0, kIndex = 2, kEntries = 4;
constexpr uint64_t kAvailBytes = 2, kUsedBytes = 8;
constexpr uint16_t kNoInterrupt = 1;  // flags of the available ring
constexpr uint16_t kNoNotify = 1;     // flags of the used ring

class SplitRing final : public Ring {
  public:
    SplitRing(RingShape shape, RingPlace place, uint32_t base, std::unique_ptr<Inflight> inflight)
        : Ring(shape, place),
          mask_(static_cast<uint16_t>(shape.size - 1)),
          taken_(static_cast<uint16_t>(base)),
          seen_(taken_),
          used_(load<uint16_t>(place.device + kIndex)),
          inflight_(std::move(inflight)) {}

    Result<> recover() {
        if (!inflight_) return {};
        TRY(const bool went_on, inflight_.recover(shape_.size, used_, again_));
        if (!went_on) return {};
        // All that was taken is either used or noted.
        taken_ = seen_ = static_cast<uint16_t>(used_ + again_.size());
        for (const uint16_t head : again_) set_in_flight(head);
        return {};
    }

    bool has_more() const override {
        if (!fault_.empty()) return false;
        return load<uint16_t>(place_.driver + kIndex) != taken_ || seen_ != taken_ || again_next_ != again_.size();
    }

    Take take(Chain& chain, AddressSpace& space) override {
        if (!fault_.empty()) [[unlikely]]
            return Take::kBroken;
        if (again_next_ != again_.size()) [[unlikely]]
            return take_again(chain, space);
        if (taken_ == seen_) {
            const auto index = load<uint16_t>(place_.driver + kIndex, std::memory_order_acquire);
            if (index == taken_) return Take::kNothing;
            if (static_cast<uint16_t>(index - taken_) > shape_.size) [[unlikely]] {
                reader_.broken("the available index jumps from {} to {} in a ring of {} descriptors", taken_, index,
                               shape_.size);
                return Take::kBroken;
            }
            seen_ = index;
        }
        const auto head = load<uint16_t>(place_.driver + kEntries + kAvailBytes * (taken_ & mask_));
        if (head >= shape_.size) [[unlikely]] {
            reader_.broken("the available ring names descriptor {} of {}", head, shape_.size);
            return Take::kBroken;
        }
        if (is_in_flight(head)) [[unlikely]] {
            reader_.broken("descriptor {} is made available again before it was used", head);
            return Take::kBroken;
        }
        if (!read_chain(head, chain, space)) [[unlikely]]
            return Take::kBroken;
        set_in_flight(head);
        ++taken_;
        if (inflight_) inflight_.taken(head);
        return Take::kChain;
    }

    bool publish(std::span<const Used> done) override {
        if (done.empty()) return false;
        const uint16_t before = used_;
        if (inflight_) inflight_.finishing(done);
        for (const Used& one : done) {
            CHECK(one.id < shape_.size && is_in_flight(one.id), "only what was taken is published, and once");
            clear_in_flight(one.id);
            const uint64_t offset = kEntries + kUsedBytes * (used_ & mask_);
            store<uint32_t>(place_.device + offset, one.id);
            store<uint32_t>(place_.device + offset + 4, one.length);
            log_write(offset, kUsedBytes);
            ++used_;
        }
        store<uint16_t>(place_.device + kIndex, used_, std::memory_order_release);
        if (inflight_) inflight_.finished(done, used_);
        log_write(kIndex, 2);
        return wants_signal(before);
    }

    void quiet() override {
        // With EVENT_IDX the event that the driver waits for just stays behind.
        if (!shape_.event_idx) set_flags(kNoNotify);
    }

    bool listen() override {
        if (shape_.event_idx) {
            const uint64_t avail_event = kEntries + kUsedBytes * shape_.size;
            store<uint16_t>(place_.device + avail_event, taken_);
            log_write(avail_event, 2);
        } else {
            set_flags(0);
        }
        // The driver adds and then looks at what we have just written; we look whether it has added before.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        return has_more();
    }

    uint32_t base() const override { return taken_; }
    void move(RingPlace place) override { place_ = place; }

  private:
    Take take_again(Chain& chain, AddressSpace& space) {
        if (!read_chain(again_[again_next_], chain, space)) return Take::kBroken;
        if (++again_next_ == again_.size()) {
            again_ = {};
            again_next_ = 0;
        }
        return Take::kChain;
    }

    bool read_chain(uint16_t head, Chain& chain, AddressSpace& space) {
        ChainReader::clear(chain);
        chain.id = head;
        uint16_t index = head;
        for (uint32_t left = shape_.size; left != 0; left--) {
            const std::byte* const at = place_.descriptors + kDescBytes * index;
            const auto address = load<uint64_t>(at);
            const auto rest = load<uint64_t>(at + 8);
            const auto length = static_cast<uint32_t>(rest);
            const auto flags = static_cast<uint16_t>(rest >> 32);
            if (flags & kDescIndirect) return read_table(address, length, flags, chain, space);
            if (!reader_.add(chain, space, address, length, flags & kDescWrite)) return false;
            if (!(flags & kDescNext)) return true;
            index = static_cast<uint16_t>(rest >> 48);
            if (index >= shape_.size) [[unlikely]]
                return reader_.broken("a descriptor is followed by descriptor {} of {}", index, shape_.size);
        }
        return reader_.broken("the chain at descriptor {} has more than {} descriptors", head, shape_.size);
    }

    bool read_table(uint64_t address, uint32_t length, uint16_t flags, Chain& chain, AddressSpace& space) {
        uint32_t count = 0;
        const RawDescriptor* const table = reader_.table(space, address, length, flags, shape_.indirect, count);
        if (!table) return false;
        uint32_t index = 0;
        for (uint32_t left = count; left != 0; left--) {
            const RawDescriptor& d = table[index];
            if (d.flags & kDescIndirect) return reader_.broken("an indirect descriptor in an indirect table");
            if (!reader_.add(chain, space, d.address, d.length, d.flags & kDescWrite)) return false;
            if (!(d.flags & kDescNext)) return true;
            index = d.next;
            if (index >= count) [[unlikely]]
                return reader_.broken("a descriptor of an indirect table is followed by descriptor {} of {}", index,
                                      count);
        }
        return reader_.broken("the chain in an indirect table has more than its {} descriptors", count);
    }

    /// Section 2.7.7.2: the driver is told when the used index passes the event that it has named.
    bool wants_signal(uint16_t before) {
        // It looks at the used index after it has named its event, we do it the other way round.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (!shape_.event_idx) return !(load<uint16_t>(place_.driver + kFlags) & kNoInterrupt);
        const auto event = load<uint16_t>(place_.driver + kEntries + kAvailBytes * shape_.size);
        const bool passed = static_cast<uint16_t>(used_ - event - 1) < static_cast<uint16_t>(used_ - before);
        // Nobody knows whether the process before this one has told what it published last.
        return std::exchange(first_, false) || passed;
    }

    void set_flags(uint16_t flags) {
        if (flags_ == flags) return;
        flags_ = flags;
        store<uint16_t>(place_.device + kFlags, flags);
        log_write(kFlags, 2);
    }

    bool is_in_flight(uint16_t head) const { return in_flight_[head / 64] >> (head % 64) & 1; }
    void set_in_flight(uint16_t head) { in_flight_[head / 64] |= uint64_t{1} << (head % 64); }
    void clear_in_flight(uint16_t head) { in_flight_[head / 64] &= ~(uint64_t{1} << (head % 64)); }

    const uint16_t mask_;
    uint16_t taken_;  // position in the available ring
    uint16_t seen_;   // the available index, as far as we have looked
    uint16_t used_;
    uint32_t flags_ = UINT32_MAX;  // ours, as written; unknown at first
    bool first_ = true;            // nothing was published yet
    std::array<uint64_t, kMaxQueueSize / 64> in_flight_{};
    ChainReader reader_{fault_};
    SplitInflight inflight_;
    std::vector<uint16_t> again_;  // heads taken by the process before this one
    size_t again_next_ = 0;
};

}  // namespace

Result<std::unique_ptr<Ring>> make_split_ring(RingShape shape, RingPlace place, uint32_t base,
                                              std::unique_ptr<Inflight> inflight) {
    if (base > UINT16_MAX) return fail(ErrorKind::kInvalid, "{:#x} is no index of an available ring", base);
    auto ring = std::make_unique<SplitRing>(shape, place, base, std::move(inflight));
    CHECK_OK(ring->recover());
    return ring;
}

}  // namespace gantry::virtio
