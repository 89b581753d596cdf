#include "block/repeated_cancel.h"

namespace gantry::block {

RepeatedCancel::RepeatedCancel(std::function<void()> cancel) : cancel_(std::move(cancel)) { scope_.spawn(repeat()); }

Task<void> RepeatedCancel::repeat() {
    while (!over_) {
        cancel_();
        (void)co_await timer_.after(kCancelAgain);
    }
}

Task<void> RepeatedCancel::over() {
    over_ = true;
    timer_.cancel();
    co_await scope_.join();
}

}  // namespace gantry::block
