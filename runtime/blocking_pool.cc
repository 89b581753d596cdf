#include "runtime/blocking_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

#include "runtime/affinity.h"

namespace gantry {

namespace {

constexpr std::chrono::seconds kIdleLimit{10};

/// Threads made inside take no signals: those are for the main loop. Faults of their own they do take.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        sigdelset(&all, SIGBUS);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

}  // namespace

struct BlockingPool::Impl {
    explicit Impl(unsigned n) : max_threads(std::max(1u, n)) {}

    void start_thread_locked();
    void work(std::list<std::thread>::iterator self);

    const unsigned max_threads;
    std::mutex m;
    std::condition_variable wake;
    PoolItem* head = nullptr;
    PoolItem* tail = nullptr;
    size_t queued = 0;
    unsigned idle = 0;
    bool stopping = false;
    std::list<std::thread> running;
    std::list<std::thread> finished;  // to be joined
};

BlockingPool::BlockingPool(unsigned max_threads) : impl_(std::make_unique<Impl>(max_threads)) {}

BlockingPool::~BlockingPool() {
    Impl& in = *impl_;
    std::unique_lock lock(in.m);
    in.stopping = true;
    in.wake.notify_all();
    // Each thread moves itself to `finished` as the last thing it does under the lock.
    in.wake.wait(lock, [&in] { return in.running.empty(); });
    for (auto& t : in.finished) t.join();
}

void BlockingPool::submit(PoolItem& item) {
    Impl& in = *impl_;
    std::list<std::thread> to_join;
    {
        std::lock_guard lock(in.m);
        item.next = nullptr;
        if (in.tail) {
            in.tail->next = &item;
        } else {
            in.head = &item;
        }
        in.tail = &item;
        ++in.queued;
        to_join.swap(in.finished);
        if (in.queued > in.idle && in.running.size() < in.max_threads) in.start_thread_locked();
        if (in.idle > 0) in.wake.notify_one();
    }
    for (auto& t : to_join) t.join();  // they have left their last function
}

void BlockingPool::Impl::start_thread_locked() {
    const SignalsBlocked blocked;
    running.emplace_front();
    const auto self = running.begin();
    try {
        *self = std::thread([this, self] { work(self); });
    } catch (const std::system_error&) {
        running.erase(self);
        // The process is out of threads: those that run take the item in time. With none there is nobody to do it.
        CHECK(!running.empty(), "no thread can be started for blocking work");
    }
}

void BlockingPool::Impl::work(std::list<std::thread>::iterator self) {
    pthread_setname_np(pthread_self(), "pool");
    spread_thread();  // whoever started it may keep to one CPU
    std::unique_lock lock(m);
    for (;;) {
        if (!head) {
            if (stopping) break;
            ++idle;
            const bool woken = wake.wait_for(lock, kIdleLimit, [this] { return head || stopping; });
            --idle;
            if (!woken) break;
            continue;
        }
        PoolItem* item = head;
        head = item->next;
        if (!head) tail = nullptr;
        --queued;
        lock.unlock();
        item->run(item);
        lock.lock();
    }
    finished.splice(finished.end(), running, self);
    if (running.empty()) wake.notify_all();
}

}  // namespace gantry
