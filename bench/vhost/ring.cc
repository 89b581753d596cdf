#include "bench/vhost/ring.h"

#include <atomic>
#include <utility>

#include "bench/vhost/wire.h"

namespace gantry::bench::vhost {

namespace {

template <typename T>
T load(const T& from, std::memory_order order) {
    return std::atomic_ref(const_cast<T&>(from)).load(order);
}

template <typename T>
void store(T& to, T value, std::memory_order order = std::memory_order_relaxed) {
    std::atomic_ref(to).store(value, order);
}

/// VIRTIO 1.2, 2.7.10.1: whether the event lies among the entries (before, after].
bool passed(uint16_t event, uint16_t after, uint16_t before) {
    return static_cast<uint16_t>(after - event - 1) < static_cast<uint16_t>(after - before);
}

class SplitRing final : public Ring {
  public:
    SplitRing(const RingShape& shape, const RingPlace& place)
        : shape_(shape),
          place_(place),
          descriptors_(reinterpret_cast<SplitDescriptor*>(place.descriptors)),
          available_(reinterpret_cast<uint16_t*>(place.available)),
          used_(reinterpret_cast<uint16_t*>(place.used)),
          used_entries_(reinterpret_cast<SplitUsed*>(place.used + 4)) {}

    void define(uint32_t slot, std::span<const Piece> pieces) override {
        length_ = static_cast<uint32_t>(pieces.size());
        const uint32_t first = shape_.indirect ? 0 : slot * length_;
        auto* table = shape_.indirect ? reinterpret_cast<SplitDescriptor*>(place_.tables) + size_t{slot} * length_
                                      : descriptors_ + first;
        for (uint32_t i = 0; i < length_; i++) {
            const bool last = i + 1 == length_;
            const uint16_t flags = (last ? 0 : kDescNext) | (pieces[i].device_writes ? kDescWrite : 0);
            table[i] = {pieces[i].guest_address, pieces[i].bytes, flags,
                        static_cast<uint16_t>(last ? 0 : first + i + 1)};
        }
        if (!shape_.indirect) return;
        const uint32_t bytes = length_ * sizeof(SplitDescriptor);
        descriptors_[slot] = {place_.tables_guest_address + uint64_t{slot} * bytes, bytes, kDescIndirect, 0};
    }

    void add(uint32_t slot) override {
        available_[2 + (next_ & (shape_.size - 1))] = static_cast<uint16_t>(shape_.indirect ? slot : slot * length_);
        next_++;
    }

    bool publish() override {
        const uint16_t before = std::exchange(published_, next_);
        if (before == next_) return false;
        store(available_[1], next_, std::memory_order_release);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (!shape_.event_idx) return !(load(used_[0], std::memory_order_relaxed) & 1);
        return passed(load(avail_event(), std::memory_order_relaxed), next_, before);
    }

    bool has_done() const override { return load(used_[1], std::memory_order_acquire) != reaped_; }

    Done reap() override {
        const SplitUsed entry = used_entries_[reaped_++ & (shape_.size - 1)];
        return {shape_.indirect ? entry.id : entry.id / length_, entry.length};
    }

    void want_call(bool want) override {
        if (!shape_.event_idx) {
            store(available_[0], static_cast<uint16_t>(want ? 0 : 1));
        } else {  // an event that has just passed does not come again for 65535 entries
            store(available_[2 + shape_.size], static_cast<uint16_t>(want ? reaped_ : reaped_ - 1));
        }
        if (want) std::atomic_thread_fence(std::memory_order_seq_cst);
    }

    uint32_t first_base() const override { return 0; }

  private:
    uint16_t& avail_event() { return used_[2 + 4 * shape_.size]; }

    RingShape shape_;
    RingPlace place_;
    SplitDescriptor* descriptors_;
    uint16_t* available_;  // flags, index, ring[size], used_event
    uint16_t* used_;       // flags, index, entries[size], avail_event
    SplitUsed* used_entries_;
    uint32_t length_ = 1;
    uint16_t next_ = 0;
    uint16_t published_ = 0;
    uint16_t reaped_ = 0;
};

class PackedRing final : public Ring {
  public:
    PackedRing(const RingShape& shape, const RingPlace& place)
        : shape_(shape),
          place_(place),
          descriptors_(reinterpret_cast<PackedDescriptor*>(place.descriptors)),
          driver_(reinterpret_cast<PackedEvent*>(place.available)),
          device_(reinterpret_cast<PackedEvent*>(place.used)) {}

    void define(uint32_t slot, std::span<const Piece> pieces) override {
        length_ = static_cast<uint32_t>(pieces.size());
        if (shape_.indirect) {
            auto* table = reinterpret_cast<PackedDescriptor*>(place_.tables) + size_t{slot} * length_;
            for (uint32_t i = 0; i < length_; i++) {
                table[i] = {pieces[i].guest_address, pieces[i].bytes, 0,
                            static_cast<uint16_t>(pieces[i].device_writes ? kDescWrite : 0)};
            }
            const uint32_t bytes = length_ * sizeof(PackedDescriptor);
            pieces_.push_back({place_.tables_guest_address + uint64_t{slot} * bytes, bytes, false});
        } else {
            pieces_.insert(pieces_.end(), pieces.begin(), pieces.end());
        }
        slots_length_ = shape_.indirect ? 1 : length_;
    }

    void add(uint32_t slot) override {
        const uint32_t head = next_;
        const uint16_t head_flags = availability();
        uint16_t first_flags = 0;
        for (uint32_t i = 0; i < slots_length_; i++) {
            const Piece& piece = pieces_[size_t{slot} * slots_length_ + i];
            PackedDescriptor& descriptor = descriptors_[next_];
            descriptor.address = piece.guest_address;
            descriptor.length = piece.bytes;
            descriptor.id = static_cast<uint16_t>(slot);
            uint16_t flags = shape_.indirect ? kDescIndirect : 0;
            if (i + 1 < slots_length_) flags |= kDescNext;
            if (piece.device_writes) flags |= kDescWrite;
            if (i == 0) {
                first_flags = flags | head_flags;
            } else {
                store(descriptor.flags, static_cast<uint16_t>(flags | availability()));
            }
            if (++next_ == shape_.size) {
                next_ = 0;
                wrap_ = !wrap_;
            }
        }
        added_ += slots_length_;
        store(descriptors_[head].flags, first_flags, std::memory_order_release);  // the device may take it now
    }

    bool publish() override {
        const auto added = static_cast<uint16_t>(std::exchange(added_, 0));
        if (added == 0) return false;
        std::atomic_thread_fence(std::memory_order_seq_cst);
        const uint16_t flags = load(device_->flags, std::memory_order_relaxed);
        if (flags != kEventDescriptor) return flags == kEventEnable;
        const uint16_t offset_wrap = load(device_->offset_wrap, std::memory_order_relaxed);
        auto event = static_cast<uint16_t>(offset_wrap & 0x7fff);
        if ((offset_wrap >> 15 != 0) != wrap_) event = static_cast<uint16_t>(event - shape_.size);
        const auto after = static_cast<uint16_t>(next_);
        return passed(event, after, static_cast<uint16_t>(after - added));
    }

    bool has_done() const override {
        const uint16_t flags = load(descriptors_[reaped_].flags, std::memory_order_acquire);
        return ((flags & kDescAvailable) != 0) == reaped_wrap_ && ((flags & kDescUsed) != 0) == reaped_wrap_;
    }

    Done reap() override {
        const Done done = {descriptors_[reaped_].id, descriptors_[reaped_].length};
        reaped_ += slots_length_;
        if (reaped_ >= shape_.size) {
            reaped_ -= shape_.size;
            reaped_wrap_ = !reaped_wrap_;
        }
        return done;
    }

    void want_call(bool want) override {
        if (want && shape_.event_idx) {
            store(driver_->offset_wrap, static_cast<uint16_t>(reaped_ | (reaped_wrap_ ? 1u << 15 : 0)));
            store(driver_->flags, kEventDescriptor, std::memory_order_release);
        } else {
            store(driver_->flags, want ? kEventEnable : kEventDisable);
        }
        if (want) std::atomic_thread_fence(std::memory_order_seq_cst);
    }

    uint32_t first_base() const override { return 1u << 31 | 1u << 15; }  // both wrap counters are 1

  private:
    uint16_t availability() const { return wrap_ ? kDescAvailable : kDescUsed; }

    RingShape shape_;
    RingPlace place_;
    PackedDescriptor* descriptors_;
    PackedEvent* driver_;
    PackedEvent* device_;
    std::vector<Piece> pieces_;  // of all slots, as they stand in the ring
    uint32_t length_ = 1;
    uint32_t slots_length_ = 1;  // descriptors of the ring that a slot takes up
    uint32_t next_ = 0;
    uint32_t added_ = 0;
    uint32_t reaped_ = 0;
    bool wrap_ = true;
    bool reaped_wrap_ = true;
};

}  // namespace

std::unique_ptr<Ring> Ring::create(const RingShape& shape, const RingPlace& place) {
    if (shape.packed) return std::make_unique<PackedRing>(shape, place);
    return std::make_unique<SplitRing>(shape, place);
}

}  // namespace gantry::bench::vhost
