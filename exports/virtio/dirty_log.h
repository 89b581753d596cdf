// DirtyLog: pages of guest memory that were written, for live migration (vhost-user: SET_LOG_BASE).

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "exports/virtio/guest_memory.h"

namespace gantry::virtio {

/// One bit for each 4096 bytes of guest addresses, in memory shared with the client. mark() on any thread.
class DirtyLog {
  public:
    static constexpr uint64_t kPage = 4096;

    /// kInvalid when the file is too short, or nothing fits; errno.
    static Result<std::shared_ptr<DirtyLog>> create(int fd, uint64_t offset, uint64_t size);
    /// After the bytes were written, before the driver is told. What lies beyond the log is not marked; beyond() tells.
    void mark(uint64_t address, uint64_t length);
    bool beyond() const;
    bool broken() const { return mapping_->broken(); }

  private:
    explicit DirtyLog(std::shared_ptr<Mapping> mapping) : mapping_(std::move(mapping)) {}
    std::shared_ptr<Mapping> mapping_;
    std::atomic<bool> beyond_{false};
};

}  // namespace gantry::virtio
