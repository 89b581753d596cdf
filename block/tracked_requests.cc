#include "block/tracked_requests.h"

#include "runtime/check.h"

namespace gantry::block {

TrackedRequests::~TrackedRequests() { CHECK(!first_, "a node is destroyed while requests are tracked on it"); }

TrackedRequests::Entry::Entry(TrackedRequests& owner, uint64_t begin, uint64_t end, bool serialising)
    : owner_(owner), begin_(begin), end_(end), serialising_(serialising) {
    std::lock_guard lock(owner_.mutex_);
    prev_ = owner_.last_;
    (prev_ ? prev_->next_ : owner_.first_) = this;
    owner_.last_ = this;
    if (serialising_) owner_.serialising_++;
}

TrackedRequests::Entry::~Entry() {
    detail::WaiterQueue waiters;
    {
        std::lock_guard lock(owner_.mutex_);
        (prev_ ? prev_->next_ : owner_.first_) = next_;
        (next_ ? next_->prev_ : owner_.last_) = prev_;
        if (serialising_) owner_.serialising_--;
        std::swap(waiters, waiters_);
    }
    while (detail::Waiter* waiter = waiters.pop()) detail::wake(*waiter);
}

void TrackedRequests::Entry::shrink(uint64_t end) {
    detail::WaiterQueue waiters;
    {
        std::lock_guard lock(owner_.mutex_);
        if (end >= end_) return;
        if (end <= begin_) begin_ = end = 0;  // overlaps nothing
        end_ = end;
        std::swap(waiters, waiters_);
    }
    while (detail::Waiter* waiter = waiters.pop()) detail::wake(*waiter);
}

TrackedRequests::Entry* TrackedRequests::blocker_of(const Entry& entry) const {
    if (serialising_ == 0) return nullptr;
    for (Entry* other = entry.prev_; other; other = other->prev_) {
        if (!entry.serialising_ && !other->serialising_) continue;
        if (other->begin_ < entry.end_ && entry.begin_ < other->end_) return other;
    }
    return nullptr;
}

bool TrackedRequests::Entry::blocked() const {
    std::lock_guard lock(owner_.mutex_);
    return owner_.blocker_of(*this) != nullptr;
}

bool TrackedRequests::Entry::Awaiter::await_suspend(std::coroutine_handle<> h) {
    std::lock_guard lock(entry.owner_.mutex_);
    Entry* blocker = entry.owner_.blocker_of(entry);
    if (!blocker) return false;
    waiter.handle = h;
    waiter.loop = &Loop::current();
    blocker->waiters_.push(waiter);
    return true;
}

}  // namespace gantry::block
