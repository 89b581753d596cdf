#include <sys/resource.h>

#include <algorithm>
#include <chrono>

#include "fuse/queue.h"

namespace gantry::fuse {

namespace {

/// The client may move to another CPU: looked at again after so many requests.
constexpr uint32_t kLookAgain = 512;
constexpr uint32_t kMaxPatience = 8192;
/// Turns of the loop for each request, at most, or the loop has others to serve.
constexpr uint64_t kTurnsPerRequest = 8;
/// How long the next request of such a client may take when the loop stays on a CPU of its own.
constexpr std::chrono::nanoseconds kNextRequest{20'000};

}  // namespace

void LoneClient::one(uint32_t pid) {
    if (++streak_ >= next_look_) look(pid);
    if (!loop_.following() && likely()) loop_.expect_soon(kNextRequest);
}

void LoneClient::look(uint32_t pid) {
    const uint64_t turns = loop_.turns() - turns_at_look_;
    const bool alone = turns <= kTurnsPerRequest * (next_look_ == kLookAgain ? kLookAgain : streak_);
    following_ = alone && pid != 0 && loop_.follow(static_cast<int>(pid));
    if (!following_) loop_.unfollow();
    turns_at_look_ = loop_.turns();
    next_look_ = kLookAgain;
    streak_ = kFew;
}

bool LoneClient::came_meanwhile() {
    if (!following_ || !loop_.following()) return false;
    // Woken by the reply, the client runs before this thread goes on, if the scheduler wants it so.
    rusage usage{};
    (void)::getrusage(RUSAGE_THREAD, &usage);
    return std::exchange(preemptions_, usage.ru_nivcsw) != usage.ru_nivcsw;
}

void LoneClient::several() {
    if (following_) {
        loop_.unfollow();
        following_ = false;
        patience_ = std::min(patience_ * 2, kMaxPatience);
    }
    next_look_ = patience_;
    streak_ = 0;
    turns_at_look_ = loop_.turns();
}

}  // namespace gantry::fuse
