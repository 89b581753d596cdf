// Unanswered chains of a split ring, in the layout of the vhost-user specification, "Inflight I/O tracking".

#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "exports/virtio/ring.h"
#include "exports/virtio/shared.h"

namespace gantry::virtio {

/// The stores are in an order in which every one of them may be the last: the process is killed, the machine goes on.
/// A processor that stops between two instructions has done all stores before, so what counts is the order of the
/// instructions; release stores keep the compiler from changing it (and other processors from seeing another one).
/// Own loop only.
class SplitInflight {
  public:
    static constexpr uint64_t kHeaderBytes = 16, kEntryBytes = 16;

    /// Nothing is noted when `inflight` is null.
    explicit SplitInflight(std::unique_ptr<Inflight> inflight) : inflight_(std::move(inflight)) {}
    explicit operator bool() const { return inflight_ != nullptr; }

    /// What the process before has left in the region, whose bytes are not trusted. `used` is the used index of the
    /// ring of `size` descriptors. Heads that were taken and not published go to `unanswered`, in the order in which
    /// they were taken. The answer is false when there was no process before: the region is set up.
    Result<bool> recover(uint32_t size, uint16_t used, std::vector<uint16_t>& unanswered);

    /// A chain is taken.
    void taken(uint16_t head) {
        std::byte* const e = entry(head);
        store<uint64_t>(e + kCounter, ++counter_);
        store<uint8_t>(e + kInflight, 1, std::memory_order_release);
    }
    /// Chains are about to be published: before the used index changes.
    void finishing(std::span<const Used> done) {
        uint16_t last = load<uint16_t>(region() + kLastBatchHead);
        for (const Used& used : done) {
            store<uint16_t>(entry(used.id) + kNext, last, std::memory_order_release);
            last = used.id;
            store<uint16_t>(region() + kLastBatchHead, last, std::memory_order_release);
        }
    }
    /// They are published: the used index is `used` now.
    void finished(std::span<const Used> done, uint16_t used) {
        for (const Used& one : done) store<uint8_t>(entry(one.id) + kInflight, 0, std::memory_order_release);
        store<uint16_t>(region() + kUsedIndex, used, std::memory_order_release);
    }

  private:
    // struct { u64 features; u16 version, desc_num, last_batch_head, used_idx; } and for each descriptor
    // struct { u8 inflight, padding[5]; u16 next; u64 counter; }.
    static constexpr uint64_t kVersion = 8, kDescNum = 10, kLastBatchHead = 12, kUsedIndex = 14;
    static constexpr uint64_t kInflight = 0, kNext = 6, kCounter = 8;

    std::byte* region() const { return inflight_->region; }
    std::byte* entry(uint32_t index) const { return region() + kHeaderBytes + kEntryBytes * index; }

    std::unique_ptr<Inflight> inflight_;
    uint64_t counter_ = 0;
};

}  // namespace gantry::virtio
