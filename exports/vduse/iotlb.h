// Iotlb: the driver's memory, mapped piece by piece when a request touches it.

#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "exports/vduse/device.h"
#include "exports/virtio/guest_memory.h"

namespace gantry::vduse {

/// One for all queues of a device. Any thread.
///
/// The kernel's bounce buffer could be replaced by memory of ours (VDUSE_IOTLB_REG_UMEM). That saves no copy here: the
/// kernel copies between the driver's pages and the buffer in either case, and we read and write the buffer in place,
/// wherever it lies. It would only pin as much memory of this process. It pays for devices that hand the buffer on to
/// something that cannot map the kernel's.
class Iotlb final : public virtio::MemorySource {
  public:
    explicit Iotlb(const Device& device) : device_(device) {}

    std::shared_ptr<const virtio::GuestMemory> extend(const virtio::GuestMemory& known, uint64_t address) override;
    /// What must lie in one piece (an area of a ring); null when it does not.
    std::byte* area(uint64_t address, uint64_t length);
    /// Everything so far; null: nothing.
    std::shared_ptr<const virtio::GuestMemory> memory() const;
    /// The driver's memory has changed: nothing of before holds. No queue takes anything while this is called.
    void drop();

  private:
    std::shared_ptr<const virtio::GuestMemory> with(uint64_t address);
    Result<virtio::Region> map(uint64_t address) const;

    const Device& device_;
    mutable std::mutex mutex_;
    std::shared_ptr<const virtio::GuestMemory> memory_;
};

}  // namespace gantry::vduse
