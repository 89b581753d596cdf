// Loop: one thread, one ready list, one I/O back end (io_uring, or epoll with the blocking pool).

#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <coroutine>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "runtime/error.h"
#include "runtime/poller.h"
#include "runtime/task.h"

namespace gantry {

class Loop;
class BlockingPool;

using Clock = std::chrono::steady_clock;

enum class IoBackendKind : uint8_t { kAuto, kIoUring, kEpoll };

/// One I/O operation; lives in the awaiting coroutine's frame. `result` >= 0 or -errno.
struct IoOp {
    // clang-format off
    enum class Kind : uint8_t { kRead, kWrite, kFsync, kFdatasync, kFallocate, kRecv, kSend, kSendmsg, kRecvmsg, kAccept, kConnect, kPoll, kCommand };
    Kind kind;
    int fd = -1;
    union {
        struct { const iovec* iov; uint32_t count; int flags; uint64_t offset; } rw;       // kRead, kWrite (RWF_* flags)
        struct { int mode; uint64_t offset; uint64_t length; } falloc;                      // kFallocate
        struct { void* data; size_t size; int flags; } buf;                                 // kRecv, kSend
        struct { msghdr* msg; int flags; } msg;                                             // kSendmsg, kRecvmsg
        struct { sockaddr* addr; socklen_t* addrlen; int flags; socklen_t len; } sock;      // kAccept, kConnect
        struct { uint32_t events; } poll;                                                   // kPoll (POLLIN ...)
        struct { const void* data; uint32_t size, op; const iovec* iov; uint32_t count; } command;  // kCommand (see io_command)
    };
    // clang-format on
    int32_t result = 0;
    std::coroutine_handle<> waiter;
    // Back end bookkeeping.
    IoOp* next = nullptr;
    IoOp* prev = nullptr;
    uint32_t state = 0;

    IoOp() : rw{} {}
};

/// The one interface of the two back ends. Own loop only, except wake().
class IoBackend {
  public:
    virtual ~IoBackend() = default;
    virtual std::string_view name() const = 0;
    /// Starts `op`. True: it completed at once (result is set, the waiter is not resumed by the back end). False: the
    /// waiter is put on the loop's ready list when it completes.
    virtual bool submit(IoOp& op) = 0;
    /// Asks for a socket or poll operation to end early with -ECANCELED; it still completes through the normal path.
    virtual void cancel(IoOp& op) = 0;
    /// Submits what is queued, waits until something completes, wake() was called or `deadline` passed
    /// (time_point::max(): none; time_point::min(): do not wait), and reaps everything.
    virtual void wait(Clock::time_point deadline) = 0;
    /// Any thread: makes a wait() in progress, or the next one, return.
    virtual void wake() = 0;
    /// The descriptor is about to be closed: forget registrations of it. No operation on it is in flight.
    virtual void forget_fd(int fd) = 0;
    /// The calling thread begins or stops to run the loop.
    virtual void attach() {}
    virtual void detach() {}
    /// Operations that were started and have not completed.
    virtual size_t in_flight() const = 0;
};

struct LoopOptions {
    std::string name = "loop";
    IoBackendKind backend = IoBackendKind::kAuto;
    BlockingPool* pool = nullptr;  // required
    /// Adaptive busy polling before sleeping, at most so long; 0: the loop never polls. Not set: only for what
    /// expect_soon() announces.
    std::optional<std::chrono::nanoseconds> poll_max;
};

/// A timer or an operation of another loop to be run here. Intrusive; see Loop::post.
struct PostItem {
    void (*run)(PostItem*) = nullptr;
    PostItem* next = nullptr;
};

/// A turn: reap completions, run posted items, expired timers and the ready list until empty (bounded), then submit and
/// wait. Unless said otherwise functions are for the loop's own thread only.
class Loop {
  public:
    /// kUnsupported when the asked back end is not available here (the text says why). kAuto tries io_uring, then
    /// epoll.
    static Result<std::unique_ptr<Loop>> create(LoopOptions options);
    ~Loop();
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;

    /// The loop of the calling thread; CHECKs that there is one.
    static Loop& current();
    static Loop* current_or_null();

    /// Runs turns on the calling thread until stop(). May be called again after it returned, on the same thread: the
    /// first thread that runs a loop (here or by run_until_complete) is its thread for good.
    void run();
    /// Runs turns until `task` is done (tests, start-up). The calling thread must not be inside another loop.
    template <class T>
    T run_until_complete(Task<T> task);
    /// Any thread.
    void stop();
    bool in_loop() const { return current_or_null() == this; }

    /// Resumes `h` later in this or the next turn (never inline).
    void ready(std::coroutine_handle<> h);
    /// Any thread: runs the item, or resumes the handle, on this loop, never inline. What another thread posts runs in
    /// its order. One wake-up system call at most, and only when the loop sleeps.
    void post(PostItem& item);
    void post(std::coroutine_handle<> h);
    void post(std::function<void()> fn);

    /// Starts an operation; the awaiter (runtime/io.h) calls it. See IoBackend::submit.
    bool submit(IoOp& op) { return backend_->submit(op); }
    void cancel(IoOp& op) { backend_->cancel(op); }
    void forget_fd(int fd) { backend_->forget_fd(fd); }

    const std::string& name() const { return options_.name; }
    std::string_view backend_name() const { return backend_->name(); }
    bool is_io_uring() const { return is_io_uring_; }
    BlockingPool& pool() const { return *options_.pool; }
    /// Any thread. Upper bound of adaptive busy polling; 0 = off.
    void set_poll_max(std::chrono::nanoseconds ns) { poll_max_ns_.store(ns.count(), std::memory_order_relaxed); }
    std::chrono::nanoseconds poll_max() const {
        return std::chrono::nanoseconds(poll_max_ns_.load(std::memory_order_relaxed));
    }
    /// What this loop waits for next should come within `limit` (the next request of a peer that answers at once): the
    /// next wait polls so long before it sleeps. Tried rarely while that does not pay. Counts for one
    /// wait; without effect on a loop with a poll_max of its own.
    void expect_soon(std::chrono::nanoseconds limit) {
        if (!options_.poll_max) expected_within_ = std::max(expected_within_, limit);
    }
    /// From now on `poller` is looked at; until remove_poller(), which it outlives. Not from inside its functions.
    void add_poller(Poller& poller);
    void remove_poller(Poller& poller);
    /// Kernel thread id once run() was entered, else 0. Any thread.
    int thread_id() const { return tid_.load(std::memory_order_relaxed); }
    /// Time at the start of this turn (cheap).
    Clock::time_point turn_time() const { return turn_time_; }
    /// Turns begun so far.
    uint64_t turns() const { return turns_; }
    /// Coroutines on the ready list (drivers that batch look at it).
    bool has_ready() const;
    /// The loop's thread stays on the CPU that `tid`, whose requests it answers one by one, ran on last: to hand over
    /// between two CPUs costs more than such a request. False when that cannot be found out, is not allowed, or the
    /// loop polls by its poll_max. Costs some 10 us. Ends by itself after kFollowTurns turns, unless it is asked for
    /// again: the client may be gone, and others be served.
    bool follow(int tid);
    /// The end of follow().
    void unfollow();
    bool following() const { return following_ >= 0; }
    static constexpr uint64_t kFollowTurns = 16384;

    struct Impl;
    Impl& impl() { return *impl_; }

  private:
    Loop();
    void turn(const bool* done);
    void idle();
    bool poll_until(Clock::time_point deadline);
    bool poll_for_expected(Clock::time_point next_timer);
    bool look_at_pollers();
    void sleep(Clock::time_point deadline);
    void run_while(const bool& done);

    LoopOptions options_;
    std::unique_ptr<Impl> impl_;
    std::unique_ptr<IoBackend> backend_;
    std::atomic<int64_t> poll_max_ns_{0};
    std::atomic<int> tid_{0};
    Clock::time_point turn_time_{};
    bool is_io_uring_ = false;
    int following_ = -1;  // a CPU; own loop only, as is the rest
    uint64_t turns_ = 0;
    uint64_t follow_until_ = 0;  // turn
    std::chrono::nanoseconds expected_within_{0};
    uint32_t vain_polls_ = 0;  // in a row, of expect_soon()
    uint32_t polls_to_skip_ = 0;
};

namespace detail {
template <class T>
Task<void> store_and_flag(Task<T> task, std::optional<T>* value, bool* done) {
    value->emplace(co_await std::move(task));
    *done = true;
}
inline Task<void> run_and_flag(Task<void> task, bool* done) {
    co_await std::move(task);
    *done = true;
}
/// Starts a task that nobody awaits; used by run_until_complete only (it outlives the task).
void start_root(Loop& loop, Task<void> task);
}  // namespace detail

template <class T>
T Loop::run_until_complete(Task<T> task) {
    bool done = false;
    if constexpr (std::is_void_v<T>) {
        detail::start_root(*this, detail::run_and_flag(std::move(task), &done));
        run_while(done);
    } else {
        std::optional<T> value;
        detail::start_root(*this, detail::store_and_flag<T>(std::move(task), &value, &done));
        run_while(done);
        return std::move(*value);
    }
}

}  // namespace gantry
