#include "exports/virtio/packed_inflight.h"

#include <algorithm>
#include <utility>

#include "exports/virtio/chain_reader.h"
#include "runtime/check.h"

namespace gantry::virtio {

PackedInflight::PackedInflight(std::unique_ptr<Inflight> inflight) : inflight_(std::move(inflight)) {
    if (!inflight_) return;
    heads_.resize(inflight_->queue_size);
    next_.resize(inflight_->queue_size);
    last_.resize(inflight_->queue_size);
}

Result<PackedInflight::Recovered> PackedInflight::recover(uint32_t size, const std::byte* descriptors,
                                                          PackedPlace used) {
    const uint32_t entries = inflight_->queue_size;
    const auto version = load<uint16_t>(region() + kVersion);
    if (version > 1) return fail(ErrorKind::kInvalid, "the inflight region has version {}; 1 is known", version);
    Recovered found;
    if (version == 0) {
        for (uint32_t i = 0; i < entries; i++) {
            store<uint8_t>(entry(i) + kInflight, 0);
            next_[i] = static_cast<uint16_t>(i + 1);
            store<uint16_t>(entry(i) + kNext, next_[i]);
        }
        store<uint16_t>(region() + kDescNum, static_cast<uint16_t>(entries));
        store_free(0, 0);
        store_used(used, used);
        store<uint16_t>(region() + kVersion, 1, std::memory_order_release);
        used_ = used;
        return found;
    }
    if (const auto told = load<uint16_t>(region() + kDescNum); told != entries)
        return fail(ErrorKind::kInvalid, "the inflight region says that it is for {} descriptors, not {}", told,
                    entries);
    CHECK_OK(settle(size, descriptors));
    CHECK_OK(collect(size, found));
    found.went_on = true;
    found.used = used_;
    return found;
}

/// Ends, or takes back, what was being published.
Result<> PackedInflight::settle(uint32_t size, const std::byte* descriptors) {
    const auto heads = load<uint32_t>(region() + kFree);
    const auto places = load<uint64_t>(region() + kUsed);
    const PackedPlace now{static_cast<uint16_t>(places), (places >> 32 & 0xff) != 0};
    const PackedPlace old{static_cast<uint16_t>(places >> 16), (places >> 40 & 0xff) != 0};
    if (now.slot >= size || old.slot >= size)
        return fail(ErrorKind::kInvalid, "the inflight region knows slots {} and {} of a ring that has {}", now.slot,
                    old.slot, size);
    bool done = false;
    if (now != old) {
        // Published, if the slot is not any more as the driver has made it available.
        const auto flags = load<uint16_t>(descriptors + kDescBytes * old.slot + 14, std::memory_order_acquire);
        done = ((flags & kPackedAvail) != 0) != old.wrap || ((flags & kPackedUsed) != 0) == old.wrap;
    }
    used_ = done ? now : old;
    free_ = static_cast<uint16_t>(done ? heads : heads >> 16);
    store_free(free_, free_);
    store_used(used_, used_);
    return {};
}

/// Every entry is free or belongs to one chain.
Result<> PackedInflight::collect(uint32_t size, Recovered& found) {
    const uint32_t entries = inflight_->queue_size;
    std::vector<bool> seen(entries);
    uint32_t count = 0;
    // An entry that is free is not in flight, even if it is marked so: its chain was not taken altogether.
    for (uint16_t i = free_; i < entries; i = next_[i], count++) {
        if (seen[i]) return fail(ErrorKind::kInvalid, "the free list of the inflight region is a loop");
        seen[i] = true;
        next_[i] = load<uint16_t>(entry(i) + kNext);
        store<uint8_t>(entry(i) + kInflight, 0);
    }
    std::vector<std::pair<uint64_t, std::vector<PackedDescriptor>>> noted;  // counter and chain
    std::vector<uint16_t> ids;
    for (uint32_t head = 0; head < entries; head++) {
        if (seen[head] || load<uint8_t>(entry(head) + kInflight) == 0) continue;
        TRY(auto chain, collect_chain(static_cast<uint16_t>(head), seen));
        ids.push_back(chain.back().id);
        found.slots += static_cast<uint32_t>(chain.size());
        const auto counter = load<uint64_t>(entry(head) + kCounter);
        counter_ = std::max(counter_, counter);
        noted.emplace_back(counter, std::move(chain));
    }
    std::ranges::sort(ids);
    if (const auto twice = std::ranges::adjacent_find(ids); twice != ids.end())
        return fail(ErrorKind::kInvalid, "the inflight region has buffer {} twice", *twice);
    if (count + found.slots != entries)
        return fail(ErrorKind::kInvalid, "the inflight region has lost {} of {} descriptors",
                    entries - count - found.slots, entries);
    if (found.slots > size)
        return fail(ErrorKind::kInvalid, "the inflight region has {} descriptors of a ring of {}", found.slots, size);
    std::ranges::sort(noted, {}, [](const auto& one) { return one.first; });
    for (auto& [counter, chain] : noted) found.chains.push_back(std::move(chain));
    return {};
}

Result<std::vector<PackedDescriptor>> PackedInflight::collect_chain(uint16_t head, std::vector<bool>& seen) {
    const uint32_t entries = inflight_->queue_size;
    const auto length = load<uint16_t>(entry(head) + kNum);
    std::vector<PackedDescriptor> chain;
    uint16_t at = head;
    do {
        if (at >= entries || seen[at])
            return fail(ErrorKind::kInvalid, "the inflight region has a chain at {} that runs into others", head);
        seen[at] = true;
        const auto rest = load<uint64_t>(entry(at) + kDescriptor);
        chain.push_back({.address = load<uint64_t>(entry(at) + kAddress),
                         .length = static_cast<uint32_t>(rest >> 32),
                         .id = static_cast<uint16_t>(rest),
                         .flags = static_cast<uint16_t>(rest >> 16)});
        last_[head] = at;
        at = next_[at] = load<uint16_t>(entry(at) + kNext);
    } while (chain.size() < length);
    if (const auto last = load<uint16_t>(entry(head) + kLast); last != last_[head])
        return fail(ErrorKind::kInvalid, "the inflight region has a chain at {} that ends at {}, not at {}", head,
                    last_[head], last);
    set_head(chain.back().id, head);
    return chain;
}

void PackedInflight::taken(std::span<const PackedDescriptor> chain) {
    // The entries stay in the free list, where nothing that they say counts, until its head moves.
    const uint16_t head = free_;
    uint16_t at = head;
    for (const PackedDescriptor& d : chain) {
        CHECK(at < inflight_->queue_size, "a ring has no more descriptors than its inflight region");
        store<uint64_t>(entry(at) + kDescriptor, d.id | uint64_t{d.flags} << 16 | uint64_t{d.length} << 32);
        store<uint64_t>(entry(at) + kAddress, d.address);
        last_[head] = at;
        at = next_[at];
    }
    std::byte* const e = entry(head);
    store<uint16_t>(e + kLast, last_[head]);
    store<uint16_t>(e + kNum, static_cast<uint16_t>(chain.size()));
    store<uint64_t>(e + kCounter, ++counter_);
    store<uint8_t>(e + kInflight, 1, std::memory_order_release);
    store_free(at, at);
    free_ = at;
    set_head(chain.back().id, head);
}

void PackedInflight::finishing(uint16_t id, PackedPlace used) {
    const uint16_t head = heads_[id];
    next_[last_[head]] = free_;
    store<uint16_t>(entry(last_[head]) + kNext, free_, std::memory_order_release);
    store_free(head, free_);
    store_used(used, used_);
    next_used_ = used;
}

void PackedInflight::finished(uint16_t id) {
    const uint16_t head = heads_[id];
    store<uint8_t>(entry(head) + kInflight, 0, std::memory_order_release);
    // In this order: as long as the places differ, the slot of the ring says that it is done.
    store_free(head, head);
    store_used(next_used_, next_used_);
    free_ = head;
    used_ = next_used_;
}

}  // namespace gantry::virtio
