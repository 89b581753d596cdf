#include "runtime/timer.h"

#include "runtime/loop_impl.h"
#include "runtime/timer_queue.h"

namespace gantry {

bool TimerQueue::before(const Timer* a, const Timer* b) {
    return a->deadline_ != b->deadline_ ? a->deadline_ < b->deadline_ : a->sequence_ < b->sequence_;
}

void TimerQueue::place(size_t index, Timer* t) {
    heap_[index] = t;
    t->heap_index_ = index;
}

void TimerQueue::sift_up(size_t index) {
    Timer* t = heap_[index];
    while (index > 0) {
        const size_t parent = (index - 1) / 2;
        if (!before(t, heap_[parent])) break;
        place(index, heap_[parent]);
        index = parent;
    }
    place(index, t);
}

void TimerQueue::sift_down(size_t index) {
    Timer* t = heap_[index];
    for (;;) {
        size_t child = 2 * index + 1;
        if (child >= heap_.size()) break;
        if (child + 1 < heap_.size() && before(heap_[child + 1], heap_[child])) ++child;
        if (!before(heap_[child], t)) break;
        place(index, heap_[child]);
        index = child;
    }
    place(index, t);
}

void TimerQueue::add(Timer& t) {
    t.sequence_ = sequence_++;
    heap_.push_back(&t);
    sift_up(heap_.size() - 1);
}

void TimerQueue::remove(Timer& t) {
    const size_t index = t.heap_index_;
    Timer* last = heap_.back();
    heap_.pop_back();
    if (last == &t) return;
    place(index, last);
    sift_up(index);
    sift_down(last->heap_index_);
}

void TimerQueue::expire(Loop& loop, Clock::time_point now) {
    while (!heap_.empty() && heap_.front()->deadline_ <= now) {
        Timer& t = *heap_.front();
        remove(t);
        t.expired_ = true;
        loop.ready(std::exchange(t.waiter_, {}));
    }
}

Clock::time_point TimerQueue::next_deadline() const {
    return heap_.empty() ? Clock::time_point::max() : heap_.front()->deadline_;
}

void Timer::Awaiter::await_suspend(std::coroutine_handle<> h) {
    CHECK(!timer.waiter_, "one sleeper per timer");
    timer.loop_ = &Loop::current();
    timer.waiter_ = h;
    timer.expired_ = false;
    timer.loop_->impl().timers.add(timer);
}

void Timer::cancel() {
    if (!waiter_) return;
    CHECK(loop_->in_loop(), "a timer is cancelled on its own loop");
    loop_->impl().timers.remove(*this);
    loop_->ready(std::exchange(waiter_, {}));
}

Task<void> sleep_for(std::chrono::nanoseconds delay) {
    Timer timer;
    co_await timer.after(delay);
}

}  // namespace gantry
