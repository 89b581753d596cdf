#include "exports/vduse/queues.h"

#include <sys/eventfd.h>

#include <atomic>
#include <bit>

#include "exports/virtio/chain_reader.h"
#include "exports/virtio/disk.h"
#include "exports/virtio/packed_inflight.h"
#include "exports/virtio/shared.h"
#include "runtime/cross_loop.h"
#include "runtime/log.h"

namespace gantry::vduse {

using namespace std::chrono_literals;

namespace {

/// An index in the driver's memory, read once.
uint16_t index_at(const std::byte* area) {
    static_assert(std::endian::native == std::endian::little);
    return virtio::load<uint16_t>(area + 2, std::memory_order_acquire);
}

/// Where to go on with a ring that somebody has served and left no record of. Only what nothing is in flight on shows
/// that by itself.
std::optional<uint32_t> place_of_idle(const FoundRing& ring) {
    if (ring.shape.packed) return std::nullopt;
    const uint16_t used = index_at(ring.place.device);
    if (index_at(ring.place.driver) != used) return std::nullopt;
    return used;
}

/// Whether nobody has answered anything on a ring that begins at `ring.base`.
bool is_untouched(const FoundRing& ring) {
    if (!ring.shape.packed) return index_at(ring.place.device) == static_cast<uint16_t>(ring.base);
    const uint32_t slot = ring.base >> 16 & 0x7fff;
    if (slot >= ring.shape.size) return true;  // Ring::create refuses it
    const auto flags = virtio::load<uint16_t>(ring.place.descriptors + virtio::kDescBytes * slot + 14);
    const bool wrap = ring.base >> 31 != 0;
    return ((flags & virtio::kPackedUsed) != 0) != wrap || ((flags & virtio::kPackedAvail) != 0) != wrap;
}

}  // namespace

Result<std::unique_ptr<FoundRing>> find_ring(const Device& device, Iotlb& iotlb, uint32_t index, uint64_t features,
                                             uint32_t most) {
    auto ring = std::make_unique<FoundRing>();
    virtio::RingShape& shape = ring->shape;
    shape.packed = (features & virtio::kRingPacked) != 0;
    shape.event_idx = (features & virtio::kRingEventIdx) != 0;
    shape.indirect = (features & virtio::kRingIndirect) != 0;
    TRY(const QueueInfo info, device.queue(index, shape.packed));
    if (!info.ready) return nullptr;
    shape.size = info.size;
    ring->base = info.base;
    if (info.size < 2 || info.size > most || (!shape.packed && !std::has_single_bit(info.size)))
        return fail(ErrorKind::kInvalid, "queue {} has {} descriptors; at most {}{} are served", index, info.size, most,
                    shape.packed ? "" : ", a power of two,");
    const virtio::AreaNeeds needs = virtio::area_needs(shape);
    struct Area {
        std::byte*& at;
        uint64_t address, bytes;
        uint32_t align;
    };
    for (const Area& area :
         {Area{ring->place.descriptors, info.descriptors, needs.descriptors, needs.descriptors_align},
          Area{ring->place.driver, info.driver, needs.driver, needs.driver_align},
          Area{ring->place.device, info.device, needs.device, needs.device_align}}) {
        if (area.address % area.align != 0)
            return fail(ErrorKind::kInvalid, "queue {} has an area at {:#x}, which is not aligned to {}", index,
                        area.address, area.align);
        area.at = iotlb.area(area.address, area.bytes);
        if (!area.at)
            return fail(ErrorKind::kInvalid, "queue {} has an area at {:#x} ({} bytes) that is not in the memory",
                        index, area.address, area.bytes);
    }
    return ring;
}

/// Interrupts that the kernel did not take yet: while it notes DRIVER_OK, which it does after our answer to that, it
/// refuses them.
struct Queues::Owed {
    explicit Owed(size_t queues) : flags(queues) {}
    std::vector<std::atomic<bool>> flags;
    Queues* owner = nullptr;  // main loop only
};

class Queues::Interrupt final : public virtio::Call {
  public:
    Interrupt(const Device& device, uint32_t index, Loop& main_loop, std::shared_ptr<Owed> owed)
        : device_(device), index_(index), main_loop_(main_loop), owed_(std::move(owed)) {}
    void signal() override {
        if (device_.inject_irq(index_) != -EINVAL) [[likely]]
            return;
        if (owed_->flags[index_].exchange(true)) return;
        main_loop_.post([owed = owed_] {
            Queues* queues = owed->owner;
            if (!queues || queues->delivering_ || !queues->running_) return;
            queues->delivering_ = true;
            queues->scope_.spawn(queues->deliver_owed());
        });
    }

  private:
    const Device& device_;
    const uint32_t index_;
    Loop& main_loop_;
    const std::shared_ptr<Owed> owed_;
};

Task<void> Queues::deliver_owed() {
    std::chrono::milliseconds pause = 1ms;
    for (bool more = true; more && running_;) {
        more = false;
        for (uint32_t i = 0; i < owed_->flags.size(); ++i) {
            if (!owed_->flags[i].exchange(false)) continue;
            if (device_.inject_irq(i) != -EINVAL) continue;
            owed_->flags[i] = more = true;
        }
        if (!more || !running_) break;
        (void)co_await pause_.after(pause);
        pause = std::min<std::chrono::milliseconds>(pause * 2, 100ms);
    }
    delivering_ = false;
}

Queues::Queues(Device& device, Record& record, const virtio::BlkService& service, block::Root& root,
               std::vector<Loop*> loops, std::string user)
    : device_(device),
      record_(record),
      service_(service),
      root_(root),
      loops_(std::move(loops)),
      user_(std::move(user)),
      queue_count_(service.device().shape().queues),
      iotlb_(device),
      queues_(queue_count_),
      owed_(std::make_shared<Owed>(queue_count_)) {
    owed_->owner = this;
}

Queues::~Queues() { owed_->owner = nullptr; }

Task<Result<>> Queues::make_queue(uint32_t index) {
    Queue& q = queues_[index];
    if (q.queue) co_return Result<>();
    Loop& loop = *loops_[index % loops_.size()];
    block::Channel* channel = co_await root_.channel(loop);
    Loop* home = &Loop::current();
    auto broken = [owed = owed_, home](size_t broken_index, const std::string& fault) {
        home->post([owed, broken_index, fault] {
            if (!owed->owner) return;
            owed->owner->queues_[broken_index].fault = fault;
            log::error("{}: queue {} is not served any more, until the driver resets the device: {}",
                       owed->owner->user_, broken_index, fault);
        });
    };
    queues_[index].queue = std::make_unique<virtio::Virtqueue>(loop, index, service_, *channel, std::move(broken));
    co_return Result<>();
}

/// Sets `ring.base`, which counts where nothing is noted of the queue. False: it is not to be started.
Result<bool> Queues::find_place(uint32_t index, Begin begin, FoundRing& ring) const {
    if (begin == Begin::kFresh || (file_ && file_->in_use(index))) return true;
    const bool forgotten = file_ && file_->forgotten(index);
    if (begin == Begin::kAgain && (forgotten || is_untouched(ring))) return true;
    if (const auto idle = place_of_idle(ring)) {
        ring.base = *idle;
        return true;
    }
    // What the record knows no more was being reset, and that is asked for again.
    if (begin == Begin::kTakeOver && forgotten) return false;
    return fail(
        ErrorKind::kBusy,
        "queue {}: requests may be in flight that a process before this one has taken, and nobody has kept which",
        index);
}

Task<Result<>> Queues::start_one(uint32_t index, Begin begin, std::optional<uint32_t> base) {
    CO_TRY(const auto found, find_ring(device_, iotlb_, index, features_, service_.device().shape().queue_size));
    if (!found) co_return Result<>();
    if (base) found->base = *base;
    CO_TRY(const bool wanted, find_place(index, begin, *found));
    if (!wanted) co_return Result<>();
    std::unique_ptr<virtio::Inflight> inflight;
    if (file_) {
        inflight = std::make_unique<virtio::Inflight>();
        inflight->region = file_->region(index);
        inflight->queue_size = file_->queue_size();
        inflight->file = file_;
    }
    auto ring = virtio::Ring::create(found->shape, found->place, found->base, std::move(inflight));
    if (!ring) co_return fail(ring.error().kind(), "queue {}: {}", index, ring.error().message());
    virtio::QueueStart start;
    start.ring = std::move(*ring);
    start.memory = iotlb_.memory();
    start.source = &iotlb_;
    start.kick.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!start.kick) co_return fail_errno(errno, "queue {}: making its kick", index);
    CO_CHECK(device_.set_kick(index, start.kick.get()));

    CO_CHECK(co_await make_queue(index));
    Queue& q = queues_[index];
    q.fault.clear();
    q.shape = found->shape;
    q.started = true;
    virtio::Virtqueue& queue = *q.queue;
    auto call = std::make_unique<Interrupt>(device_, index, Loop::current(), owed_);
    if (begin == Begin::kFresh) {
        co_await run_on(queue.loop(), queue.set_call(std::move(call)));
        co_await run_on(queue.loop(), queue.start(std::move(start)));
    } else {
        // Whoever was killed may have answered requests without telling: a call that comes later tells at once.
        co_await run_on(queue.loop(), queue.start(std::move(start)));
        co_await run_on(queue.loop(), queue.set_call(std::move(call)));
    }
    co_await run_on(queue.loop(), queue.enable(true));
    co_return Result<>();
}

Task<uint32_t> Queues::stop_one(uint32_t index) {
    virtio::Virtqueue& queue = *queues_[index].queue;
    const uint32_t base = co_await run_on(queue.loop(), queue.stop());
    co_await run_on(queue.loop(), queue.enable(false));
    co_await run_on(queue.loop(), queue.set_call(nullptr));
    queues_[index].started = false;
    // The kernel lets the kick go at a reset in any case; what goes wrong here shows there.
    [[maybe_unused]] const Result<> unset = device_.set_kick(index, -1);
    co_return base;
}

/// Takes over what a process before this one has noted of the rings, when they are such that it can be used: what is
/// taken is handed out once.
Result<> Queues::inherit(bool packed) {
    for (uint32_t i = 0; i < queues_.size(); ++i)
        CHECK_OK(find_ring(device_, iotlb_, i, features_, service_.device().shape().queue_size));
    TRY(file_, record_.inherit(packed));
    return {};
}

Task<Result<>> Queues::start(uint64_t features, Begin begin) {
    const bool packed = (features & virtio::kRingPacked) != 0;
    features_ = features;
    running_ = true;
    Result<> started;
    if (begin != Begin::kFresh) started = inherit(packed);
    const bool inherited = file_ != nullptr;
    if (started && !inherited) file_ = record_.begin(packed);
    for (auto& owed : owed_->flags) owed = false;
    for (uint32_t i = 0; started && i < queues_.size(); ++i) started = co_await start_one(i, begin, std::nullopt);
    if (started) co_return Result<>();
    co_await stop();
    // An empty one would say to the next process that nothing was in flight.
    if (begin != Begin::kFresh && !inherited && record_.kept()) record_.drop();
    co_return started;
}

Task<Positions> Queues::stop() {
    running_ = false;
    pause_.cancel();
    Positions positions(queues_.size());
    for (uint32_t i = 0; i < queues_.size(); ++i) {
        if (!queues_[i].started) continue;
        const uint32_t base = co_await stop_one(i);
        positions[i] = base;
    }
    file_.reset();
    iotlb_.drop();
    co_return positions;
}

Task<Result<uint32_t>> Queues::position(uint32_t index) {
    if (index >= queues_.size()) co_return fail(ErrorKind::kInvalid, "there is no queue {}", index);
    const bool packed = (features_ & virtio::kRingPacked) != 0;
    if (!running_ || !queues_[index].started) {
        CO_TRY(const QueueInfo info, device_.queue(index, packed));
        co_return info.base;
    }
    const uint32_t base = co_await stop_one(index);
    CO_CHECK(co_await start_one(index, Begin::kFresh, base));
    co_return base;
}

Task<void> Queues::remap() {
    if (!running_) {
        iotlb_.drop();
        co_return;
    }
    for (Queue& q : queues_) {
        if (q.started) co_await run_on(q.queue->loop(), q.queue->pause());
    }
    iotlb_.drop();
    for (uint32_t i = 0; i < queues_.size(); ++i) {
        Queue& q = queues_[i];
        if (!q.started) continue;
        auto found = find_ring(device_, iotlb_, i, features_, service_.device().shape().queue_size);
        if (found && *found && (*found)->shape.size == q.shape.size) {
            co_await run_on(q.queue->loop(), q.queue->resume_in(iotlb_.memory(), (*found)->place));
            continue;
        }
        std::string fault = found ? "it is not what it was before the memory changed" : found.error().message();
        co_await run_on(q.queue->loop(), q.queue->break_off(std::move(fault)));
        co_await run_on(q.queue->loop(), q.queue->resume());
    }
}

Task<void> Queues::join() {
    pause_.cancel();
    co_await scope_.join();
}

std::string Queues::requests_left() const {
    std::vector<const virtio::Virtqueue*> all;
    for (const Queue& q : queues_) all.push_back(q.queue.get());
    return virtio::requests_left(all);
}

json::array Queues::details() const {
    json::array all;
    for (const Queue& q : queues_) {
        if (q.queue) all.push_back(virtio::details_of(*q.queue, q.shape, q.started, q.started, q.fault));
    }
    return all;
}

}  // namespace gantry::vduse
