// Call: how a queue tells the driver that chains are done.

#pragma once

#include "runtime/unique_fd.h"

namespace gantry::virtio {

/// signal() on the loop of the queue that has it.
class Call {
  public:
    virtual ~Call() = default;
    /// Never blocks.
    virtual void signal() = 0;
};

/// By an eventfd, which is made non-blocking.
class EventCall final : public Call {
  public:
    explicit EventCall(UniqueFd fd);
    void signal() override;

  private:
    UniqueFd fd_;
};

/// Descriptors from outside that claim to be eventfds: others could block us. Any thread.
bool is_eventfd(int fd);

}  // namespace gantry::virtio
