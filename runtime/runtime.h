// Runtime: the main loop, the I/O loops and the blocking pool of a process.

#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "runtime/blocking_pool.h"
#include "runtime/loop.h"

namespace gantry {

struct RuntimeOptions {
    IoBackendKind backend = IoBackendKind::kAuto;
    unsigned io_loops = 1;  // threads besides the main one; 0: the main loop serves I/O too
    unsigned pool_threads = 16;
    std::optional<std::chrono::nanoseconds> poll_max;  // of the shared I/O loops, see LoopOptions
};

/// Created on the main thread, which then runs main_loop().run(). Loops may be added at run time (iothread objects).
class Runtime {
  public:
    static Result<std::unique_ptr<Runtime>> create(RuntimeOptions options);
    /// Stops and joins the I/O loops. Nothing may be in flight on them.
    ~Runtime();

    Loop& main_loop() { return *main_; }
    /// The shared I/O loops that exports without an iothread are dealt over (the main loop itself when io_loops is 0).
    /// Main loop only.
    std::span<Loop* const> io_loops() const { return shared_; }
    /// A further loop with a thread of its own; stays until remove_loop(). Main loop only.
    Result<Loop*> add_loop(std::string name, std::optional<std::chrono::nanoseconds> poll_max);
    /// Stops and joins it; nothing uses it any more. Main loop only.
    void remove_loop(Loop* loop);
    BlockingPool& pool() { return *pool_; }
    /// Every loop with a thread (main first); for watchdog pings. Main loop only.
    std::vector<Loop*> all_loops();
    /// One line for the log: which back end was taken and why.
    const std::string& backend_reason() const { return backend_reason_; }

  private:
    struct Threaded {
        std::unique_ptr<Loop> loop;
        std::thread thread;
    };
    Runtime() = default;
    RuntimeOptions options_;
    std::unique_ptr<BlockingPool> pool_;
    std::unique_ptr<Loop> main_;
    std::vector<Threaded> threads_;
    std::vector<Loop*> shared_;
    std::string backend_reason_;
};

/// "auto", "io_uring", "epoll" -> kind; kInvalid otherwise.
Result<IoBackendKind> parse_io_backend(std::string_view text);
/// "auto", "off" or nanoseconds up to a second -> RuntimeOptions::poll_max; kInvalid otherwise.
Result<std::optional<std::chrono::nanoseconds>> parse_io_poll(std::string_view text);

}  // namespace gantry
