// LinkGroup: what the connections of one node know of each other. Any loop.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

#include "runtime/timer.h"

namespace gantry::nbd::client {

/// Set by the first connection of a node on which the server breaks the protocol: none of them is used any more.
class Refusal {
  public:
    bool set() const { return set_.load(std::memory_order_acquire); }
    void refuse(std::string why) {
        const std::lock_guard lock(m_);
        if (set()) return;
        why_ = std::move(why);
        set_.store(true, std::memory_order_release);
    }
    /// Once set().
    const std::string& why() const { return why_; }

  private:
    std::mutex m_;
    std::string why_;
    std::atomic<bool> set_{false};
};

/// A connection has been given up because the server did not answer on it. Until it answers on another one, or for a
/// while, those are given up without any more patience; and where the end of requests is waited for - the node is
/// being closed, requests are being cancelled - no further one is sent.
class Silence {
  public:
    /// How long after the last connection has been given up; it may have come back meanwhile.
    static constexpr std::chrono::seconds kBelieved{30};
    /// How long after cancelled(), which is repeated more often.
    static constexpr std::chrono::seconds kCancelling{10};

    void notice() {
        since_.store(Clock::now(), std::memory_order_relaxed);
        noticed_.store(true, std::memory_order_relaxed);
    }
    void answered() {
        if (noticed_.load(std::memory_order_relaxed)) noticed_.store(false, std::memory_order_relaxed);
    }
    void cancelled() { cancelled_.store(Clock::now(), std::memory_order_relaxed); }
    void closing() { closing_.store(true, std::memory_order_relaxed); }

    /// The end of requests is waited for: nobody wants them to wait for a lost server.
    bool ending() const { return closing_.load(std::memory_order_relaxed) || !passed(cancelled_, kCancelling); }
    bool lasts() const { return noticed_.load(std::memory_order_relaxed) && !passed(since_, kBelieved); }
    bool fails_requests() const { return lasts() && ending(); }

  private:
    static bool passed(const std::atomic<Clock::time_point>& since, std::chrono::seconds time) {
        return Clock::now() - since.load(std::memory_order_relaxed) >= time;
    }
    std::atomic<bool> noticed_{false}, closing_{false};
    std::atomic<Clock::time_point> since_{}, cancelled_{};
};

struct LinkGroup {
    Refusal refusal;
    Silence silence;
    std::atomic<uint32_t> lost{0};  // connections in kDown that have been up
};

}  // namespace gantry::nbd::client
