#include "nbd/write_placement.h"

namespace gantry::nbd {

void WritePlacement::advance(Clock::time_point now) {
    const Clock::duration took = now - began_;
    began_ = now;
    left_ = kTry;
    switch (phase_) {
        case Phase::kBefore:
        case Phase::kSettled:
            phase_ = Phase::kTryHere;
            beside_ = false;
            return;
        case Phase::kTryHere:
            here_ = took;
            phase_ = Phase::kTryBeside;
            beside_ = true;
            return;
        case Phase::kTryBeside:
            phase_ = Phase::kSettled;
            // It takes more CPU time in any case: it has to be clearly faster.
            beside_ = took + took / 8 < here_;
            left_ = kSettled;
            return;
    }
}

}  // namespace gantry::nbd
