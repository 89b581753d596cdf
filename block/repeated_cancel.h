// RepeatedCancel: requests that come while others are waited for end, too.

#pragma once

#include <chrono>
#include <functional>

#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::block {

/// How long it waits.
constexpr std::chrono::seconds kCancelAgain{2};

/// Node::cancel_in_flight() means what is in flight: a request that a layer above makes next, or that is on its way
/// between loops, is not reached. `cancel` is called at its construction, `pause` later, and then again and again,
/// every few seconds, until over(), which must have returned before it is destroyed. Main loop.
class RepeatedCancel {
  public:
    explicit RepeatedCancel(std::function<void()> cancel, std::chrono::seconds pause = kCancelAgain);
    RepeatedCancel(const RepeatedCancel&) = delete;
    Task<void> over();

  private:
    Task<void> repeat(std::chrono::seconds pause);

    const std::function<void()> cancel_;
    Timer timer_;
    bool over_ = false;
    TaskScope scope_;
};

}  // namespace gantry::block
