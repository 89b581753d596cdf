// sd_notify: telling the service manager how we are (sd_notify(3)). One datagram per message; without NOTIFY_SOCKET
// everything is a no-op.

#pragma once

#include <chrono>
#include <span>
#include <string>
#include <string_view>

#include "runtime/error.h"
#include "runtime/loop.h"
#include "runtime/task.h"

namespace gantry::systemd {

/// Main loop only. Failures to send are never fatal.
class Notifier {
  public:
    /// Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID and removes them from the environment.
    static Notifier from_environment();
    Notifier() = default;

    bool active() const { return !socket_path_.empty(); }
    /// Up: listening, start-up exports active.
    void ready(std::string_view status);
    void stopping();
    /// Free text for `systemctl status`; the caller limits how often.
    void status(std::string_view text);
    void watchdog();
    /// Errno of the failure that ends the process.
    void error(int errno_value);
    /// Sends lines as they are ("KEY=value\n...").
    bool send(std::string_view message);
    /// The same with descriptors, which stay ours. What is said here must not be lost: waits a few seconds for a
    /// manager that does not read. Errors: kUnsupported without a manager, kTooLarge for more than kMaxFds, errno.
    Result<> send_descriptors(std::string_view message, std::span<const int> fds);
    static constexpr size_t kMaxFds = 253;  // of one message (SCM_MAX_FD)

    /// Zero: the manager does not watch us. Otherwise a sign of life is due at least every interval.
    std::chrono::microseconds watchdog_interval() const { return watchdog_; }

  private:
    std::string socket_path_;
    std::chrono::microseconds watchdog_{0};
};

}  // namespace gantry::systemd
