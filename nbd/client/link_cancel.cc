// Giving up on a server that does not answer.

#include <algorithm>

#include "nbd/client/link.h"

namespace gantry::nbd::client {

namespace {

/// What cancel() leaves a server that answers to answer.
constexpr std::chrono::seconds kCancelGrace{5};
/// How often it is looked meanwhile whether the server is silent on other connections, too.
constexpr std::chrono::seconds kSilencePoll{1};
/// What is left for the last flush of a node that is being closed.
constexpr std::chrono::seconds kLastRequests{60};

}  // namespace

void Link::cancel() {
    group_->silence.cancelled();
    if (state() == LinkState::kWaiting) {
        fall_down();
        delay_.cancel();
        return;
    }
    if (state() != LinkState::kUp || load() == 0) return;
    if (give_up_with_siblings() || watching_cancelled_) return;
    watching_cancelled_ = true;
    scope_.spawn(watch_cancelled(next_sequence_));
}

Task<void> Link::watch_cancelled(uint64_t before) {
    const auto end = deadline_in(kCancelGrace);
    bool expired = true;
    while (expired && Clock::now() < end && !group_->silence.lasts()) {
        expired = co_await grace_.until(std::min(end, deadline_in(kSilencePoll)));
    }
    watching_cancelled_ = false;
    if (!expired || !transport_ || give_up_with_siblings()) co_return;
    const bool stuck = std::ranges::any_of(slots_, [&](const Operation* op) { return op && op->sequence <= before; });
    if (stuck) abandon(fmt::format("it has not answered for {} s and is given up", kCancelGrace.count()));
}

void Link::limit_last_requests() {
    if (state() == LinkState::kWaiting) cancel();
    if (state() == LinkState::kClosed || give_up_with_siblings()) return;
    if (!last_limit_.armed()) scope_.spawn(watch_last_requests());
}

Task<void> Link::watch_last_requests() {
    const bool expired = co_await last_limit_.after(kLastRequests);
    if (!expired || !transport_ || load() == 0) co_return;
    abandon(fmt::format("it has not answered for {} s and is given up", kLastRequests.count()));
}

/// Whether it is done with, for what the server did on another connection.
bool Link::give_up_with_siblings() {
    if (!transport_ || load() == 0 || !group_->silence.lasts()) return false;
    abandon("it is as silent as on another connection and is given up");
    return true;
}

void Link::abandon(std::string why) {
    group_->silence.notice();
    if (abandoned_) return;
    abandoned_ = true;
    loss_ = std::move(why);
    transport_->shut_down();
}

}  // namespace gantry::nbd::client
