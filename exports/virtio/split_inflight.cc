#include "exports/virtio/split_inflight.h"

#include <algorithm>

namespace gantry::virtio {

Result<bool> SplitInflight::recover(uint32_t size, uint16_t used, std::vector<uint16_t>& unanswered) {
    const uint32_t entries = inflight_->queue_size;
    const auto version = load<uint16_t>(region() + kVersion);
    if (version > 1) return fail(ErrorKind::kInvalid, "the inflight region has version {}; 1 is known", version);
    if (version == 0) {
        for (uint32_t i = 0; i < entries; i++) store<uint8_t>(entry(i) + kInflight, 0);
        store<uint16_t>(region() + kDescNum, static_cast<uint16_t>(entries));
        store<uint16_t>(region() + kLastBatchHead, 0);
        store<uint16_t>(region() + kUsedIndex, used);
        store<uint16_t>(region() + kVersion, 1, std::memory_order_release);
        return false;
    }
    if (const auto told = load<uint16_t>(region() + kDescNum); told != entries)
        return fail(ErrorKind::kInvalid, "the inflight region says that it is for {} descriptors, not {}", told,
                    entries);

    std::vector<bool> open(entries);
    size_t count = 0;
    for (uint32_t i = 0; i < entries; i++) {
        open[i] = load<uint8_t>(entry(i) + kInflight) != 0;
        count += open[i];
    }
    // With nothing open, whatever else stands there means nothing: the driver may have begun anew meanwhile.
    if (count != 0) {
        // The batch that was published last, if its entries were not all closed.
        const auto batch = static_cast<uint16_t>(used - load<uint16_t>(region() + kUsedIndex));
        if (batch > entries)
            return fail(ErrorKind::kInvalid, "the inflight region knows used index {} of a ring that is at {}",
                        load<uint16_t>(region() + kUsedIndex), used);
        uint16_t head = load<uint16_t>(region() + kLastBatchHead);
        for (uint16_t i = 0; i < batch; i++) {
            if (head >= entries)
                return fail(ErrorKind::kInvalid, "the inflight region links to descriptor {} of {}", head, entries);
            if (open[head]) {
                open[head] = false;
                store<uint8_t>(entry(head) + kInflight, 0, std::memory_order_release);
            }
            head = load<uint16_t>(entry(head) + kNext);
        }
    }
    store<uint16_t>(region() + kUsedIndex, used, std::memory_order_release);

    std::vector<std::pair<uint64_t, uint16_t>> noted;  // counter and head
    for (uint32_t i = 0; i < entries; i++) {
        if (!open[i]) continue;
        if (i >= size)
            return fail(ErrorKind::kInvalid, "the inflight region names descriptor {} of a ring that has {}", i, size);
        noted.push_back({load<uint64_t>(entry(i) + kCounter), static_cast<uint16_t>(i)});
        counter_ = std::max(counter_, noted.back().first);
    }
    std::ranges::sort(noted);
    for (const auto& [counter, head] : noted) unanswered.push_back(head);
    return true;
}

}  // namespace gantry::virtio
