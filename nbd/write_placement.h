// WritePlacement: whether a connection's large writes are done on its loop or beside it.

#pragma once

#include <chrono>
#include <cstdint>

namespace gantry::nbd {

/// Done beside the loop, a write's copy into the page cache runs while the next payload is received; that pays where a
/// CPU has nothing else to do, and costs a hand-over where the client needs it. Nobody can tell beforehand, so both are
/// tried for a few writes and the faster way is taken for many. Own loop of its connection only.
class WritePlacement {
  public:
    using Clock = std::chrono::steady_clock;
    /// Writes of one try, and how many follow before the next pair of tries.
    static constexpr uint32_t kTry = 32;
    static constexpr uint32_t kSettled = 1024;

    /// A large write begins: true: beside the loop.
    bool beside(Clock::time_point now) {
        if (left_ == 0) advance(now);
        --left_;
        return beside_;
    }

  private:
    enum class Phase : uint8_t { kBefore, kTryHere, kTryBeside, kSettled };
    void advance(Clock::time_point now);

    Phase phase_ = Phase::kBefore;
    bool beside_ = false;
    uint32_t left_ = 0;
    Clock::time_point began_{};
    Clock::duration here_{};  // what the try on the loop took
};

}  // namespace gantry::nbd
