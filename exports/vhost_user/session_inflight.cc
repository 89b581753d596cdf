// The inflight region ("Inflight I/O tracking") and the log of written pages ("Migration").

#include "exports/vhost_user/session.h"
#include "runtime/cross_loop.h"
#include "runtime/log.h"

namespace gantry::vhost_user {

namespace {

/// In the member `features` of the first queue's region, which the specification leaves at 0 and other back ends do not
/// look at: the driver has switched the write cache off. The process after this one must know, for the driver will not
/// say it again.
constexpr uint64_t kWriteCacheOff = uint64_t{1} << 63;
constexpr uint32_t kWriteCacheOffset = 32;  // of `wce` in the configuration space

}  // namespace

Session::Answer Session::get_inflight(const Message& message) {
    auto area = message.as<InflightArea>();
    Reply out;
    out.sent = true;
    const auto finish = [&] {
        // As long as the request was: front ends differ about the padding.
        const auto bytes = bytes_of(area);
        out.payload.assign(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(message.payload.size()));
        return std::move(out);
    };
    area.size = area.offset = 0;
    if (area.queues > device_.queue_limit()) {
        log::warn("export '{}': front end {} asks for an inflight region of {} queues; at most {} are served",
                  device_.id(), peer(), area.queues, device_.queue_limit());
        return finish();
    }
    auto made = virtio::InflightFile::create(area.queues, area.queue_size, (features() & virtio::kRingPacked) != 0);
    if (!made) {
        log::warn("export '{}': no inflight region for front end {}: {}", device_.id(), peer(), made.error().message());
        return finish();
    }
    inflight_ = std::move(*made);
    // Who comes back brings the region that it has: this is a driver that begins anew. (Whether the write cache was
    // switched off survives the end of a connection: the driver does not see that and would not do it again.)
    if (!config_written_ && !any_running()) forget_config();
    note_write_cache();
    area.size = inflight_->size();
    out.fd = inflight_->fd();
    return finish();
}

Result<> Session::set_inflight(Message message) {
    if (any_running()) return fail(ErrorKind::kBusy, "the inflight region cannot change while rings run");
    const auto area = message.as<InflightArea>();
    if (area.queues > device_.queue_limit()) {
        return fail(ErrorKind::kInvalid, "it is for {} queues; at most {} are served", area.queues,
                    device_.queue_limit());
    }
    TRY(inflight_, virtio::InflightFile::adopt(std::move(message.fds.front()), area.offset, area.size, area.queues,
                                               area.queue_size, (features() & virtio::kRingPacked) != 0));
    recall_write_cache();
    return {};
}

void Session::note_write_cache() {
    std::byte* region = inflight_ ? inflight_->region(0) : nullptr;
    if (!region) return;
    uint64_t all = 0;
    std::memcpy(&all, region, sizeof all);
    all = device_.blk().write_cache() ? all & ~kWriteCacheOff : all | kWriteCacheOff;
    std::memcpy(region, &all, sizeof all);
}

void Session::recall_write_cache() {
    const std::byte* region = inflight_ ? inflight_->region(0) : nullptr;
    if (!region || !(features() & virtio::kBlkConfigWce)) return;
    uint64_t all = 0;
    std::memcpy(&all, region, sizeof all);
    if (!(all & kWriteCacheOff)) return;
    constexpr std::byte kOff{0};
    const Result<> switched = device_.blk().write_config(kWriteCacheOffset, std::span(&kOff, 1));
    CHECK(switched, "who has chosen the feature may switch the write cache");
}

Task<Result<>> Session::set_log(Message message) {
    const auto area = message.as<LogArea>();
    CO_TRY(log_, virtio::DirtyLog::create(message.fds.front().get(), area.offset, area.size));
    co_await apply_log_to_all();
    co_return Result<>();
}

std::shared_ptr<virtio::DirtyLog> Session::active_log() const { return log_all_ ? log_ : nullptr; }

/// Where the part of the ring that we write lies for the log. For a packed ring front ends tell something else (qemu:
/// the address of the device area), while the descriptors are what matters.
uint64_t Session::ring_log_address(const RingState& ring) const {
    uint64_t address = ring.address->log;
    const virtio::RingShape shape = this->shape(ring);
    if (!shape.packed) return address;
    if (const auto where = place(*ring.address, shape, *memory_)) {
        (void)memory_->guest_address(where->descriptors, address);
    }
    return address;
}

Task<void> Session::apply_log(size_t index) {
    const RingState& r = rings_[index];
    if (!r.running) co_return;
    virtio::Virtqueue* queue = device_.made_queue(index);
    const bool ring = r.address->flags & kLogRing;
    co_await run_on(queue->loop(), queue->set_log(active_log(), ring, ring_log_address(r)));
}

Task<void> Session::apply_log_to_all() {
    for (size_t i = 0; i < rings_.size(); ++i) co_await apply_log(i);
}

}  // namespace gantry::vhost_user
