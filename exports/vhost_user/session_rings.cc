// Rings: what a front end says of them, and when they run.

#include <fcntl.h>

#include <bit>
#include <cerrno>

#include "exports/vhost_user/session.h"
#include "exports/virtio/call.h"
#include "runtime/cross_loop.h"
#include "runtime/log.h"

namespace gantry::vhost_user {

namespace {

Result<UniqueFd> duplicate(const UniqueFd& fd) {
    UniqueFd copy(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 3));
    if (!copy) return fail_errno(errno, "duplicating the eventfd of a queue");
    return copy;
}

/// Others could make us wait for them, or wake us all the time.
Result<> check_eventfd(const UniqueFd& fd, uint64_t index) {
    if (fd && !virtio::is_eventfd(fd.get())) {
        return fail(ErrorKind::kInvalid, "the descriptor for queue {} is not an eventfd", index);
    }
    return {};
}

Task<void> begin(virtio::Virtqueue* queue, virtio::QueueStart start, bool enabled, std::unique_ptr<virtio::Call> call) {
    co_await queue->enable(enabled);
    co_await queue->start(std::move(start));
    // Last, as it tells the driver at once: a process before this one may have published and been killed before that.
    co_await queue->set_call(std::move(call));
}

Task<uint32_t> end(virtio::Virtqueue* queue) {
    const uint32_t base = co_await queue->stop();
    co_await queue->set_call(nullptr);
    co_return base;
}

}  // namespace

Result<> Session::set_size(VringState state) {
    TRY(RingState * r, ring(state.index));
    if (r->running) return fail(ErrorKind::kBusy, "the size of ring {} cannot change while it runs", state.index);
    if (state.num < 2 || state.num > virtio::kMaxQueueSize) {
        return fail(ErrorKind::kInvalid, "ring {} has {} descriptors; from 2 to {} are served", state.index, state.num,
                    virtio::kMaxQueueSize);
    }
    r->size = state.num;
    return {};
}

Result<> Session::set_base(VringState state) {
    TRY(RingState * r, ring(state.index));
    if (r->running) return fail(ErrorKind::kBusy, "the base of ring {} cannot change while it runs", state.index);
    // After a status of 0 the driver begins elsewhere: what it had asked for is answered, and where the region says
    // that this has ended counts no more. (Who was merely paused goes on there, even in another process.)
    if (r->has_run && r->ended_at && *r->ended_at != state.num && inflight_) inflight_->forget(state.index);
    r->base = state.num;
    r->ended_at.reset();
    return {};
}

Task<Result<>> Session::set_address(VringAddress address) {
    CO_TRY(RingState * r, ring(address.index));
    if (r->running) {
        const VringAddress& now = *r->address;
        if (now.descriptors != address.descriptors || now.used != address.used || now.available != address.available) {
            co_return fail(ErrorKind::kBusy, "ring {} cannot move while it runs", address.index);
        }
        r->address = address;
        co_await apply_log(address.index);
        co_return Result<>();
    }
    r->address = address;
    co_return co_await start_if_ready(address.index);
}

Task<Session::Answer> Session::get_base(VringState state) {
    CO_TRY(RingState * r, ring(state.index));
    co_await stop(state.index);
    r->started = false;
    r->kick.reset();
    co_return reply(VringState{state.index, r->ended_at.value_or(r->base)});
}

Task<Result<>> Session::set_kick(uint64_t value, UniqueFd fd) {
    const size_t index = value & kIndexMask;
    CO_TRY(RingState * r, ring(index));
    CO_CHECK(check_eventfd(fd, index));
    co_await stop(index);
    r->kick = std::move(fd);
    r->started = true;
    co_return co_await start_if_ready(index);
}

Task<Result<>> Session::set_call(uint64_t value, UniqueFd fd) {
    const size_t index = value & kIndexMask;
    CO_TRY(RingState * r, ring(index));
    CO_CHECK(check_eventfd(fd, index));
    std::unique_ptr<virtio::Call> call;
    if (fd && r->running) {
        CO_TRY(UniqueFd copy, duplicate(fd));
        call = std::make_unique<virtio::EventCall>(std::move(copy));
    }
    r->call = std::move(fd);
    if (!r->running) co_return Result<>();
    virtio::Virtqueue* queue = device_.made_queue(index);
    co_await run_on(queue->loop(), queue->set_call(std::move(call)));
    co_return Result<>();
}

Result<> Session::set_error(uint64_t value, UniqueFd fd) {
    const size_t index = value & kIndexMask;
    TRY(RingState * r, ring(index));
    CHECK_OK(check_eventfd(fd, index));
    r->error = std::move(fd);
    return {};
}

Task<Result<>> Session::set_enabled(VringState state) {
    CO_TRY(RingState * r, ring(state.index));
    if (state.num > 1) co_return fail(ErrorKind::kInvalid, "{} neither enables nor disables a ring", state.num);
    r->enabled = state.num == 1;
    if (!r->running) co_return Result<>();
    virtio::Virtqueue* queue = device_.made_queue(state.index);
    co_await run_on(queue->loop(), queue->enable(r->enabled));
    co_return Result<>();
}

Task<void> Session::disable_all() {
    for (size_t i = 0; i < rings_.size(); ++i) {
        rings_[i].enabled = false;
        if (!rings_[i].running) continue;
        virtio::Virtqueue* queue = device_.made_queue(i);
        co_await run_on(queue->loop(), queue->enable(false));
    }
}

virtio::RingShape Session::shape(const RingState& ring) const {
    return {.size = ring.size,
            .packed = (features() & virtio::kRingPacked) != 0,
            .event_idx = (features() & virtio::kRingEventIdx) != 0,
            .indirect = (features() & virtio::kRingIndirect) != 0};
}

Result<virtio::RingPlace> Session::place(const VringAddress& address, const virtio::RingShape& shape,
                                         const virtio::GuestMemory& memory) const {
    const virtio::AreaNeeds needs = virtio::area_needs(shape);
    const auto find = [&](std::string_view what, uint64_t user, uint64_t size, uint32_t align) -> Result<std::byte*> {
        std::byte* host = memory.at_user(user, size);
        if (!host) {
            return fail(ErrorKind::kInvalid,
                        "the {} of ring {} ({} bytes at user address {:#x}) is in no memory region", what,
                        address.index, size, user);
        }
        if (reinterpret_cast<uintptr_t>(host) % align != 0) {
            return fail(ErrorKind::kInvalid, "the {} of ring {} at user address {:#x} is not aligned to {} bytes", what,
                        address.index, user, align);
        }
        return host;
    };
    virtio::RingPlace place;
    TRY(place.descriptors, find("descriptor area", address.descriptors, needs.descriptors, needs.descriptors_align));
    TRY(place.driver, find("driver area", address.available, needs.driver, needs.driver_align));
    TRY(place.device, find("device area", address.used, needs.device, needs.device_align));
    return place;
}

Task<Result<>> Session::start_if_ready(size_t index) {
    const RingState& r = rings_[index];
    if (!r.started || r.running || r.size == 0 || !r.address || !memory_ || !features_chosen_) co_return Result<>();
    co_return co_await start(index);
}

Task<Result<>> Session::start(size_t index) {
    RingState& r = rings_[index];
    const virtio::RingShape shape = this->shape(r);
    if (!shape.packed && !std::has_single_bit(shape.size)) {
        co_return fail(ErrorKind::kInvalid, "split ring {} has {} descriptors, which is no power of two", index,
                       shape.size);
    }
    CO_TRY(const virtio::RingPlace where, place(*r.address, shape, *memory_));
    std::unique_ptr<virtio::Inflight> inflight;
    if (std::byte* region = inflight_ ? inflight_->region(index) : nullptr) {
        if (inflight_->packed() != shape.packed) {
            co_return fail(ErrorKind::kInvalid, "the inflight region was made for {} rings, and ring {} is {}",
                           inflight_->packed() ? "packed" : "split", index, shape.packed ? "packed" : "split");
        }
        inflight = std::make_unique<virtio::Inflight>(inflight_, region, inflight_->queue_size());
    }
    virtio::QueueStart start;
    CO_TRY(start.ring, virtio::Ring::create(shape, where, r.base, std::move(inflight)));
    start.memory = memory_;
    start.log = active_log();
    if (start.log && (r.address->flags & kLogRing)) start.ring->set_log(start.log, ring_log_address(r));
    std::unique_ptr<virtio::Call> call;
    if (r.call) {
        CO_TRY(UniqueFd copy, duplicate(r.call));
        call = std::make_unique<virtio::EventCall>(std::move(copy));
    }
    start.kick = std::move(r.kick);
    virtio::Virtqueue* queue = co_await device_.queue(index);
    device_.begin(index);
    r.running = r.has_run = true;
    r.ended_at.reset();
    log::debug("export '{}': ring {} runs on {}: {} descriptors, {}{}{}", device_.id(), index, queue->loop().name(),
               shape.size, shape.packed ? "packed" : "split", shape.event_idx ? ", event index" : "",
               start.kick ? "" : ", polled");
    co_await run_on(queue->loop(), begin(queue, std::move(start), r.enabled, std::move(call)));
    co_return Result<>();
}

/// Its requests are answered afterwards, and `base` is where to go on.
Task<void> Session::stop(size_t index) {
    RingState& r = rings_[index];
    if (!r.running) co_return;
    virtio::Virtqueue* queue = device_.made_queue(index);
    r.base = co_await run_on(queue->loop(), end(queue));
    r.running = false;
}

Task<void> Session::stop_all() {
    // None takes more while others finish; what the front end wants of them stays as it is.
    for (size_t i = 0; i < rings_.size(); ++i) {
        virtio::Virtqueue* queue = device_.made_queue(i);
        if (rings_[i].running) co_await run_on(queue->loop(), queue->enable(false));
    }
    for (size_t i = 0; i < rings_.size(); ++i) co_await stop(i);
}

bool Session::any_running() const {
    for (const RingState& r : rings_) {
        if (r.running) return true;
    }
    return false;
}

void Session::queue_broke(size_t index) {
    if (rings_[index].error) virtio::raise_eventfd(rings_[index].error.get());
}

}  // namespace gantry::vhost_user
