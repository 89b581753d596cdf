// Timers of a loop.

#pragma once

#include <chrono>
#include <coroutine>

#include "runtime/loop.h"

namespace gantry {

/// Now + `delay`; a delay too long for the clock means never.
inline Clock::time_point deadline_in(std::chrono::nanoseconds delay) {
    const auto now = Clock::now();
    return delay > Clock::time_point::max() - now ? Clock::time_point::max() : now + delay;
}

/// A sleep that can be cut short: `Timer t; bool expired = co_await t.until(deadline);`, `t.cancel()` from another
/// coroutine of the same loop makes it return false. Reusable; must be idle when destroyed.
class Timer {
  public:
    Timer() = default;
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    ~Timer() { GANTRY_CHECK(!waiter_, "a timer is destroyed while somebody sleeps on it"); }

    struct Awaiter {
        Timer& timer;
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> h);
        bool await_resume() const noexcept { return timer.expired_; }
    };
    Awaiter until(Clock::time_point deadline) {
        deadline_ = deadline;
        return Awaiter{*this};
    }
    Awaiter after(std::chrono::nanoseconds delay) { return until(deadline_in(delay)); }
    /// Does nothing when nobody sleeps. The sleeper is resumed by the ready list.
    void cancel();
    bool armed() const { return static_cast<bool>(waiter_); }

  private:
    friend class Loop;
    friend struct TimerQueue;
    Loop* loop_ = nullptr;
    Clock::time_point deadline_{};
    std::coroutine_handle<> waiter_;
    size_t heap_index_ = 0;
    uint64_t sequence_ = 0;  // equal deadlines expire in the order of their arming
    bool expired_ = false;
};

/// Plain sleep on the current loop.
Task<void> sleep_for(std::chrono::nanoseconds delay);

/// Lets other ready coroutines of this loop run first.
struct YieldAwaiter {
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) const { Loop::current().ready(h); }
    void await_resume() const noexcept {}
};
inline YieldAwaiter yield_turn() { return {}; }

}  // namespace gantry
