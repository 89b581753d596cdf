#include "systemd/watchdog.h"

#include <atomic>

#include "runtime/log.h"

namespace gantry::systemd {

namespace {

// One round of pings. A loop answers by dropping its token: by running the posted function, or by ending.
struct Round {
    std::atomic<size_t> waiting{0};
};

struct Token {
    explicit Token(std::shared_ptr<Round> r) : round(std::move(r)) {
        round->waiting.fetch_add(1, std::memory_order_relaxed);
    }
    ~Token() { round->waiting.fetch_sub(1, std::memory_order_relaxed); }
    Token(const Token&) = delete;
    std::shared_ptr<Round> round;
};

std::shared_ptr<Round> ping(const std::vector<Loop*>& loops) {
    auto round = std::make_shared<Round>();
    for (Loop* loop : loops) loop->post([token = std::make_shared<Token>(round)]() mutable { token.reset(); });
    return round;
}

}  // namespace

void Watchdog::start() {
    if (notifier_.watchdog_interval().count() > 0) scope_.spawn(run());
}

Task<void> Watchdog::stop() {
    stopping_ = true;
    timer_.cancel();
    co_await scope_.join();
}

Task<void> Watchdog::run() {
    notifier_.watchdog();
    std::shared_ptr<Round> round = ping(runtime_.all_loops());
    bool warned = false;
    while (!stopping_) {
        (void)co_await timer_.after(notifier_.watchdog_interval() / 2);
        if (stopping_) break;
        size_t silent = round->waiting.load(std::memory_order_relaxed);
        if (silent == 0) {
            notifier_.watchdog();
            round = ping(runtime_.all_loops());
            warned = false;
        } else if (!warned) {
            log::error(
                "watchdog: {} loop(s) did not answer within {} ms", silent,
                std::chrono::duration_cast<std::chrono::milliseconds>(notifier_.watchdog_interval() / 2).count());
            warned = true;
        }
    }
}

}  // namespace gantry::systemd
