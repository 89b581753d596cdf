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

/// Tries each for a short while, goes on with the best, and tries one of the others now and then: more rarely while
/// that changes nothing. What is measured over so few requests is noisy, so it is averaged. One loop only; no clock, no
/// system call of its own.
class Tactics {
  public:
    /// Requests until a tactic counts, and requests it is measured over.
    static constexpr uint64_t kSettle = 64, kMeasure = 256;
    /// For how many requests the best one is used between two trials, at least and at most.
    static constexpr uint64_t kKeepLeast = 2048, kKeepMost = 32768;

    /// A tactic that cannot be used is not tried for a while.
    void forbid(Tactic tactic);
    /// The one to be used now. `answered`: requests so far, of all loops; `now`: the time, at least roughly.
    Tactic next(uint64_t answered, Clock::time_point now);
    /// The client is not alone any more; what was measured is a hint for the next time.
    void reset();
    Tactic best() const { return best_; }
    /// Every tactic has been tried.
    bool decided() const { return first_trials_ == 0; }

  private:
    void use(Tactic tactic, uint64_t answered, uint64_t requests);
    void note(Clock::time_point now, uint64_t answered);
    void choose();
    Tactic other() const;

    std::array<double, kTactics> rate_{};  // requests a second, weighted and averaged; 0: not known
    std::array<bool, kTactics> forbidden_{};
    Tactic best_ = Tactic::kFollow;
    Tactic current_ = Tactic::kFollow;
    Tactic tried_ = Tactic::kFollow;  // the last trial
    size_t first_trials_ = kTactics;  // left
    bool started_ = false;
    bool measuring_ = false;
    uint64_t keep_ = kKeepLeast;
    uint64_t requests_ = 0;   // of this use
    uint64_t next_step_ = 0;  // in requests answered
    uint64_t begun_at_ = 0;
    Clock::time_point begun_{};
};

}  // namespace gantry::fuse
