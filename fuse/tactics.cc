#include "fuse/tactics.h"

#include <algorithm>

namespace gantry::fuse {

namespace {

/// Polling takes a CPU that others may want: it must be so much better.
constexpr std::array<double, kTactics> kWorth = {1.0, 1.0, 0.7};

}  // namespace

void Tactics::forbid(Tactic tactic) {
    forbidden_[static_cast<size_t>(tactic)] = true;
    if (current_ == tactic) next_step_ = 0;
}

void Tactics::reset() {
    started_ = measuring_ = decided_ = false;
    forbidden_ = {};
    current_ = Tactic::kFollow;
}

/// The next trial, of the first tactic from `index` on that may be used; the decision when there is none.
void Tactics::try_from(size_t index, uint64_t answered) {
    while (index < kTactics && forbidden_[index]) rate_[index++] = 0;
    if (index == kTactics) return decide(answered);
    current_ = static_cast<Tactic>(index);
    measuring_ = decided_ = false;
    next_step_ = answered + kSettle;
}

void Tactics::decide(uint64_t answered) {
    size_t best = static_cast<size_t>(Tactic::kPoll);
    for (size_t i = 0; i < kTactics; ++i) {
        if (!forbidden_[i] && (forbidden_[best] || rate_[i] > rate_[best])) best = i;
    }
    current_ = static_cast<Tactic>(best);
    measuring_ = false;
    decided_ = true;
    next_step_ = answered + kKeep;
}

Tactic Tactics::next(uint64_t answered, Clock::time_point now) {
    if (!started_ || (decided_ && answered >= next_step_ && !forbidden_[static_cast<size_t>(current_)])) {
        started_ = true;
        forbidden_ = {};
        try_from(0, answered);
        return current_;
    }
    const auto index = static_cast<size_t>(current_);
    if (forbidden_[index]) {
        if (decided_) {
            decide(answered);
        } else {
            try_from(index + 1, answered);
        }
        return current_;
    }
    if (decided_ || answered < next_step_) return current_;
    if (!measuring_) {
        measuring_ = true;
        begun_at_ = answered;
        begun_ = now;
        next_step_ = answered + kMeasure;
        return current_;
    }
    const double seconds = std::max(std::chrono::duration<double>(now - begun_).count(), 1e-9);
    rate_[index] = kWorth[index] * static_cast<double>(answered - begun_at_) / seconds;
    try_from(index + 1, answered);
    return current_;
}

}  // namespace gantry::fuse
