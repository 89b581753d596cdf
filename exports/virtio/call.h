// Call: how a queue tells the driver that chains are done.

#pragma once

#include <utility>

#include "exports/virtio/shared_eventfd.h"
#include "runtime/unique_fd.h"

namespace gantry::virtio {

/// signal() on the loop of the queue that has it.
class Call {
  public:
    virtual ~Call() = default;
    /// Never blocks.
    virtual void signal() = 0;
};

/// By an eventfd, which others may have, too.
class EventCall final : public Call {
  public:
    explicit EventCall(UniqueFd fd) : fd_(std::move(fd)) {}
    void signal() override { raise_eventfd(fd_.get()); }

  private:
    UniqueFd fd_;
};

}  // namespace gantry::virtio
