#include "block/repeated_cancel.h"

namespace gantry::block {

RepeatedCancel::RepeatedCancel(std::function<void()> cancel, std::chrono::seconds pause) : cancel_(std::move(cancel)) {
    scope_.spawn(repeat(pause));
}

Task<void> RepeatedCancel::repeat(std::chrono::seconds pause) {
    for (; !over_; pause = kCancelAgain) {
        cancel_();
        (void)co_await timer_.after(pause);
    }
}

Task<void> RepeatedCancel::over() {
    over_ = true;
    timer_.cancel();
    co_await scope_.join();
}

}  // namespace gantry::block
