#include "exports/vduse/iotlb.h"

#include "runtime/log.h"

namespace gantry::vduse {

Result<virtio::Region> Iotlb::map(uint64_t address) const {
    TRY(const Window window, device_.window(address));
    const uint64_t size = window.last - window.start + 1;
    if (window.last < window.start || size == 0 || address < window.start || address > window.last)
        return fail(ErrorKind::kInvalid, "the kernel maps {:#x}..{:#x} for {:#x}", window.start, window.last, address);
    if (!(window.access & VDUSE_ACCESS_RO))
        return fail(ErrorKind::kUnsupported, "memory at {:#x} can only be written", address);
    const bool writable = (window.access & VDUSE_ACCESS_WO) != 0;
    virtio::Region region;
    TRY(region.mapping, virtio::Mapping::create(window.fd.get(), window.offset, size, writable));
    region.guest = window.start;
    region.size = size;
    region.host = region.mapping->data();
    return region;
}

/// With mutex_ held.
std::shared_ptr<const virtio::GuestMemory> Iotlb::with(uint64_t address) {
    if (memory_ && memory_->at_guest(address, 1)) return memory_;
    auto region = map(address);
    if (!region) {
        log::warn("{}", region.error().message());
        return nullptr;
    }
    std::vector<virtio::Region> regions;
    if (memory_) regions.assign(memory_->regions().begin(), memory_->regions().end());
    regions.push_back(std::move(*region));
    // The kernel says when its table changes: what overlaps without that makes no sense.
    auto memory = virtio::GuestMemory::create(std::move(regions));
    if (!memory) {
        log::warn("VDUSE device '{}': memory at {:#x}: {}", device_.name(), address, memory.error().message());
        return nullptr;
    }
    memory_ = std::move(*memory);
    return memory_;
}

std::shared_ptr<const virtio::GuestMemory> Iotlb::extend(const virtio::GuestMemory&, uint64_t address) {
    const std::lock_guard lock(mutex_);
    return with(address);
}

std::byte* Iotlb::area(uint64_t address, uint64_t length) {
    const std::lock_guard lock(mutex_);
    const auto memory = with(address);
    return memory ? memory->at_guest(address, length) : nullptr;
}

std::shared_ptr<const virtio::GuestMemory> Iotlb::memory() const {
    const std::lock_guard lock(mutex_);
    return memory_;
}

void Iotlb::drop() {
    const std::lock_guard lock(mutex_);
    memory_.reset();
}

}  // namespace gantry::vduse
