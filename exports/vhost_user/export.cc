#include "exports/vhost_user/export.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "exports/virtio/disk.h"
#include "runtime/check.h"
#include "runtime/log.h"
#include "schema/options.h"

namespace gantry::vhost_user {

namespace {

/// Requests name queues with eight bits (SET_VRING_KICK).
constexpr uint64_t kMostQueues = kIndexMask + 1;
constexpr std::chrono::milliseconds kAcceptPause{200};
constexpr unsigned kWarningsPerSecond = 5;

bool out_of_resources(int error) { return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM; }

}  // namespace

const exports::ExportType kVhostUserExportType = {"vhost-user-blk", &VhostUserExport::create};

Result<std::unique_ptr<exports::Export>> VhostUserExport::create(exports::ExportContext context) {
    const schema::Options options(context.options);
    VhostUserOptions out;
    out.address = options.object("addr");
    CHECK_OK(check_entrance(out.address));
    virtio::BlkShape& shape = out.shape;
    TRY(shape.block_size, virtio::check_block_size(context.id, options.size("logical-block-size", shape.block_size)));
    const uint64_t queues = options.size("num-queues", shape.queues);
    if (queues == 0) return fail(ErrorKind::kInvalid, "num-queues must be greater than 0");
    if (queues > kMostQueues) {
        return fail(ErrorKind::kInvalid, "num-queues must not be greater than {}: the protocol has no more numbers",
                    kMostQueues);
    }
    shape.queues = static_cast<uint16_t>(queues);
    const uint64_t queue_size = options.size("x-queue-size", shape.queue_size);
    if (!virtio::is_queue_size(queue_size)) {
        return fail(ErrorKind::kInvalid, "x-queue-size must be a power of 2 from {} to {}, not {}",
                    virtio::kLeastQueueSize, virtio::kMaxQueueSize, queue_size);
    }
    shape.queue_size = static_cast<uint16_t>(queue_size);
    shape.serial = options.str("x-serial", std::string_view(context.id).substr(0, virtio::BlkDevice::kIdBytes));
    if (shape.serial.size() > virtio::BlkDevice::kIdBytes) {
        return fail(ErrorKind::kInvalid, "x-serial '{}' has {} bytes; drivers see at most {}", shape.serial,
                    shape.serial.size(), virtio::BlkDevice::kIdBytes);
    }
    return std::make_unique<VhostUserExport>(std::move(context), std::move(out));
}

VhostUserExport::VhostUserExport(exports::ExportContext context, VhostUserOptions options)
    : Export(std::move(context)), options_(std::move(options)) {}

VhostUserExport::~VhostUserExport() { CHECK(scope_.live() == 0, "an export is destroyed when its front end has gone"); }

block::EdgePerms VhostUserExport::perms() const {
    block::EdgePerms perms;
    perms.need = block::Perm::kConsistentRead;
    if (writable()) perms.need |= block::Perm::kWrite;
    return perms;
}

Task<Result<>> VhostUserExport::start() {
    CO_TRY(entrance_, open_entrance(options_.address, context_.resolve_fd));
    device_ = std::make_unique<Device>(id(), root(), context_.loops,
                                       virtio::complete(options_.shape, context_.options, writable(), root().node()));
    device_->on_fault = [this](size_t index, const std::string&) {
        if (session_) session_->queue_broke(index);
    };
    log::info("export '{}': node '{}' as vhost-user-blk on '{}'", id(), root().node().name(), entrance_.name);
    if (entrance_.connected) {
        scope_.spawn(serve(std::move(entrance_.connected)));
    } else {
        scope_.spawn(accept_front_ends());
    }
    co_return Result<>();
}

Task<void> VhostUserExport::accept_front_ends() {
    while (!stopping_) {
        CancellableIo readable(io_poll(entrance_.listening.get(), POLLIN));
        waiting_ = &readable;
        co_await readable;
        waiting_ = nullptr;
        if (stopping_) break;
        // The next one waits until what the last one has asked for is over.
        if (session_ && session_->leaving()) {
            co_await session_ended_.wait();
            continue;
        }
        UniqueFd socket(::accept4(entrance_.listening.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
        const int error = socket ? 0 : errno;
        if (socket && session_) {
            turn_away(std::move(socket));
        } else if (socket) {
            scope_.spawn(serve(std::move(socket)));
        }
        // What else can happen (ECONNABORTED, ...) concerns one front end that has gone already.
        if (out_of_resources(error)) {
            log::warn("export '{}': cannot accept a front end: {}; trying again shortly", id(), errno_text(error));
            co_await pause_.after(kAcceptPause);
        } else {
            co_await pause_.until(Clock::time_point::min());
        }
    }
    close_entrance();
}

void VhostUserExport::turn_away(UniqueFd socket) {
    if (!may_warn()) return;
    log::warn("export '{}': front end {} was turned away: {} is connected, and a device has one at a time", id(),
              peer_name(socket.get()), session_->peer());
}

Task<void> VhostUserExport::serve(UniqueFd socket) {
    session_ = std::make_unique<Session>(*device_, std::move(socket));
    const std::string peer = session_->peer();
    log::info("export '{}': front end {} connected", id(), peer);
    if (stopping_) session_->cut();
    co_await session_->run();
    if (!session_->violation().empty() && !stopping_) {
        if (may_warn()) log::warn("export '{}': front end {} was cut off: {}", id(), peer, session_->violation());
    } else {
        log::info("export '{}': front end {} has gone", id(), peer);
    }
    session_.reset();
    session_ended_.notify_all();
}

bool VhostUserExport::may_warn() {
    const auto now = Clock::now();
    if (now - warning_second_ >= std::chrono::seconds(1)) {
        warning_second_ = now;
        warnings_ = 0;
    }
    return warnings_++ < kWarningsPerSecond;
}

void VhostUserExport::close_entrance() {
    entrance_.file.remove();
    if (!entrance_.listening) return;
    Loop::current().forget_fd(entrance_.listening.get());
    entrance_.listening.reset();
}

Task<bool> VhostUserExport::let_go() {
    if (session_) co_return false;
    stopping_ = true;
    if (waiting_) waiting_->cancel();
    pause_.cancel();
    co_return true;
}

Task<void> VhostUserExport::stop() {
    stopping_ = true;
    if (waiting_) waiting_->cancel();
    pause_.cancel();
    session_ended_.notify_all();
    if (session_) session_->cut();
    co_await scope_.join();
    close_entrance();
    device_.reset();
}

void VhostUserExport::on_resize(uint64_t new_size) {
    if (!device_ || stopping_) return;
    device_->blk().set_size(new_size);
    if (session_) session_->config_changed();
}

json::object VhostUserExport::details() const {
    json::object out{{"socket", entrance_.name},
                     {"writable", writable()},
                     {"logical-block-size", options_.shape.block_size},
                     {"num-queues", options_.shape.queues},
                     {"queue-size", options_.shape.queue_size},
                     {"serial", options_.shape.serial},
                     {"connected", session_ != nullptr}};
    if (!device_) return out;
    out["features-offered"] = device_->blk().features() | kLogAll | kHasProtocolFeatures;
    if (session_) out["front-end"] = session_->details();
    return out;
}

}  // namespace gantry::vhost_user
