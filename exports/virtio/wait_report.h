// WaitReport: says what somebody waits for, when that takes long.

#pragma once

#include <chrono>
#include <functional>

#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::virtio {

/// Calls `say` when over() was not called within `first`, and then every `again`, with the seconds that have passed.
/// over() must have returned before it is destroyed. Main loop.
class WaitReport {
  public:
    explicit WaitReport(std::function<void(std::chrono::seconds)> say,
                        std::chrono::milliseconds first = std::chrono::seconds(5),
                        std::chrono::milliseconds again = std::chrono::seconds(60));
    WaitReport(const WaitReport&) = delete;
    Task<void> over();

  private:
    Task<void> watch(std::chrono::milliseconds first, std::chrono::milliseconds again);

    const std::function<void(std::chrono::seconds)> say_;
    Timer timer_;
    bool over_ = false;
    TaskScope scope_;
};

}  // namespace gantry::virtio
