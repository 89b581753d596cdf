// TimerQueue: the armed timers of one loop, a binary heap by (deadline, order of arming).

#pragma once

#include <vector>

#include "runtime/timer.h"

namespace gantry {

/// Its own loop only.
struct TimerQueue {
    void add(Timer& t);
    void remove(Timer& t);
    /// Puts the sleepers whose deadline is not after `now` on the ready list of `loop`.
    void expire(Loop& loop, Clock::time_point now);
    Clock::time_point next_deadline() const;
    bool empty() const { return heap_.empty(); }

  private:
    static bool before(const Timer* a, const Timer* b);
    void place(size_t index, Timer* t);
    void sift_up(size_t index);
    void sift_down(size_t index);
    std::vector<Timer*> heap_;
    uint64_t sequence_ = 0;
};

}  // namespace gantry
