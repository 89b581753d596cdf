// Tactics: how a client is answered best that sends one request at a time.

#pragma once

#include <array>
#include <chrono>
#include <cstdint>

#include "runtime/loop.h"

namespace gantry::fuse {

/// For such a client waking CPUs up costs more than all the rest, and which way costs least depends on the machine and
/// on what else it does.
enum class Tactic : uint8_t {
    kFollow,  // the loop keeps to the CPU that the client runs on
    kPair,    // two loops wait for requests, in turn: one is still awake where the other one's client wakes up
    kPoll,    // the loop looks for the next request for a while before it sleeps
};
constexpr size_t kTactics = 3;

/// Tries each for a short while, goes on with the best, and looks again now and then. One loop only; no clock, no
/// system call of its own.
class Tactics {
  public:
    /// Requests until a tactic counts, requests it is measured over, and for how many the best one is kept.
    static constexpr uint64_t kSettle = 128, kMeasure = 384, kKeep = 65536;

    /// A tactic that cannot be used is not tried (until the next time that all are tried).
    void forbid(Tactic tactic);
    /// The one to be used now. `answered`: requests so far, of all loops; `now`: the time, at least roughly.
    Tactic next(uint64_t answered, Clock::time_point now);
    /// The client is not alone any more: what was measured counts no longer.
    void reset();
    Tactic current() const { return current_; }
    /// The trials are over; what is used now is the best.
    bool decided() const { return decided_; }

  private:
    void try_from(size_t index, uint64_t answered);
    void decide(uint64_t answered);

    std::array<double, kTactics> rate_{};  // requests a second, weighted
    std::array<bool, kTactics> forbidden_{};
    Tactic current_ = Tactic::kFollow;
    bool started_ = false;
    bool measuring_ = false;
    bool decided_ = false;
    uint64_t next_step_ = 0;  // in requests answered
    uint64_t begun_at_ = 0;
    Clock::time_point begun_{};
};

}  // namespace gantry::fuse
