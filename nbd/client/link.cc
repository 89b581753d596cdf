#include "nbd/client/link.h"

#include <algorithm>
#include <cerrno>

#include "runtime/log.h"

namespace gantry::nbd::client {

namespace {

/// What close() waits for the end of a session.
constexpr std::chrono::seconds kByeLimit{2};

}  // namespace

Link::Link(Loop& loop, std::shared_ptr<const ClientConfig> config, std::shared_ptr<LinkGroup> group)
    : loop_(loop), config_(std::move(config)), group_(std::move(group)) {
    for (uint32_t slot = kSlots; slot-- > 0;) free_slots_.push_back(static_cast<uint8_t>(slot));
}

Link::~Link() { CHECK(scope_.live() == 0, "a connection of an NBD client is closed before it is destroyed"); }

// ---- Opening and closing ----

Task<Result<Negotiated>> Link::open() {
    const auto deadline = deadline_in(config_->open_timeout);
    for (unsigned failed = 1;; ++failed) {
        // The first attempt has all the time it wants; later ones end with open-timeout.
        const auto limit = failed == 1 ? Clock::time_point::max() : deadline;
        Result<Connected> connected = co_await attempt_.run(config_, limit);
        if (connected && !open_cancelled_) {
            adopt(std::move(*connected));
            co_return now_;
        }
        if (connected) co_return fail(ErrorKind::kCancelled, "given up on request");
        const bool last = open_cancelled_ || !config_->address.can_connect_again() || Clock::now() >= deadline;
        if (last) co_return std::unexpected(std::move(connected).error());
        log::debug("node '{}': {}; trying again", config_->node_name, connected.error().message());
        (void)co_await pause_.until(std::min(deadline, deadline_in(retry_pause(failed))));
        if (open_cancelled_ || Clock::now() >= deadline) co_return std::unexpected(std::move(connected).error());
    }
}

void Link::cancel_open() {
    open_cancelled_ = true;
    attempt_.cancel();
    pause_.cancel();
}

void Link::start(Negotiated expected, bool writable) {
    expected_ = expected;
    set_writable(writable);
    wanted_ = !transport_;
    scope_.spawn(serve());
}

void Link::adopt(Connected connected) {
    transport_ = std::move(connected.transport);
    now_ = connected.negotiated;
    good_ = leaving_ = abandoned_ = stop_writing_ = broke_protocol_ = false;
    loss_.clear();
    begin_ = end_ = 0;
    set_state(LinkState::kUp);
}

Task<void> Link::close() {
    closing_ = true;
    cancel_open();
    wake_.notify_all();
    delay_.cancel();
    grace_.cancel();
    last_limit_.cancel();
    set_state(LinkState::kClosed);
    if (transport_) {
        const bool started = scope_.live() != 0;
        scope_.spawn(force_end());
        say_bye_ = true;
        wake_writer();
        if (!started) {
            co_await say_good_bye();
            bye_limit_.cancel();
        }
    }
    co_await scope_.join();
    transport_.reset();
    fail_queued();
}

Task<void> Link::force_end() {
    if (co_await bye_limit_.after(kByeLimit)) {
        if (transport_) transport_->shut_down();
    }
}

// ---- Life ----

Task<void> Link::serve() {
    for (;;) {
        if (transport_) {
            co_await talk();
            lost();
        } else if (closing_) {
            break;
        } else if (wanted_) {
            co_await reconnect();
        } else {
            co_await wake_.wait();
        }
    }
    bye_limit_.cancel();
}

Task<void> Link::talk() {
    TaskScope writer;
    in_ = Buffer::alloc(64u << 10);
    writer.spawn(write_requests());
    co_await read_replies();
    transport_->shut_down();
    stop_writing_ = true;
    wake_writer();
    co_await writer.join();
    in_.reset();
}

/// What is in flight is queued again, or fails.
void Link::lost() {
    if (good_) {
        failed_ = 0;
        next_attempt_ = {};
    }
    transport_.reset();
    std::vector<Operation*> flying;
    while (!unsent_.empty()) unsent_.pop();
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
        if (!slots_[slot]) continue;
        flying.push_back(std::exchange(slots_[slot], nullptr));
        free_slots_.push_back(static_cast<uint8_t>(slot));
    }
    while (!again_.empty()) flying.push_back(&again_.pop());
    large_reads_ = 0;
    // Newest first: each goes to the front.
    std::ranges::sort(flying, std::greater(), &Operation::sequence);
    for (Operation* op : flying) {
        op->forget_answer();
        queued_.push_front(*op);
    }
    last_error_ = loss_;
    if (closing_) return;
    if (broke_protocol_) {
        log::error("node '{}': NBD server '{}': {}; nothing is sent to it any more", config_->node_name,
                   config_->address.text(), loss_);
        group_->refusal.refuse(loss_);
        set_state(LinkState::kRefused);
        fail_queued();
        return;
    }
    const bool waits = config_->reconnect_delay.count() > 0 && !abandoned_ && !group_->silence.ending() &&
                       config_->address.can_connect_again();
    log::warn("node '{}': the connection to NBD server '{}' is lost: {}{}", config_->node_name, config_->address.text(),
              loss_, waits ? "; requests wait for its return" : "");
    if (!waits) {
        fall_down();
        return;
    }
    set_state(LinkState::kWaiting);
    wait_until_ = deadline_in(config_->reconnect_delay);
    wanted_ = true;
    if (!watching_delay_) {
        watching_delay_ = true;
        scope_.spawn(watch_delay());
    }
}

Task<void> Link::watch_delay() {
    while (state() == LinkState::kWaiting) {
        (void)co_await delay_.until(wait_until_);
        if (state() != LinkState::kWaiting || Clock::now() < wait_until_) continue;
        log::warn("node '{}': NBD server '{}' has not come back within {} s; requests fail", config_->node_name,
                  config_->address.text(),
                  std::chrono::duration_cast<std::chrono::seconds>(config_->reconnect_delay).count());
        fall_down();
    }
    watching_delay_ = false;
}

void Link::set_state(LinkState state) {
    // Before its first connection it is kDown, too, and nobody misses it.
    const LinkState before = state_.exchange(state, std::memory_order_relaxed);
    const bool was_lost = before == LinkState::kDown && was_up_;
    was_up_ |= state == LinkState::kUp;
    const bool is_lost = state == LinkState::kDown;
    if (is_lost && !was_lost) group_->lost.fetch_add(1, std::memory_order_relaxed);
    if (was_lost && !is_lost) group_->lost.fetch_sub(1, std::memory_order_relaxed);
}

void Link::fall_down() {
    set_state(LinkState::kDown);
    fail_queued();
}

Task<void> Link::reconnect() {
    if (Clock::now() < next_attempt_) {
        (void)co_await pause_.until(next_attempt_);
        if (closing_) co_return;
    }
    Result<Connected> connected = co_await attempt_.run(config_, Clock::time_point::max());
    if (closing_) co_return;
    // Counts as failed until the server has answered something: one that lets everybody in and then hangs up is not
    // asked at full speed.
    ++failed_;
    next_attempt_ = deadline_in(retry_pause(failed_));
    if (connected) {
        Result<> same = check_same_export(expected_, connected->negotiated, writable_);
        if (same) {
            wanted_ = false;
            const bool was_up = was_up_;
            adopt(std::move(*connected));
            if (!was_up) {
                failed_ = 0;
                next_attempt_ = {};
            }
            delay_.cancel();
            log::info("node '{}': connected to NBD server '{}' {}", config_->node_name, config_->address.text(),
                      was_up ? "again" : "once more");
            co_return;
        }
        last_error_ = same.error().message();
    } else {
        last_error_ = connected.error().message();
    }
    if (was_up_) {
        log::debug("node '{}': reconnecting: {}", config_->node_name, last_error_);
    } else {
        log::warn("node '{}': a further connection to NBD server '{}' is not made: {}", config_->node_name,
                  config_->address.text(), last_error_);
    }
    // Nobody waits for it: the next request asks again.
    if (state() == LinkState::kDown) wanted_ = false;
}

void Link::ask_again() {
    if (state() == LinkState::kDown && was_up_ && !group_->refusal.set()) want_connection();
}

void Link::want_connection() {
    if (!config_->address.can_connect_again()) return;
    wanted_ = true;
    wake_.notify_all();
}

// ---- Requests ----

Error Link::unavailable() const {
    if (state() == LinkState::kClosed) {
        return Error(ErrorKind::kShutdown, fmt::format("node '{}' is closed", config_->node_name), ESHUTDOWN);
    }
    if (group_->refusal.set()) {
        return Error(ErrorKind::kIo,
                     fmt::format("node '{}': no connection to NBD server '{}' is used any more: {}", config_->node_name,
                                 config_->address.text(), group_->refusal.why()),
                     EIO);
    }
    return Error(ErrorKind::kIo,
                 fmt::format("node '{}': no connection to NBD server '{}': {}", config_->node_name,
                             config_->address.text(), last_error_.empty() ? "not yet connected" : last_error_),
                 EIO);
}

Error Link::given_up() const {
    return Error(ErrorKind::kIo,
                 fmt::format("node '{}': NBD server '{}' has not answered and is given up", config_->node_name,
                             config_->address.text()),
                 EIO);
}

namespace {

struct Answered {
    Operation& op;
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) const noexcept { op.waiter = h; }
    void await_resume() const noexcept {}
};

}  // namespace

Task<Result<>> Link::execute(Operation& op) {
    const LinkState now = state();
    if (group_->refusal.set()) co_return std::unexpected(unavailable());
    if (group_->silence.fails_requests()) co_return std::unexpected(given_up());
    if (now == LinkState::kDown) want_connection();
    if (now != LinkState::kUp && now != LinkState::kWaiting) co_return std::unexpected(unavailable());
    const uint32_t cost = op.cost();
    op.sequence = ++next_sequence_;
    load_.fetch_add(cost, std::memory_order_relaxed);
    queued_.push(op);
    if (now == LinkState::kUp) wake_writer();
    co_await Answered{op};
    load_.fetch_sub(cost, std::memory_order_relaxed);
    co_return std::move(op.result);
}

void Link::finish(Operation& op, Result<> result) {
    op.result = std::move(result);
    loop_.ready(op.waiter);
}

void Link::fail_queued() {
    while (!queued_.empty()) finish(queued_.pop(), std::unexpected(unavailable()));
}

}  // namespace gantry::nbd::client
