// Signals as events of the main loop.

#pragma once

#include "runtime/error.h"
#include "runtime/io.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"

namespace gantry {

/// Blocks SIGTERM, SIGINT and SIGHUP in the calling thread, and so in all threads it starts, and ignores SIGPIPE. On
/// the main thread, before any other exists.
void block_signals();
/// For a child between fork and exec: undoes block_signals().
void unblock_signals();

/// The signals that block_signals() holds back, one by one. One waiter; main loop only.
class SignalWaiter {
  public:
    static Result<SignalWaiter> create();
    SignalWaiter(SignalWaiter&&) noexcept = default;
    /// The number of the next signal (SIGTERM, SIGINT, SIGHUP); 0 after cancel().
    Task<int> next();
    /// The last one came from the kernel, as Ctrl-C does: every process of the terminal's foreground job got it.
    bool by_terminal() const { return by_terminal_; }
    /// Ends the wait, and every later one.
    void cancel();

  private:
    explicit SignalWaiter(UniqueFd fd) : fd_(std::move(fd)) {}
    UniqueFd fd_;
    CancellableIo* waiting_ = nullptr;
    bool cancelled_ = false;
    bool by_terminal_ = false;
};

}  // namespace gantry
