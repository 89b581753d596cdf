// Watchdog: signs of life for the service manager, only while every loop answers.

#pragma once

#include <memory>

#include "runtime/runtime.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"
#include "systemd/notify.h"

namespace gantry::systemd {

/// Every half interval: if every loop of the runtime has answered the ping of the last round, WATCHDOG=1 is sent and a
/// new round of pings goes out. A loop that hangs ends the signs of life. Main loop only.
class Watchdog {
  public:
    Watchdog(Runtime& runtime, Notifier& notifier) : runtime_(runtime), notifier_(notifier) {}
    /// Does nothing when the manager asked for no watchdog.
    void start();
    Task<void> stop();

  private:
    Task<void> run();
    Runtime& runtime_;
    Notifier& notifier_;
    Timer timer_;
    TaskScope scope_;
    bool stopping_ = false;
};

}  // namespace gantry::systemd
