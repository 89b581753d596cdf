#include "exports/vduse/export.h"

#include <algorithm>
#include <optional>

#include "block/repeated_cancel.h"
#include "exports/virtio/disk.h"
#include "exports/virtio/wait_report.h"
#include "runtime/check.h"
#include "runtime/log.h"
#include "schema/options.h"

namespace gantry::vduse {

using namespace std::chrono_literals;

const exports::ExportType kVduseExportType = {"vduse-blk", &VduseExport::create};

namespace {

constexpr uint64_t kMostQueues = 1024;
/// How often a device that is to be removed is looked at.
constexpr auto kAttachedPause = 200ms;
/// How often it is said that somebody must detach it.
constexpr auto kSayAgain = 60s;

Result<VduseOptions> parse(const exports::ExportContext& context) {
    const schema::Options options(context.options);
    VduseOptions out;
    out.name = options.str("name");
    virtio::BlkShape& shape = out.shape;
    const uint64_t queues = options.size("num-queues", shape.queues);
    if (queues == 0) return fail(ErrorKind::kInvalid, "num-queues must be greater than 0");
    if (queues > kMostQueues)
        return fail(ErrorKind::kInvalid, "num-queues must not be greater than {}, it is {}", kMostQueues, queues);
    shape.queues = static_cast<uint16_t>(queues);
    const uint64_t queue_size = options.size("queue-size", shape.queue_size);
    if (!virtio::is_queue_size(queue_size)) {
        return fail(ErrorKind::kInvalid, "queue-size is invalid; it must be a power of 2 from {} to {}, not {}",
                    virtio::kLeastQueueSize, virtio::kMaxQueueSize, queue_size);
    }
    shape.queue_size = static_cast<uint16_t>(queue_size);
    TRY(shape.block_size, virtio::check_block_size(context.id, options.size("logical-block-size", shape.block_size)));
    shape.serial = options.str("serial");
    if (shape.serial.size() > virtio::BlkDevice::kIdBytes) {
        log::warn("export '{}': drivers see the first {} bytes of the serial number '{}'", context.id,
                  virtio::BlkDevice::kIdBytes, shape.serial);
        shape.serial.resize(virtio::BlkDevice::kIdBytes);
    }
    CHECK_OK(Device::check_name(out.name));
    return out;
}

}  // namespace

Result<std::unique_ptr<exports::Export>> VduseExport::create(exports::ExportContext context) {
    return create_over(Kernel::running(), std::move(context));
}

Result<std::unique_ptr<exports::Export>> VduseExport::create_over(Kernel& kernel, exports::ExportContext context) {
    TRY(VduseOptions options, parse(context));
    return std::make_unique<VduseExport>(kernel, std::move(context), std::move(options));
}

VduseExport::VduseExport(Kernel& kernel, exports::ExportContext context, VduseOptions options)
    : Export(std::move(context)), kernel_(kernel), options_(std::move(options)) {}

VduseExport::~VduseExport() {
    CHECK(scope_.live() == 0 && workers_.live() == 0, "a VDUSE export is destroyed when its queues have ended");
}

std::string VduseExport::user() const { return fmt::format("export '{}': VDUSE device '{}'", id(), options_.name); }

/// The kernel lets no driver write to the configuration, since it might wait for ever.
uint64_t VduseExport::offered() const { return (blk_->features() & ~virtio::kBlkConfigWce) | virtio::kAccessPlatform; }

Task<Result<>> VduseExport::start() {
    blk_ = std::make_unique<virtio::BlkDevice>(
        virtio::complete(options_.shape, context_.options, writable(), root().node()), root().node().size());
    service_ = std::make_unique<virtio::BlkService>(*blk_);
    const virtio::BlkDevice::Config config = blk_->config();
    const DeviceShape described{.name = options_.name,
                                .features = offered(),
                                .queues = options_.shape.queues,
                                .queue_size = options_.shape.queue_size,
                                .config = config};
    CO_TRY(device_, Device::create(kernel_, described));
    record_ = std::make_unique<Record>(context_.keeper, id(), options_.shape.queues, options_.shape.queue_size);
    queues_ = std::make_unique<Queues>(*device_, *record_, *service_, root(), context_.loops, user());
    if (device_->taken_over()) {
        Result<> going = co_await go_on(described);
        if (!going) {
            if (queues_->running()) [[maybe_unused]]
                const Positions positions = co_await queues_->stop();
            co_await queues_->join();
            queues_.reset();
            device_->close();
            co_return going;
        }
    } else {
        // Of another device of this name, which is gone.
        record_->drop();
        begun_anew_ = true;
    }
    scope_.spawn(serve_messages());
    if (device_->taken_over()) {
        log::info("export '{}': VDUSE device '{}' taken over from a process before this one; {}", id(), options_.name,
                  queues_->running() ? "its driver goes on" : "no driver uses it");
    } else {
        log::info("export '{}': node '{}' as VDUSE device '{}'; 'vdpa dev add name {} mgmtdev vduse' attaches it", id(),
                  root().node().name(), options_.name, options_.name);
    }
    co_return Result<>();
}

/// A device that is attached: if a driver uses it, its requests are waiting. The driver learns of what is other than
/// before, such as the size, when nothing can be refused any more.
Task<Result<>> VduseExport::go_on(DeviceShape described) {
    // It reads again what it knows, and we learn whether there is one.
    CO_TRY(const bool told, device_->inject_config_irq());
    if (!told) co_return device_->describe(described);
    CO_TRY(const uint64_t features, device_->features());
    // Kernels that do not tell: no driver has chosen anything.
    if (features == 0) co_return device_->describe(described);
    Result<> chosen = blk_->check_features(features, virtio::kAccessPlatform);
    if (chosen && (features & virtio::kBlkConfigWce)) chosen = fail(ErrorKind::kInvalid, "it can set the write cache");
    if (!chosen) {
        co_return fail(ErrorKind::kBusy,
                       "failed to create vduse device; device '{}' is attached to the vDPA bus since before this "
                       "process, and its driver uses it as this export does not offer it: {}; 'vdpa dev del {}' "
                       "detaches it",
                       options_.name, chosen.error().message(), options_.name);
    }
    blk_->choose_features(features);
    Result<> started = co_await queues_->start(features, Begin::kTakeOver);
    if (!started) {
        co_return fail(started.error().kind(),
                       "failed to create vduse device; device '{}' is attached to the vDPA bus since before this "
                       "process, and cannot be taken over: {}; 'vdpa dev del {}' detaches it",
                       options_.name, started.error().message(), options_.name);
    }
    // The size may have changed meanwhile.
    const virtio::BlkDevice::Config now = blk_->config();
    described.config = now;
    CO_CHECK(device_->describe(described));
    [[maybe_unused]] const Result<bool> injected = device_->inject_config_irq();
    status_ = kDriverOk;
    co_return Result<>();
}

Task<bool> VduseExport::let_go() { co_return !device_->attached(); }

bool VduseExport::leaves() const {
    if (!context_.keeper || !device_->attached()) return false;
    switch (context_.keeper->leave()) {
        case exports::Keeper::Leave::kNothing:
            return false;
        case exports::Keeper::Leave::kInherited:
            return device_->taken_over();
        case exports::Keeper::Leave::kEverything:
            return true;
    }
    return false;
}

Task<void> VduseExport::stop() {
    std::optional<block::RepeatedCancel> cancel;
    if (busy_ || queues_->running()) {
        cancel.emplace([this] { block::Graph::cancel_in_flight(root().node()); });
    }
    virtio::WaitReport report([this](std::chrono::seconds passed) {
        log::warn("{}: its end has not been reached for {} s, because requests have not ended: {}", user(),
                  passed.count(), queues_->requests_left());
    });
    co_await end_messages();
    co_await workers_.join();
    if (queues_->running()) {
        positions_ = co_await queues_->stop();
    }
    co_await queues_->join();
    if (cancel) co_await cancel->over();
    co_await report.over();
    if (leaves()) {
        log::info("export '{}': VDUSE device '{}' waits for the process after this one", id(), options_.name);
        device_->close();
    } else {
        removing_ = true;
        co_await remove_device();
    }
    queues_.reset();
    record_.reset();
    device_.reset();
    service_.reset();
    blk_.reset();
}

/// While it is attached it cannot be destroyed: its driver is told that nothing works any more, until it is detached.
Task<void> VduseExport::remove_device() {
    auto say_at = Clock::now();
    for (;;) {
        if (!device_->attached()) {
            co_await end_messages();
            co_await stop_refusing();
            device_->close();
            const Result<> gone = device_->destroy();
            if (gone) {
                record_->drop();
                co_return;
            }
            if (gone.error().kind() != ErrorKind::kBusy) {
                log::warn("export '{}': {}", id(), gone.error().message());
                co_return;
            }
            if (const Result<> again = device_->reopen(); !again) {
                log::warn("export '{}': {}; it stays", id(), again.error().message());
                co_return;
            }
        }
        if (context_.ending && context_.ending()) {
            co_await end_messages();
            co_await stop_refusing();
            log::warn(
                "export '{}': VDUSE device '{}' is attached and stays, with nobody to serve it; an export of the "
                "same name takes it over, 'vdpa dev del {}' detaches it",
                id(), options_.name, options_.name);
            co_return;
        }
        if (Clock::now() >= say_at) {
            say_at = Clock::now() + kSayAgain;
            log::warn(
                "export '{}': VDUSE device '{}' is attached: what its driver asks for fails until 'vdpa dev del "
                "{}' detaches it, and then the export is gone",
                id(), options_.name, options_.name);
        }
        if (!broken_ && scope_.live() == 0) {
            if (!refusal_ && std::ranges::any_of(positions_, &std::optional<uint32_t>::has_value)) {
                refusal_ = std::make_unique<Refusal>(*device_, *service_);
                refusal_->start(blk_->chosen_features(), positions_, record_->file());
            }
            messages_end_ = false;
            scope_.spawn(serve_messages());
        }
        (void)co_await retry_.after(kAttachedPause);
    }
}

void VduseExport::on_resize(uint64_t new_size) {
    if (!device_ || removing_) return;
    blk_->set_size(new_size);
    const virtio::BlkDevice::Config config = blk_->config();
    Result<> told = device_->set_config(0, std::span(config).first(sizeof(uint64_t)));
    if (told) {
        // Without a driver there is nobody to tell: the next one reads what holds then.
        auto injected = device_->inject_config_irq();
        if (!injected) told = std::unexpected(std::move(injected).error());
    }
    if (!told) log::warn("export '{}': the driver does not learn of the new size: {}", id(), told.error().message());
}

json::object VduseExport::details() const {
    json::object details{{"name", options_.name},
                         {"writable", writable()},
                         {"logical-block-size", options_.shape.block_size},
                         {"num-queues", options_.shape.queues},
                         {"queue-size", options_.shape.queue_size},
                         {"serial", options_.shape.serial}};
    if (!device_ || !queues_) return details;
    details["attached"] = device_->attached();
    details["taken-over"] = device_->taken_over();
    details["running"] = queues_->running();
    details["features-offered"] = offered();
    details["features"] = blk_->chosen_features();
    details["kept-for-restart"] = record_->kept();
    if (!record_->why_not().empty()) details["kept-reason"] = record_->why_not();
    details["queues"] = queues_->details();
    return details;
}

}  // namespace gantry::vduse
