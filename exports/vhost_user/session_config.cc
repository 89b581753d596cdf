// The configuration space, and the back-end channel on which the front end learns of its changes.

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "exports/vhost_user/session.h"
#include "runtime/cross_loop.h"
#include "runtime/log.h"
#include "runtime/socket.h"

namespace gantry::vhost_user {

Session::Reply Session::get_config(const Message& message) const {
    const auto range = message.as<ConfigRange>();
    Reply out;
    out.sent = true;
    // An empty reply is how an error is told. Room for the answer comes with the request.
    if (range.size > kMaxConfigBytes || range.offset > kMaxConfigBytes - range.size) return out;
    if (message.payload.size() != sizeof range + range.size) return out;
    out.payload.resize(sizeof range + range.size);
    std::memcpy(out.payload.data(), &range, sizeof range);
    const virtio::BlkDevice::Config config = device_.blk().config();
    if (range.offset < config.size()) {
        const size_t there = std::min<size_t>(range.size, config.size() - range.offset);
        std::memcpy(out.payload.data() + sizeof range, config.data() + range.offset, there);
    }
    return out;
}

Task<Result<>> Session::set_config(Message message) {
    const auto range = message.as<ConfigRange>();
    if (range.flags > 1) co_return fail(ErrorKind::kInvalid, "flags {:#x} are not known", range.flags);
    virtio::BlkDevice& blk = device_.blk();
    const bool cached = blk.write_cache();
    CO_CHECK(blk.write_config(range.offset, std::span(message.payload).subspan(sizeof range)));
    config_written_ = true;
    note_write_cache();
    if (!cached || blk.write_cache()) co_return Result<>();
    // The driver flushes no more from the reply on: what it was told before is stable by then.
    co_await settle_queues();
    co_return co_await device_.flush();
}

/// What was taken before is answered.
Task<void> Session::settle_queues() {
    for (size_t i = 0; i < rings_.size(); ++i) {
        if (!rings_[i].running) continue;
        virtio::Virtqueue* queue = device_.made_queue(i);
        co_await run_on(queue->loop(), queue->pause());
        co_await run_on(queue->loop(), queue->resume());
    }
}

Result<> Session::set_backend_channel(Message message) {
    CHECK_OK(check_connected_socket(message.fds.front().get()));
    backend_channel_ = std::move(message.fds.front());
    return {};
}

void Session::config_changed() {
    if (!backend_channel_ || ended_) return;
    if (send_notice(backend_channel_.get(), kConfigChange)) return;
    // What fills the socket are notices that are not read yet: whoever reads the first one looks at what holds then.
    if (errno == EAGAIN) return;
    log::debug("export '{}': front end {} cannot be told of the new size: {}", device_.id(), peer(), errno_text(errno));
    backend_channel_.reset();
}

}  // namespace gantry::vhost_user
