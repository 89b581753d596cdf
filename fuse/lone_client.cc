#include <sys/resource.h>

#include <utility>

#include "fuse/queue.h"

namespace gantry::fuse {

namespace {

/// The client may move to another CPU: looked at again after so many requests.
constexpr uint32_t kLookAgain = 512;
/// Turns of the loop for each request, at most, or the loop has others to serve.
constexpr uint64_t kTurnsPerRequest = 8;

}  // namespace

bool LoneClient::came_meanwhile() {
    if (!likely()) return false;
    rusage usage{};
    (void)::getrusage(RUSAGE_THREAD, &usage);
    return std::exchange(preemptions_, usage.ru_nivcsw) != usage.ru_nivcsw;
}

bool Follower::follow(uint32_t pid) {
    if (active_ && ++since_look_ < kLookAgain) return true;
    const uint64_t turns = loop_.turns() - turns_at_look_;
    const bool alone = !active_ || turns <= kTurnsPerRequest * kLookAgain;
    turns_at_look_ = loop_.turns();
    since_look_ = 0;
    if (!alone || pid == 0 || !loop_.follow(static_cast<int>(pid))) {
        stop();
        return false;
    }
    active_ = true;
    return true;
}

void Follower::stop() {
    if (!std::exchange(active_, false)) return;
    loop_.unfollow();
}

}  // namespace gantry::fuse
