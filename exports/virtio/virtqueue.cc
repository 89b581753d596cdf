#include "exports/virtio/virtqueue.h"

#include <fmt/format.h>
#include <poll.h>

#include "exports/virtio/shared_eventfd.h"
#include "runtime/check.h"
#include "runtime/timer.h"

namespace gantry::virtio {

namespace {

/// What is taken before others have their turn.
constexpr unsigned kTurnRequests = 64;
constexpr uint64_t kTurnBytes = 1 << 20;
/// A driver that works beside us goes on while we do.
constexpr size_t kPublishEvery = 16;
constexpr uint64_t kPublishBytes = 128 << 10;
/// Longer lists are not kept for the next request.
constexpr size_t kKeptParts = 256;
/// What is answered at once is often followed at once. Both sides sleep and are woken in some 50 us, so to wait a
/// little longer costs less than to sleep, also in CPU time.
constexpr std::chrono::nanoseconds kNextRequest{60'000};

/// Written by one loop alone.
void bump(std::atomic<uint64_t>& counter, uint64_t by = 1) {
    counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

}  // namespace

/// A request and all that it needs, used again and again.
struct Virtqueue::Slot {
    BlkRequest request;
};

Virtqueue::Virtqueue(Loop& loop, size_t index, const BlkService& service, block::Channel& channel,
                     std::function<void(size_t, const std::string&)> broken)
    : loop_(loop), index_(index), service_(service), channel_(channel), broken_(std::move(broken)) {}

Virtqueue::~Virtqueue() { CHECK(!ring_ && in_flight_ == 0, "a virtqueue is stopped before it is destroyed"); }

Task<void> Virtqueue::start(QueueStart start) {
    CHECK(!ring_, "a virtqueue is started once");
    ring_ = std::move(start.ring);
    space_ = AddressSpace(std::move(start.memory), start.source);
    kick_ = std::move(start.kick);
    log_ = std::move(start.log);
    stopping_ = listening_ = fault_reported_ = false;
    answered_ = false;
    ring_->quiet();
    loop_.add_poller(look_);
    scope_.spawn(run());
    if (kick_) scope_.spawn(watch_kicks());
    co_return;
}

Task<uint32_t> Virtqueue::stop() {
    if (!ring_) co_return 0;
    stopping_ = true;
    if (polling_) polling_->cancel();
    wake();
    co_await scope_.join();
    loop_.remove_poller(look_);
    const uint32_t base = ring_->base();
    ring_.reset();
    space_ = AddressSpace();
    kick_.reset();
    log_.reset();
    slots_.clear();
    free_.clear();
    co_return base;
}

/// Waits until what was taken is published.
Task<void> Virtqueue::settle() {
    while (in_flight_ != 0) co_await settled_.wait();
}

Task<void> Virtqueue::pause() {
    ++paused_;
    co_await settle();
}

Task<void> Virtqueue::resume() {
    CHECK(paused_ != 0, "only what was paused goes on");
    --paused_;
    wake();
    co_return;
}

Task<void> Virtqueue::resume_in(std::shared_ptr<const GuestMemory> memory, RingPlace place) {
    CHECK(in_flight_ == 0, "memory changes while nothing uses it");
    if (ring_) {
        ring_->move(place);
        space_.change(std::move(memory));
    }
    co_await resume();
}

Task<void> Virtqueue::enable(bool on) {
    enabled_ = on;
    wake();
    co_return;
}

Task<void> Virtqueue::set_call(std::unique_ptr<Call> call) {
    call_ = std::move(call);
    if (call_ && ring_) call_->signal();
    co_return;
}

Task<void> Virtqueue::set_log(std::shared_ptr<DirtyLog> log, bool ring, uint64_t ring_address) {
    ++paused_;
    co_await settle();
    if (ring_) ring_->set_log(ring ? log : nullptr, ring_address);
    log_ = std::move(log);
    co_await resume();
}

Task<void> Virtqueue::break_off(std::string fault) {
    if (!ring_) co_return;
    ring_->break_off(std::move(fault));
    wake();
}

Virtqueue::Slot* Virtqueue::take_slot() {
    if (free_.empty()) {
        slots_.push_back(std::make_unique<Slot>());
        return slots_.back().get();
    }
    Slot* slot = free_.back();
    free_.pop_back();
    return slot;
}

bool Virtqueue::may_take() const {
    return enabled_ && paused_ == 0 && !stopping_ && !ring_->is_broken() && !channel_.quiesced();
}

bool Virtqueue::Look::poll() {
    if (!queue_.waiting_ || !queue_.may_take() || !queue_.ring_->has_more()) return false;
    queue_.wake();
    return true;
}

bool Virtqueue::Look::before_sleep() {
    if (!queue_.waiting_ || !queue_.may_take()) return false;
    const bool more = queue_.listening_ || !queue_.kick_ ? queue_.ring_->has_more() : queue_.ring_->listen();
    queue_.listening_ = true;
    if (more) queue_.wake();
    // Nobody kicks a queue without a kick: the loop does not sleep.
    return more || !queue_.kick_;
}

void Virtqueue::wake() {
    if (waiting_) loop_.ready(std::exchange(waiting_, {}));
}

/// Takes, answers and publishes. Whoever has something for it to do wakes it.
Task<void> Virtqueue::run() {
    while (!stopping_) {
        if (channel_.quiesced() && !resuming_) {
            resuming_ = true;
            scope_.spawn(wake_when_resumed());
        }
        const bool more = serve();
        if (finished_.empty())
            check_memory();
        else
            publish();
        if (ring_->is_broken() && !fault_reported_) report_fault();
        if (more) {
            co_await yield_turn();
            continue;
        }
        if (std::exchange(answered_, false) && in_flight_ == 0) loop_.expect_soon(kNextRequest);
        co_await Idle{*this};
    }
    for (;;) {
        publish();
        if (in_flight_ == 0) break;
        co_await Idle{*this};
    }
}

Task<void> Virtqueue::wake_when_resumed() {
    while (channel_.quiesced()) co_await channel_.resumed();
    resuming_ = false;
    wake();
}

Task<void> Virtqueue::watch_kicks() {
    while (!stopping_) {
        CancellableIo poll(io_poll(kick_.get(), POLLIN));
        polling_ = &poll;
        const int events = co_await poll;
        polling_ = nullptr;
        if (stopping_) break;
        if (events == -EINTR) continue;
        if (const int error = events < 0 ? events : take_eventfd(kick_.get()); error != 0) {
            ring_->break_off(fmt::format("its kick cannot be waited for: {}", errno_text(-error)));
            wake();
            break;
        }
        bump(counters_.kicks);
        wake();
    }
}

/// The next request of the ring, understood; null when there is none.
Virtqueue::Slot* Virtqueue::take() {
    if (!may_take()) return nullptr;
    Slot* slot = take_slot();
    BlkRequest& request = slot->request;
    if (ring_->take(request.chain, space_) != Take::kChain) {
        free_.push_back(slot);
        return nullptr;
    }
    set_in_flight(in_flight_ + 1);
    if (listening_) {
        listening_ = false;
        ring_->quiet();
    }
    if (const char* fault = service_.begin(request)) [[unlikely]] {
        ring_->break_off(fault);
        free_.push_back(slot);
        forget();
        return nullptr;
    }
    channel_.expect(request.offset);
    return slot;
}

/// Takes what there is, up to a turn's share; true when there may be more. Each is taken before the one ahead of it is
/// answered, so that what it needs is on its way into the CPU's cache.
bool Virtqueue::serve() {
    unsigned taken = 0;
    uint64_t bytes = 0, unpublished = 0;
    for (Slot* slot = take(); slot;) {
        BlkRequest& request = slot->request;
        ++taken;
        bytes += request.data.bytes;
        const bool turn_over = taken == kTurnRequests || bytes >= kTurnBytes;
        Slot* next = turn_over ? nullptr : take();
        if (service_.try_answer(request, channel_)) {
            finished_.push_back(slot);
            unpublished += request.data.bytes;
        } else {
            scope_.spawn(answer_later(slot));
        }
        if (finished_.size() >= kPublishEvery || unpublished >= kPublishBytes) {
            publish();
            unpublished = 0;
        }
        if (turn_over) return true;
        slot = next;
    }
    return false;
}

Task<void> Virtqueue::answer_later(Slot* slot) {
    co_await service_.answer(slot->request, channel_);
    finished_.push_back(slot);
    wake();
}

/// One that is taken and cannot be answered.
void Virtqueue::forget() {
    set_in_flight(in_flight_ - 1);
    if (in_flight_ == 0) settled_.notify_all();
}

/// Gives the driver what is finished, and tells it at most once.
void Virtqueue::publish() {
    if (finished_.empty()) return;
    used_.clear();
    for (Slot* slot : finished_) {
        BlkRequest& request = slot->request;
        BlkService::write_status(request);
        if (log_) [[unlikely]]
            mark_written(request);
        count(request);
        used_.push_back({request.chain.id, request.chain.slots, request.written});
        if (request.chain.parts.capacity() > kKeptParts) [[unlikely]]
            request.chain.parts = {};
        free_.push_back(slot);
    }
    set_in_flight(in_flight_ - finished_.size());
    answered_ = true;
    finished_.clear();
    check_memory();
    if (ring_->publish(used_) && call_) {
        bump(counters_.signals);
        call_->signal();
    }
    if (in_flight_ == 0 && !settled_.empty()) settled_.notify_all();
}

/// What was cut off reads as zeroes, which may look like a ring without requests.
void Virtqueue::check_memory() {
    if (space_.broken()) [[unlikely]]
        ring_->break_off("part of the memory file was cut off");
    if (log_) [[unlikely]] {
        if (log_->broken()) ring_->break_off("part of the log of written pages was cut off");
        if (log_->beyond()) ring_->break_off("the log of written pages is too small for the guest's memory");
    }
}

void Virtqueue::mark_written(const BlkRequest& request) {
    const Chain& chain = request.chain;
    const auto mark = [this](const void* host, size_t length) {
        uint64_t address;
        if (length > 0 && space_.memory().guest_address(host, address)) log_->mark(address, length);
    };
    for (size_t i = chain.readable; i < chain.parts.size(); ++i) mark(chain.parts[i].iov_base, chain.parts[i].iov_len);
    mark(request.status, 1);
}

void Virtqueue::count(const BlkRequest& request) {
    bump(counters_.requests);
    if (request.answer != BlkStatus::kOk) return;
    if (request.type == BlkType::kIn) bump(counters_.bytes_read, request.data.bytes);
    if (request.type == BlkType::kOut) bump(counters_.bytes_written, request.data.bytes);
}

void Virtqueue::set_in_flight(size_t count) {
    in_flight_ = count;
    counters_.in_flight.store(count, std::memory_order_relaxed);
}

void Virtqueue::report_fault() {
    fault_reported_ = true;
    broken_(index_, ring_->fault());
}

}  // namespace gantry::virtio
