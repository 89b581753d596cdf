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
    kPair,    // two loops wait for requests, in turn: one is still awake where the other one's client wakes up
    kFollow,  // the loop keeps to the CPU that the client runs on
    kPoll,    // the loop looks for the next request for a while before it sleeps
};
constexpr size_t kTactics = 3;

/// Tries each for a short while, goes on with the best, and tries one of the others now and then: more rarely while
/// that changes nothing. What is measured over so few requests is noisy, so it is averaged. One loop only; no clock, no
/// system call of its own.
class Tactics {
  public:
    /// Requests until a tactic counts, and requests it is measured over.
    static constexpr uint64_t kSettle = 32, kMeasure = 128;
    /// For how many requests a new best one is used before it is judged again, and between two trials of others at
    /// least and at most.
    static constexpr uint64_t kProbation = 1024, kKeepLeast = 8192, kKeepMost = 65536;

    /// A tactic that cannot be used is not tried for a while.
    void forbid(Tactic tactic);
    /// The one to be used now.
    Tactic current() const { return current_; }
    /// Whether step() has something to do. `answered`: requests so far, of all loops.
    bool due(uint64_t answered) const {
        return !started_ || answered >= next_step_ || forbidden_[static_cast<size_t>(current_)];
    }
    /// To be called when it is due: measures, and chooses what is used from now on.
    void step(uint64_t answered, Clock::time_point now);
    /// The client is not alone any more; the next time begins with what was best.
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
    Tactic best_ = Tactic::kPair;
    Tactic current_ = Tactic::kPair;
    Tactic tried_ = Tactic::kPair;    // the last trial
    size_t first_trials_ = kTactics;  // left
    bool started_ = false;
    bool measuring_ = false;
    uint64_t keep_ = kProbation;
    uint64_t requests_ = 0;   // of this use
    uint64_t next_step_ = 0;  // in requests answered
    uint64_t begun_at_ = 0;
    Clock::time_point begun_{};
};

}  // namespace gantry::fuse
