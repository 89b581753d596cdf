#include "exports/virtio/dirty_log.h"

#include <atomic>

namespace gantry::virtio {

Result<std::shared_ptr<DirtyLog>> DirtyLog::create(int fd, uint64_t offset, uint64_t size) {
    auto mapping = Mapping::create(fd, offset, size);
    if (!mapping) return std::unexpected(std::move(mapping).error().context("mapping the log of dirty pages"));
    return std::shared_ptr<DirtyLog>(new DirtyLog(std::move(*mapping)));
}

void DirtyLog::mark(uint64_t address, uint64_t length) {
    if (length == 0) return;
    const uint64_t pages = mapping_->size() * 8;  // what fits into an address space is far from 2^61
    uint64_t last;
    if (__builtin_add_overflow(address, length - 1, &last)) last = UINT64_MAX;
    for (uint64_t page = address / kPage; page <= last / kPage; page++) {
        if (page >= pages) {
            beyond_.store(true, std::memory_order_relaxed);
            return;
        }
        // The client takes bits away at the same time; what was written before is there when it sees ours.
        std::atomic_ref<uint8_t> byte(reinterpret_cast<uint8_t&>(mapping_->data()[page / 8]));
        byte.fetch_or(static_cast<uint8_t>(1U << (page % 8)), std::memory_order_release);
    }
}

bool DirtyLog::beyond() const { return beyond_.load(std::memory_order_relaxed); }

}  // namespace gantry::virtio
