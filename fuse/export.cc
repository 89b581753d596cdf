#include "fuse/export.h"

#include <sys/types.h>
#include <unistd.h>

#include "runtime/check.h"
#include "runtime/cross_loop.h"
#include "runtime/log.h"
#include "schema/options.h"

namespace gantry::fuse {

namespace {

/// What a killed process waited with has gone by then.
constexpr std::chrono::seconds kPredecessorGone{10};

}  // namespace

const exports::ExportType kFuseExportType = {"fuse", &FuseExport::create};

Result<std::unique_ptr<exports::Export>> FuseExport::create(exports::ExportContext context) {
    const schema::Options options(context.options);
    FuseOptions fuse;
    fuse.mountpoint = options.str("mountpoint");
    fuse.growable = options.flag("growable");
    const std::string allow_other = options.str("allow-other", "auto");
    fuse.allow_other = allow_other == "off"  ? AllowOther::kOff
                       : allow_other == "on" ? AllowOther::kOn
                                             : AllowOther::kAuto;
    const std::string transport = options.str("x-transport", "classic");
    fuse.transport = transport == "uring"  ? Transport::kUring
                     : transport == "auto" ? Transport::kAuto
                                           : Transport::kClassic;
    fuse.passthrough = options.flag("x-passthrough");
    fuse.honour_o_trunc = options.str("x-o-trunc", "ignore") == "honour";
    fuse.cached = options.flag("x-cached");
    if (fuse.growable && !context.writable) {
        return fail(ErrorKind::kInvalid,
                    "growable=on goes with writable=on: a file that cannot be written cannot grow");
    }
    if (fuse.cached && context.writable) {
        return fail(ErrorKind::kInvalid,
                    "x-cached=on goes with writable=off: what the kernel keeps would not see other writers");
    }
    if (fuse.cached && fuse.passthrough) {
        return fail(ErrorKind::kInvalid, "x-cached=on and x-passthrough=on exclude each other; passthrough is cached");
    }
    if (fuse.growable && fuse.passthrough) {
        return fail(ErrorKind::kInvalid,
                    "growable=on and x-passthrough=on exclude each other: nobody would see that the file grows");
    }
    return std::make_unique<FuseExport>(std::move(context), std::move(fuse));
}

FuseExport::FuseExport(exports::ExportContext context, FuseOptions options)
    : Export(std::move(context)), options_(std::move(options)) {}

FuseExport::~FuseExport() { CHECK(scope_.live() == 0, "a FUSE export is destroyed when its queues have ended"); }

block::EdgePerms FuseExport::perms() const {
    block::EdgePerms perms;
    perms.need = block::Perm::kConsistentRead;
    if (writable()) perms.need |= block::Perm::kWrite;
    if (options_.growable) perms.need |= block::Perm::kResize;
    // What the kernel keeps would not see another writer.
    if (options_.cached) perms.share = block::Perm::kAll & ~block::Perm::kWrite;
    return perms;
}

Task<Result<>> FuseExport::start() {
    co_await inherit();
    if (!mount_) CO_CHECK(co_await open_session());
    Result<> up = co_await start_queues();
    if (!up) {
        co_await stop();
        co_return up;
    }
    log::info("export '{}': file '{}' shows node '{}' ({})", id(), mount_->path(), root().node().name(),
              transport_reason_);
    co_return Result<>();
}

std::string FuseExport::against_uring() const {
    if (options_.transport == Transport::kClassic) return "as asked";
    if (!context_.loops.front()->is_io_uring()) return "the I/O back end is epoll";
    if (options_.transport == Transport::kAuto && context_.keeper && context_.keeper->active()) {
        return "x-transport=auto prefers the one that survives a restart";
    }
    if (const auto cpus = possible_cpus(); !cpus) return cpus.error().message();
    return ring_offered();
}

Task<Result<>> FuseExport::open_session() {
    MountRequest request{.export_id = id(),
                         .mountpoint = options_.mountpoint,
                         .read_only = !writable(),
                         .allow_other = options_.allow_other,
                         .max_read = kMaxWrite};
    CO_TRY(mount_, co_await Mount::create(std::move(request)));
    transport_reason_ = against_uring();
    InitWishes wishes{.cached = options_.cached, .passthrough = options_.passthrough};
    if (transport_reason_.empty() && !mount_->can_abort()) {
        transport_reason_ = "fusermount3 made the mount, and only who may mount can end such queues";
    }
    if (transport_reason_.empty()) {
        wishes.io_uring = true;
        wishes.max_write = ring_shape(*possible_cpus()).max_write;
    }
    auto agreed = co_await agree_with_kernel(mount_->fd(), wishes);
    if (!agreed) {
        mount_.reset();
        co_return fail(agreed.error().kind(), "export '{}' on '{}': {}", id(), options_.mountpoint,
                       agreed.error().message());
    }
    agreed_ = *agreed;
    if (wishes.io_uring && !agreed_.has(kOverIoUring)) transport_reason_ = "the kernel does not offer it to this mount";
    co_return Result<>();
}

Task<Result<>> FuseExport::start_queues() {
    ServiceOptions options;
    options.writable = writable();
    options.growable = options_.growable;
    options.honour_o_trunc = options_.honour_o_trunc;
    options.allow_other = mount_->allow_other();
    options.cached = options_.cached;
    options.uid = ::getuid();
    options.gid = ::getgid();
    options.resize = [this](uint64_t size, bool grow_only) { return resize(size, grow_only); };
    options.allocated = [this] { return allocated_bytes(root().node().shared_from_this()); };
    options.status_changed = [this] {
        if (kept_) save_state();
    };
    service_ = std::make_unique<FileService>(context_.runtime->main_loop(), std::move(options));
    const auto written = co_await last_written_ns(root().node().shared_from_this());
    if (written) service_->attributes().set_mtime(*written);
    CO_CHECK(open_passthrough());

    std::vector<block::Channel*> channels;
    for (Loop* loop : context_.loops) {
        block::Channel* channel = co_await root().channel(*loop);
        channels.push_back(channel);
    }
    for (size_t i = 0; i < context_.loops.size(); ++i) {
        int fd = mount_->fd();
        if (i > 0 && i <= clones_.size()) {
            fd = clones_[i - 1].get();
        } else if (i > 0) {
            auto clone = clone_descriptor(fd);
            if (!clone) {
                log::warn("export '{}': {} queue(s) only: {}", id(), i, clone.error().message());
                break;
            }
            clones_.push_back(std::move(*clone));
            fd = clones_.back().get();
        }
        queues_.all.push_back(
            std::make_unique<ClassicQueue>(*context_.loops[i], fd, i, *service_, *channels[i], queues_));
    }
    if (legacy_) queues_.crowded_until = Clock::now() + kPredecessorGone;
    keep();
    for (const auto& queue : queues_.all) scope_.spawn(run_queue(queue.get()));
    if (!agreed_.has(kOverIoUring)) {
        transport_reason_ = "classic: " + transport_reason_;
        co_return Result<>();
    }
    const unsigned cpus = *possible_cpus();
    const size_t count = std::min<size_t>(context_.loops.size(), cpus);
    for (size_t i = 0; i < count; ++i) {
        std::vector<uint16_t> mine;
        for (unsigned cpu = 0; cpu < cpus; ++cpu) {
            if (cpu % count == i) mine.push_back(static_cast<uint16_t>(cpu));
        }
        rings_.push_back(std::make_unique<RingQueue>(*context_.loops[i], mount_->fd(), std::move(mine),
                                                     ring_shape(cpus), *service_, *channels[i]));
    }
    for (const auto& ring : rings_) scope_.spawn(run_ring(ring.get()));
    transport_reason_ = "io_uring";
    co_return Result<>();
}

Task<void> FuseExport::run_queue(ClassicQueue* queue) {
    const QueueEnd end = co_await run_on(queue->loop(), queue->run());
    queue_ended(end);
}

Task<void> FuseExport::run_ring(RingQueue* ring) {
    co_await run_on(ring->loop(), ring->run());
    if (const int error = ring->refused(); error != 0 && !stopping_) {
        transport_reason_ = "classic: the kernel refused a queue over io_uring: " + errno_text(error);
        log::warn("export '{}': {}", id(), transport_reason_);
    }
}

void FuseExport::queue_ended(QueueEnd end) {
    if (stopping_ || end == QueueEnd::kStopped) return;
    log::info("export '{}': '{}' {}", id(), mount_->path(),
              end == QueueEnd::kUnmounted ? "was unmounted" : "cannot be served any more");
    if (context_.ended) context_.ended();
}

Task<bool> FuseExport::let_go() {
    const Result<> unmounted = co_await mount_->unmount(false);
    if (!unmounted) log::info("export '{}': {}", id(), unmounted.error().message());
    co_return unmounted.has_value();
}

Task<void> FuseExport::stop() {
    stopping_ = true;
    if (service_) service_->hurry();
    // Notices wait for pages that are being read: those reads are answered, or the connection is aborted below.
    if (mount_ && (leaves() || !mount_->can_abort())) co_await notices_.join();
    // What was read is answered; what comes after that is not.
    for (const auto& queue : queues_.all) co_await run_on(queue->loop(), queue->stop());
    for (const auto& ring : rings_) co_await run_on(ring->loop(), ring->stop());
    keeping_pause_.cancel();
    co_await keeping_.join();
    if (mount_ && leaves()) {
        save_state();
        if (passthrough_) passthrough_->leave();
        mount_->leave();
    } else if (mount_) {
        // Whom the keeper's descriptors keep alive must not wait for answers.
        const bool kept = kept_ && mount_->can_abort();
        if (!rings_.empty() || notices_.live() > 0 || kept) co_await mount_->abort();
        if (kept_) kept_->end();
        Result<> unmounted = co_await mount_->unmount(true);
        if (!unmounted) log::warn("export '{}': {}", id(), unmounted.error().message());
    }
    co_await scope_.join();
    co_await notices_.join();
    passthrough_.reset();
    kept_.reset();
    clones_.clear();
    if (mount_) mount_->close_fd();
    queues_.all.clear();
    rings_.clear();
    service_.reset();
    mount_.reset();
}

Task<Result<>> FuseExport::resize(uint64_t size, bool grow_only) {
    block::Node& node = root().node();
    if (size > static_cast<uint64_t>(INT64_MAX))
        co_return fail(ErrorKind::kNoSpace, "a file of {} bytes is too large", size);
    asked_size_ = size;
    // A process that dies from here on leaves the node with either size. A longer file that may grow fits in any case.
    const bool told = kept_ && !(grow_only && options_.growable);
    if (told) resizing(size);
    Result<> resized = co_await context_.graph->resize(node, static_cast<int64_t>(size), grow_only);
    asked_size_.reset();
    coming_size_ = kNoSize;
    if (resized || told) size_changed(node.size());
    co_return resized;
}

void FuseExport::on_resize(uint64_t new_size) {
    if (!service_ || stopping_) return;
    service_->touched();
    size_changed(new_size);
    // The kernel learns the size of what it asked for itself by the answer.
    if (asked_size_ == new_size) return;
    // At once, so that whoever is told that the size has changed finds it changed: attributes alone wait for no page.
    notify_changed(mount_->fd(), false);
    if (options_.cached) notices_.spawn(tell_kernel(true));
}

Result<> FuseExport::open_passthrough() {
    if (!options_.passthrough) return {};
    const json::value* saved = legacy_ ? legacy_->state.if_contains("passthrough") : nullptr;
    if (saved && saved->is_object()) {
        TRY(passthrough_, Passthrough::inherit(root(), mount_->fd(), saved->get_object()));
    } else {
        TRY(passthrough_, Passthrough::open(root(), mount_->fd(), agreed_));
    }
    service_->set_backing(passthrough_->id(), passthrough_->fd());
    return {};
}

Task<void> FuseExport::tell_kernel(bool pages) {
    co_await run_blocking([fd = mount_->fd(), pages] { notify_changed(fd, pages); });
}

json::object FuseExport::details() const {
    json::object details{
        {"mountpoint", options_.mountpoint}, {"writable", writable()}, {"growable", options_.growable}};
    if (!mount_ || !service_) return details;
    details["allow-other"] = mount_->allow_other();
    details["transport"] = rings_.empty() ? "classic" : "uring";
    details["transport-reason"] = transport_reason_;
    details["open-files"] = service_->open_files();
    details["passthrough"] = passthrough_ != nullptr;
    details["kept-for-restart"] = kept_ != nullptr;
    if (!kept_) details["kept-reason"] = kept_reason_;
    json::array queues;
    const auto add = [&queues](std::string_view kind, const Loop& loop, const QueueCounters& counters) {
        queues.push_back(json::object{{"transport", kind},
                                      {"loop", loop.name()},
                                      {"requests", counters.requests.load(std::memory_order_relaxed)},
                                      {"bytes-read", counters.bytes_read.load(std::memory_order_relaxed)},
                                      {"bytes-written", counters.bytes_written.load(std::memory_order_relaxed)}});
    };
    for (const auto& queue : queues_.all) add("classic", queue->loop(), queue->counters());
    for (const auto& ring : rings_) add("uring", ring->loop(), ring->counters());
    details["queues"] = std::move(queues);
    return details;
}

}  // namespace gantry::fuse
