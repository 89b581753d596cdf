// Unanswered chains of a packed ring, in the layout of the vhost-user specification, "Inflight I/O tracking".

#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "exports/virtio/ring.h"
#include "exports/virtio/shared.h"

namespace gantry::virtio {

/// A descriptor of a packed ring (VIRTIO 1.2, section 2.8.13), copied.
struct PackedDescriptor {
    uint64_t address;
    uint32_t length;
    uint16_t id;
    uint16_t flags;
};
inline constexpr uint16_t kPackedAvail = 1 << 7, kPackedUsed = 1 << 15;  // flags

/// A place in a packed ring: which slot, in which lap.
struct PackedPlace {
    uint16_t slot = 0;
    bool wrap = true;
    void advance(uint32_t slots, uint32_t size) {
        const uint32_t to = slot + slots;
        slot = static_cast<uint16_t>(to < size ? to : to - size);
        wrap ^= to >= size;
    }
    bool operator==(const PackedPlace&) const = default;
};

/// Used slots of the ring lose what the driver wrote there, and so do those that come after the place of a used chain;
/// therefore whole chains are copied to the region. As in a split ring every store may be the last one (see
/// SplitInflight). What must change together lies side by side there and is stored at once. Own loop only.
class PackedInflight {
  public:
    static constexpr uint64_t kHeaderBytes = 32, kEntryBytes = 32;

    struct Recovered {
        bool went_on = false;  // false: there was no process before, nothing else is set but the region
        PackedPlace used;
        uint32_t slots = 0;                                 // of the ring, that unanswered chains take up
        std::vector<std::vector<PackedDescriptor>> chains;  // unanswered ones, in the order in which they were taken
    };

    /// Nothing is noted when `inflight` is null.
    explicit PackedInflight(std::unique_ptr<Inflight> inflight);
    explicit operator bool() const { return inflight_ != nullptr; }

    /// Nobody has noted anything yet.
    bool is_new() const { return load<uint16_t>(region() + kVersion) == 0; }
    /// What the process before has left in the region, whose bytes are not trusted. `descriptors` is the ring of
    /// `size`; `used` is where a region that is new begins.
    Result<Recovered> recover(uint32_t size, const std::byte* descriptors, PackedPlace used);

    /// A chain is taken.
    void taken(std::span<const PackedDescriptor> chain);
    /// A chain is about to be published: its used descriptor comes next, after which `used` is the place.
    void finishing(uint16_t id, PackedPlace used);
    /// It is published.
    void finished(uint16_t id);

  private:
    // struct { u64 features; u16 version, desc_num, free_head, old_free_head, used_idx, old_used_idx; u8 used_wrap,
    // old_used_wrap, padding[7]; } and then for each descriptor struct { u8 inflight, padding; u16 next, last, num;
    // u64 counter; u16 id, flags; u32 len; u64 addr; }.
    static constexpr uint64_t kVersion = 8, kDescNum = 10, kFree = 12, kUsed = 16;
    static constexpr uint64_t kInflight = 0, kNext = 2, kLast = 4, kNum = 6, kCounter = 8, kDescriptor = 16,
                              kAddress = 24;

    std::byte* region() const { return inflight_->region; }
    std::byte* entry(uint32_t index) const { return region() + kHeaderBytes + kEntryBytes * index; }
    /// free_head and old_free_head.
    void store_free(uint16_t now, uint16_t old) {
        store<uint32_t>(region() + kFree, now | uint32_t{old} << 16, std::memory_order_release);
    }
    /// used_idx, old_used_idx and their wrap counters.
    void store_used(PackedPlace now, PackedPlace old) {
        store<uint64_t>(region() + kUsed,
                        now.slot | uint64_t{old.slot} << 16 | uint64_t{now.wrap} << 32 | uint64_t{old.wrap} << 40,
                        std::memory_order_release);
    }
    void set_head(uint16_t id, uint16_t head) {
        if (id >= heads_.size()) [[unlikely]]
            heads_.resize(1 << 16);  // drivers may use any number, and do not
        heads_[id] = head;
    }
    Result<> settle(uint32_t size, const std::byte* descriptors);
    Result<> collect(uint32_t size, Recovered& found);
    Result<std::vector<PackedDescriptor>> collect_chain(uint16_t head, std::vector<bool>& seen);

    std::unique_ptr<Inflight> inflight_;
    uint64_t counter_ = 0;
    // What the region says as well, where the client can change it.
    uint16_t free_ = 0;
    PackedPlace used_, next_used_;
    std::vector<uint16_t> next_;  // of each entry
    std::vector<uint16_t> last_;  // of each entry that heads a chain
    // Entry of each buffer id.
    std::vector<uint16_t> heads_;
};

}  // namespace gantry::virtio
