#include "block/formats/qcow2/decoded_clusters.h"

#include <algorithm>

namespace gantry::block::qcow2 {

std::shared_ptr<DecodedClusters::Entry> DecodedClusters::find_or_begin(uint64_t host_offset, bool& mine) {
    const std::lock_guard lock(mutex_);
    mine = false;
    for (Slot& slot : slots_) {
        if (slot.entry->host_offset != host_offset) continue;
        slot.last_use = ++uses_;
        return slot.entry;
    }
    mine = true;
    auto entry = std::make_shared<Entry>(host_offset);
    if (slots_.size() < capacity_) {
        slots_.push_back({entry, ++uses_});
    } else {
        // An entry still being decoded may go, too: those who wait for it hold it.
        auto oldest = std::ranges::min_element(slots_, {}, &Slot::last_use);
        *oldest = {entry, ++uses_};
    }
    return entry;
}

void DecodedClusters::finish(const std::shared_ptr<Entry>& entry) {
    if (entry->error) {
        const std::lock_guard lock(mutex_);
        std::erase_if(slots_, [&](const Slot& slot) { return slot.entry == entry; });
    }
    entry->done.set();
}

void DecodedClusters::forget(uint64_t host_offset) {
    const std::lock_guard lock(mutex_);
    std::erase_if(slots_, [&](const Slot& slot) { return slot.entry->host_offset == host_offset; });
}

void DecodedClusters::forget_all() {
    const std::lock_guard lock(mutex_);
    slots_.clear();
}

void DecodedClusters::clean() {
    const std::lock_guard lock(mutex_);
    std::erase_if(slots_,
                  [&](const Slot& slot) { return slot.last_use <= uses_at_cleaning_ && slot.entry->done.is_set(); });
    uses_at_cleaning_ = uses_;
}

size_t DecodedClusters::size() const {
    const std::lock_guard lock(mutex_);
    return slots_.size();
}

}  // namespace gantry::block::qcow2
