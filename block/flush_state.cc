#include "block/flush_state.h"

namespace gantry::block {

uint64_t FlushState::ticket() {
    std::lock_guard lock(mutex_);
    return started_ + 1;
}

FlushState::Step FlushState::next(uint64_t ticket, Result<>& result) {
    std::lock_guard lock(mutex_);
    if (sticky_error_) {
        result = std::unexpected(*sticky_error_);
        return Step::kDone;
    }
    if (ended_ >= ticket) {
        if (last_error_) result = std::unexpected(*last_error_);
        return Step::kDone;
    }
    if (running_) return Step::kWait;
    running_ = true;
    started_++;
    return Step::kRun;
}

void FlushState::finish(const Result<>& result, bool sticky) {
    detail::WaiterQueue waiters;
    {
        std::lock_guard lock(mutex_);
        running_ = false;
        ended_ = started_;
        last_error_ = result ? nullptr : std::make_unique<Error>(result.error());
        if (!result && sticky) sticky_error_ = std::make_unique<Error>(result.error());
        std::swap(waiters, waiters_);
    }
    while (detail::Waiter* waiter = waiters.pop()) detail::wake(*waiter);
}

bool FlushState::Awaiter::await_suspend(std::coroutine_handle<> h) {
    std::lock_guard lock(state.mutex_);
    if (!state.running_) return false;
    waiter.handle = h;
    waiter.loop = &Loop::current();
    state.waiters_.push(waiter);
    return true;
}

}  // namespace gantry::block
