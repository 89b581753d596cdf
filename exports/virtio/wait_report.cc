#include "exports/virtio/wait_report.h"

namespace gantry::virtio {

WaitReport::WaitReport(std::function<void(std::chrono::seconds)> say, std::chrono::milliseconds first,
                       std::chrono::milliseconds again)
    : say_(std::move(say)) {
    scope_.spawn(watch(first, again));
}

Task<void> WaitReport::watch(std::chrono::milliseconds first, std::chrono::milliseconds again) {
    const auto begun = Clock::now();
    for (auto pause = first; !over_; pause = again) {
        const bool expired = co_await timer_.after(pause);
        if (expired && !over_) say_(std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - begun));
    }
}

Task<void> WaitReport::over() {
    over_ = true;
    timer_.cancel();
    co_await scope_.join();
}

}  // namespace gantry::virtio
