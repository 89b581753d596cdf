// Inflight: chains that were taken and not answered, noted in memory that outlives this process (the front end of a
// vhost-user device keeps it: "Inflight I/O tracking" of the vhost-user specification).

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "exports/virtio/guest_memory.h"
#include "runtime/unique_fd.h"

namespace gantry::virtio {

/// The file with one region for each queue. Main loop only.
class InflightFile {
  public:
    /// A new one, zeroed, sealed against shrinking. kInvalid for no queues or sizes that we do not serve; errno.
    static Result<std::shared_ptr<InflightFile>> create(uint16_t queues, uint16_t queue_size, bool packed);
    /// One that a process before this one has made (or that claims so): untrusted. kInvalid when the file is too short
    /// for `queues` regions of `queue_size` descriptors.
    static Result<std::shared_ptr<InflightFile>> adopt(UniqueFd fd, uint64_t offset, uint64_t size, uint16_t queues,
                                                       uint16_t queue_size, bool packed);
    int fd() const { return fd_.get(); }
    uint64_t size() const { return size_; }
    uint16_t queues() const { return queues_; }
    uint16_t queue_size() const { return queue_size_; }
    bool packed() const { return packed_; }
    /// Null for a queue that it has no region for.
    std::byte* region(size_t queue) const;
    /// The driver has begun anew (a reset): what the region of its queue says means nothing any more. While no ring
    /// uses it.
    void forget(size_t queue) const;
    /// Whether a ring has begun to use it (and nothing was forgotten since).
    bool in_use(size_t queue) const;
    /// Whether a ring had begun to use it, and forget() came after that.
    bool forgotten(size_t queue) const;
    /// Bytes that create() makes for these.
    static uint64_t size_of(uint16_t queues, uint16_t queue_size, bool packed);
    const std::shared_ptr<Mapping>& mapping() const { return mapping_; }

  private:
    InflightFile() = default;
    UniqueFd fd_;
    std::shared_ptr<Mapping> mapping_;
    uint64_t size_ = 0;
    uint16_t queues_ = 0;
    uint16_t queue_size_ = 0;
    bool packed_ = false;
};

/// The region of one queue, handed to its Ring, which alone knows when what is to be written (split_ring.cc,
/// packed_ring.cc). Own loop only.
struct Inflight {
    std::shared_ptr<InflightFile> file;
    std::byte* region = nullptr;
    uint16_t queue_size = 0;
};

}  // namespace gantry::virtio
