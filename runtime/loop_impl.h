// The inside of Loop. Used by loop.cc, timer.cc and the back ends only.

#pragma once

#include <atomic>
#include <vector>

#include "runtime/loop.h"
#include "runtime/timer_queue.h"

namespace gantry {

/// FIFO of coroutines to resume: a ring of power-of-two size that grows.
class ReadyList {
  public:
    ReadyList() : slots_(256) {}
    bool empty() const { return head_ == tail_; }
    size_t size() const { return tail_ - head_; }
    void push(std::coroutine_handle<> h) {
        if (size() == slots_.size()) [[unlikely]]
            grow();
        slots_[tail_++ & (slots_.size() - 1)] = h;
    }
    std::coroutine_handle<> pop() { return slots_[head_++ & (slots_.size() - 1)]; }

  private:
    void grow() {
        std::vector<std::coroutine_handle<>> bigger(slots_.size() * 2);
        const size_t n = size();
        for (size_t i = 0; i < n; ++i) bigger[i] = slots_[(head_ + i) & (slots_.size() - 1)];
        slots_.swap(bigger);
        head_ = 0;
        tail_ = n;
    }
    std::vector<std::coroutine_handle<>> slots_;
    size_t head_ = 0;
    size_t tail_ = 0;
};

/// The posted items are a stack that any thread pushes to and the loop takes as a whole. Who pushes onto the empty
/// stack looks whether the loop sleeps; the loop announces its sleep first and looks at the stack afterwards. So one of
/// the two sees the other.
struct Loop::Impl {
    // Own loop only.
    ReadyList ready;
    TimerQueue timers;
    Poller* pollers = nullptr;
    PostItem* batch = nullptr;  // taken from `posted`, in order, not run yet
    std::chrono::nanoseconds poll_time{0};
    bool heeds_stop = false;  // inside run()
    bool trimmed = true;      // the thread's buffer cache was given back since the last work

    // Shared with posting threads; a cache line of their own.
    alignas(64) std::atomic<PostItem*> posted{nullptr};
    std::atomic<bool> sleeping{false};
    std::atomic<bool> stop{false};
    std::atomic<uint32_t> posting{0};  // threads inside post(): the destructor waits for them

    bool has_posted() const { return batch != nullptr || posted.load(std::memory_order_seq_cst) != nullptr; }
    bool stopping() const { return heeds_stop && stop.load(std::memory_order_seq_cst); }
    void take_posted();
};

}  // namespace gantry
