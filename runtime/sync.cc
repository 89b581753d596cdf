#include "runtime/sync.h"

namespace gantry {

namespace detail {

void WaiterQueue::push(Waiter& w) {
    w.next = nullptr;
    if (tail) {
        tail->next = &w;
    } else {
        head = &w;
    }
    tail = &w;
}

Waiter* WaiterQueue::pop() {
    Waiter* w = head;
    if (!w) return nullptr;
    head = static_cast<Waiter*>(w->next);
    if (!head) tail = nullptr;
    return w;
}

void wake(Waiter& w) {
    Loop& loop = *w.loop;
    if (loop.in_loop()) {
        loop.ready(w.handle);
        return;
    }
    w.run = [](PostItem* item) { static_cast<Waiter*>(item)->handle.resume(); };
    loop.post(static_cast<PostItem&>(w));
}

namespace {

void wake_all(WaiterQueue queue) {
    while (Waiter* w = queue.pop()) wake(*w);
}

void enqueue(WaiterQueue& queue, Waiter& w, std::coroutine_handle<> h) {
    w.handle = h;
    w.loop = &Loop::current();
    queue.push(w);
}

}  // namespace

}  // namespace detail

// AsyncMutex. unlock() hands the mutex to the first waiter while it stays locked, so nobody can barge in between.

bool AsyncMutex::try_acquire() {
    std::lock_guard lock(m_);
    if (locked_) return false;
    locked_ = true;
    return true;
}

bool AsyncMutex::Awaiter::await_suspend(std::coroutine_handle<> h) {
    std::lock_guard lock(mutex.m_);
    if (!mutex.locked_) {
        mutex.locked_ = true;
        return false;
    }
    detail::enqueue(mutex.queue_, waiter, h);
    return true;
}

void AsyncMutex::unlock() {
    detail::Waiter* next;
    {
        std::lock_guard lock(m_);
        next = queue_.pop();
        if (!next) locked_ = false;
    }
    if (next) detail::wake(*next);
}

// AsyncEvent

bool AsyncEvent::is_set() const {
    std::lock_guard lock(m_);
    return set_;
}

void AsyncEvent::set() {
    detail::WaiterQueue woken;
    {
        std::lock_guard lock(m_);
        set_ = true;
        woken = std::exchange(queue_, {});
    }
    detail::wake_all(woken);
}

void AsyncEvent::reset() {
    std::lock_guard lock(m_);
    set_ = false;
}

bool AsyncEvent::Awaiter::await_suspend(std::coroutine_handle<> h) {
    std::lock_guard lock(event.m_);
    if (event.set_) return false;
    detail::enqueue(event.queue_, waiter, h);
    return true;
}

// WaitQueue

void WaitQueue::Awaiter::await_suspend(std::coroutine_handle<> h) {
    std::lock_guard lock(queue.m_);
    detail::enqueue(queue.queue_, waiter, h);
}

void WaitQueue::notify_one() {
    detail::Waiter* w;
    {
        std::lock_guard lock(m_);
        w = queue_.pop();
    }
    if (w) detail::wake(*w);
}

void WaitQueue::notify_all() {
    detail::WaiterQueue woken;
    {
        std::lock_guard lock(m_);
        woken = std::exchange(queue_, {});
    }
    detail::wake_all(woken);
}

bool WaitQueue::empty() const {
    std::lock_guard lock(m_);
    return queue_.empty();
}

// AsyncSemaphore: strictly first come, first served; a big request is not starved by small ones.

bool AsyncSemaphore::Awaiter::await_ready() {
    std::lock_guard lock(semaphore.m_);
    if (!semaphore.queue_.empty() || semaphore.free_ < units) return false;
    semaphore.free_ -= units;
    return true;
}

bool AsyncSemaphore::Awaiter::await_suspend(std::coroutine_handle<> h) {
    std::lock_guard lock(semaphore.m_);
    if (semaphore.queue_.empty() && semaphore.free_ >= units) {
        semaphore.free_ -= units;
        return false;
    }
    waiter.units = units;
    detail::enqueue(semaphore.queue_, waiter, h);
    return true;
}

void AsyncSemaphore::release(uint64_t units) {
    detail::WaiterQueue woken;
    {
        std::lock_guard lock(m_);
        free_ += units;
        while (auto* first = static_cast<Awaiter::UnitWaiter*>(queue_.front())) {
            if (first->units > free_) break;
            free_ -= first->units;
            woken.push(*queue_.pop());
        }
    }
    detail::wake_all(woken);
}

}  // namespace gantry
