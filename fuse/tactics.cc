#include "fuse/tactics.h"

#include <algorithm>

namespace gantry::fuse {

namespace {

/// Polling takes a CPU that others may want: it must be so much better.
constexpr std::array<double, kTactics> kWorth = {1.0, 1.0, 0.7};
/// A measurement over so many requests counts as much as all before it: what a tactic is like shows after a while.
constexpr double kHalf = 512;
/// So much better must another one be than the best so far.
constexpr double kMargin = 1.15;

constexpr size_t index_of(Tactic tactic) { return static_cast<size_t>(tactic); }

}  // namespace

void Tactics::forbid(Tactic tactic) {
    forbidden_[index_of(tactic)] = true;
    rate_[index_of(tactic)] = 0;
    if (current_ == tactic) next_step_ = 0;
}

void Tactics::reset() {
    started_ = false;
    if (first_trials_ > 0) first_trials_ = kTactics;
    keep_ = kProbation;
    forbidden_ = {};
}

void Tactics::use(Tactic tactic, uint64_t answered, uint64_t requests) {
    current_ = tactic;
    measuring_ = false;
    requests_ = requests;
    next_step_ = answered + kSettle;
}

void Tactics::note(Clock::time_point now, uint64_t answered) {
    const size_t i = index_of(current_);
    const double seconds = std::max(std::chrono::duration<double>(now - begun_).count(), 1e-9);
    const double rate = kWorth[i] * static_cast<double>(answered - begun_at_) / seconds;
    const double fresh = static_cast<double>(requests_) / (static_cast<double>(requests_) + kHalf);
    rate_[i] = rate_[i] == 0 ? rate : (1 - fresh) * rate_[i] + fresh * rate;
}

void Tactics::choose() {
    Tactic best = forbidden_[index_of(best_)] ? Tactic::kPoll : best_;
    for (size_t i = 0; i < kTactics; ++i) {
        if (!forbidden_[i] && rate_[i] > kMargin * rate_[index_of(best)]) best = static_cast<Tactic>(i);
    }
    keep_ = best == best_ ? std::min(keep_ * 2, kKeepMost) : kProbation;
    best_ = best;
}

/// The next one to be tried that is not the best.
Tactic Tactics::other() const {
    size_t i = index_of(tried_);
    do {
        i = (i + 1) % kTactics;
    } while (static_cast<Tactic>(i) == best_);
    return static_cast<Tactic>(i);
}

void Tactics::step(uint64_t answered, Clock::time_point now) {
    if (!started_) {
        started_ = true;
        if (first_trials_ == 0) return use(best_, answered, keep_);
        tried_ = Tactic::kPair;
        return use(tried_, answered, kMeasure);
    }
    const bool useless = forbidden_[index_of(current_)];
    if (!useless && !measuring_) {
        measuring_ = true;
        begun_at_ = answered;
        begun_ = now;
        next_step_ = answered + requests_;
        return;
    }
    if (!useless) note(now, answered);
    if (first_trials_ > 0 && --first_trials_ > 0) {
        tried_ = static_cast<Tactic>(kTactics - first_trials_);
        return use(tried_, answered, kMeasure);
    }
    const bool was_best = current_ == best_ && !useless;
    choose();
    if (was_best && current_ == best_ && keep_ > kKeepLeast) {
        // What could not be used may be possible now.
        tried_ = other();
        forbidden_[index_of(tried_)] = false;
        use(tried_, answered, kMeasure);
    } else {
        use(best_, answered, keep_);
    }
}

}  // namespace gantry::fuse
