// RepeatedCancel: requests that come while others are waited for end, too.

#pragma once

#include <functional>

#include "block/node.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::block {

/// Node::cancel_in_flight() means what is in flight: a request that a layer above makes next, or that is on its way
/// between loops, is not reached. From its construction on, `cancel` is called, again and again, every few seconds;
/// until over(), which must have returned before it is destroyed. Main loop.
class RepeatedCancel {
  public:
    explicit RepeatedCancel(std::function<void()> cancel);
    RepeatedCancel(const RepeatedCancel&) = delete;
    Task<void> over();

  private:
    Task<void> repeat();

    const std::function<void()> cancel_;
    Timer timer_;
    bool over_ = false;
    TaskScope scope_;
};

/// How long it waits, and others that do the same.
constexpr std::chrono::seconds kCancelAgain{2};

}  // namespace gantry::block
