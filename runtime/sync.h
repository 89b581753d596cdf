// Synchronisation between coroutines of any loops. Wake-ups go through the waiter's loop's ready list, never inline.

#pragma once

#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

#include "runtime/loop.h"

namespace gantry {

namespace detail {
/// A suspended coroutine in a queue; lives in its frame. PostItem's link serves the queue first, the post afterwards.
struct Waiter : PostItem {
    std::coroutine_handle<> handle;
    Loop* loop = nullptr;
};
/// FIFO of waiters; the owner's lock guards it.
struct WaiterQueue {
    Waiter* head = nullptr;
    Waiter* tail = nullptr;
    void push(Waiter& w);
    Waiter* pop();
    Waiter* front() const { return head; }
    bool empty() const { return head == nullptr; }
};
/// Posts the waiter to its loop (ready list when that is the current one). The Waiter may be gone when this returns.
void wake(Waiter& w);
}  // namespace detail

/// FIFO mutex held across co_await. Any loop. `auto guard = co_await mutex.lock();`
class AsyncMutex {
  public:
    class [[nodiscard]] Guard {
      public:
        Guard() = default;
        Guard(Guard&& o) noexcept : mutex_(std::exchange(o.mutex_, nullptr)) {}
        Guard& operator=(Guard&& o) noexcept {
            if (this != &o) {
                unlock();
                mutex_ = std::exchange(o.mutex_, nullptr);
            }
            return *this;
        }
        ~Guard() { unlock(); }
        void unlock() {
            if (mutex_) std::exchange(mutex_, nullptr)->unlock();
        }
        explicit operator bool() const { return mutex_ != nullptr; }

      private:
        friend class AsyncMutex;
        explicit Guard(AsyncMutex* mutex) : mutex_(mutex) {}
        AsyncMutex* mutex_ = nullptr;
    };

    AsyncMutex() = default;
    AsyncMutex(const AsyncMutex&) = delete;
    ~AsyncMutex() { GANTRY_CHECK(!locked_, "an AsyncMutex is destroyed while held"); }

    struct Awaiter {
        AsyncMutex& mutex;
        detail::Waiter waiter;
        bool await_ready() { return mutex.try_acquire(); }
        bool await_suspend(std::coroutine_handle<> h);
        Guard await_resume() { return Guard(&mutex); }
    };
    Awaiter lock() { return Awaiter{*this, {}}; }
    /// An empty guard when somebody holds it.
    Guard try_lock() { return try_acquire() ? Guard(this) : Guard(); }

  private:
    bool try_acquire();
    void unlock();
    std::mutex m_;
    bool locked_ = false;
    detail::WaiterQueue queue_;
};

/// Manual-reset event. Any loop. `co_await event.wait();` returns at once while set.
class AsyncEvent {
  public:
    void set();
    void reset();
    bool is_set() const;

    struct Awaiter {
        AsyncEvent& event;
        detail::Waiter waiter;
        bool await_ready() { return event.is_set(); }
        bool await_suspend(std::coroutine_handle<> h);
        void await_resume() const noexcept {}
    };
    Awaiter wait() { return Awaiter{*this, {}}; }

  private:
    mutable std::mutex m_;
    bool set_ = false;
    detail::WaiterQueue queue_;
};

/// A queue of sleepers without state: wait() always suspends until a later notify. Any loop; the usual pattern is
/// `while (!condition) co_await queue.wait();` with the condition only changed on the same loop.
class WaitQueue {
  public:
    struct Awaiter {
        WaitQueue& queue;
        detail::Waiter waiter;
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> h);
        void await_resume() const noexcept {}
    };
    Awaiter wait() { return Awaiter{*this, {}}; }
    void notify_one();
    void notify_all();
    bool empty() const;

  private:
    mutable std::mutex m_;
    detail::WaiterQueue queue_;
};

/// Counting semaphore, FIFO. Any loop. acquire(n) waits until n units are free; n <= the initial count.
class AsyncSemaphore {
  public:
    explicit AsyncSemaphore(uint64_t units) : free_(units) {}
    struct Awaiter {
        AsyncSemaphore& semaphore;
        uint64_t units;
        struct UnitWaiter : detail::Waiter {
            uint64_t units = 0;
        } waiter;
        bool await_ready();
        bool await_suspend(std::coroutine_handle<> h);
        void await_resume() const noexcept {}
    };
    Awaiter acquire(uint64_t units = 1) { return Awaiter{*this, units, {}}; }
    void release(uint64_t units = 1);

  private:
    std::mutex m_;
    uint64_t free_;
    detail::WaiterQueue queue_;
};

}  // namespace gantry
