// What the threads of a load generator share.

#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bench/loadgen/outcome.h"

namespace gantry::bench {

inline double process_cpu_seconds() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& t) {
        return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

/// Keeps the first failure of several threads, and tells the others to end.
class FirstFailure {
  public:
    void set(std::string message) {
        const std::lock_guard lock(mutex_);
        if (message_.empty()) message_ = std::move(message);
        failed_.store(true, std::memory_order_relaxed);
    }
    bool failed() const { return failed_.load(std::memory_order_relaxed); }
    Outcome<> outcome() {
        const std::lock_guard lock(mutex_);
        if (failed()) return failure(message_);
        return {};
    }

  private:
    std::atomic<bool> failed_ = false;
    std::mutex mutex_;
    std::string message_;
};

/// `serve(first, count)` on each of `threads` threads, for its share of `all` things; returns when all have.
template <class Serve>
void in_shares(size_t all, size_t threads, Serve serve) {
    std::vector<std::thread> running;
    const size_t each = (all + threads - 1) / threads;
    for (size_t first = 0; first < all; first += each) running.emplace_back(serve, first, std::min(each, all - first));
    for (auto& thread : running) thread.join();
}

}  // namespace gantry::bench
