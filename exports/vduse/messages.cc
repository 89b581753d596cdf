// VduseExport: what the kernel asks, and how it is answered in time.

#include <poll.h>

#include <optional>

#include "block/repeated_cancel.h"
#include "exports/vduse/export.h"
#include "runtime/log.h"

namespace gantry::vduse {

Task<void> VduseExport::serve_messages() {
    while (!messages_end_) {
        CancellableIo poll(io_poll(device_->fd(), POLLIN));
        polling_ = &poll;
        const int events = co_await poll;
        polling_ = nullptr;
        if (messages_end_) break;
        if (events == -EINTR) continue;
        if (events < 0 || !(events & POLLIN)) {
            broken_ = true;
            log::error(
                "{} was given up by the kernel, which waited too long for an answer or lost it; what its driver "
                "asks for fails, and only 'vdpa dev del {}' helps",
                user(), options_.name);
            if (!removing_ && context_.ended) context_.ended();
            break;
        }
        auto message = device_->next_message();
        if (!message) {
            log::error("export '{}': {}", id(), message.error().message());
            broken_ = true;
            if (!removing_ && context_.ended) context_.ended();
            break;
        }
        if (*message) co_await handle(**message);
    }
}

Task<void> VduseExport::end_messages() {
    messages_end_ = true;
    if (polling_) polling_->cancel();
    co_await scope_.join();
}

Task<void> VduseExport::handle(vduse_dev_request message) {
    arrived_ = Clock::now();
    vduse_dev_response response{};
    response.request_id = message.request_id;
    bool done = false;
    switch (message.type) {
        case VDUSE_SET_STATUS:
            done = co_await set_status(message.s.status);
            break;
        case VDUSE_GET_VQ_STATE:
            done = co_await queue_state(message.vq_state.index, &response);
            break;
        case VDUSE_UPDATE_IOTLB:
            done = co_await update_memory();
            break;
        default:
            log::warn("{}: the kernel sends a message of type {}, which this version does not know", user(),
                      message.type);
            break;
    }
    response.result = done ? VDUSE_REQ_RESULT_OK : VDUSE_REQ_RESULT_FAILED;
    if (const Result<> answered = device_->answer(response); !answered) {
        log::error("export '{}': {}", id(), answered.error().message());
    }
}

/// What the driver has chosen, if it may.
Result<uint64_t> VduseExport::chosen_features() const {
    TRY(const uint64_t features, device_->features());
    CHECK_OK(blk_->check_features(features, virtio::kAccessPlatform));
    if (features & virtio::kBlkConfigWce) return fail(ErrorKind::kInvalid, "the driver sets the write cache");
    return features;
}

Task<bool> VduseExport::set_status(uint8_t status) {
    const uint8_t added = status & ~status_;
    if (status == 0 || ((status_ & kDriverOk) && !(status & kDriverOk))) {
        const bool quiet = co_await reset();
        if (quiet) status_ = status;
        co_return quiet;
    }
    if (added & kFeaturesOk) {
        if (auto features = chosen_features(); !features) {
            log::warn("export '{}': {}", id(), features.error().message());
            co_return false;
        }
    }
    if (added & kDriverOk) {
        const bool running = co_await driver_ok();
        if (!running) co_return false;
    }
    status_ = status;
    co_return true;
}

Task<bool> VduseExport::driver_ok() {
    if (removing_) co_return false;
    if (queues_->running() && !busy_) co_return true;
    if (busy_) {
        // Of the reset before: its requests may not end in the memory of this driver.
        const bool over = co_await finished_in_time(true);
        if (!over) {
            log::error("{}: requests of before the reset have not ended, so it does not begin again yet: {}", user(),
                       queues_->requests_left());
            co_return false;
        }
    }
    begin(start_queues(begun_anew_ ? Begin::kFresh : Begin::kAgain));
    const bool over = co_await finished_in_time(false);
    if (over && !outcome_) log::error("export '{}': {}", id(), outcome_.error().message());
    co_return over&& outcome_.has_value();
}

Task<bool> VduseExport::reset() {
    co_await stop_refusing();
    positions_.clear();
    bool over = true;
    if (busy_) over = co_await finished_in_time(true);
    if (over) {
        begin(stop_queues());
        over = co_await finished_in_time(true);
    }
    if (!over) {
        log::error("{}: a reset fails, because requests do not end: {}", user(), queues_->requests_left());
        co_return false;
    }
    blk_->choose_features(0);
    record_->forget();
    begun_anew_ = true;
    co_return true;
}

Task<bool> VduseExport::queue_state(uint32_t index, vduse_dev_response* response) {
    bool over = true;
    if (busy_) over = co_await finished_in_time(false);
    const bool refusing = refusal_ != nullptr;
    if (refusing) {
        positions_ = co_await refusal_->stop();
        refusal_->start(blk_->chosen_features(), positions_, record_->file());
    }
    if (over) {
        begin(find_position(index));
        over = co_await finished_in_time(false);
    }
    if (!over || !outcome_) {
        log::warn("{}: where queue {} is cannot be said: {}", user(), index,
                  over ? outcome_.error().message() : "requests do not end: " + queues_->requests_left());
        co_return false;
    }
    if (refusing && index < positions_.size()) position_ = positions_[index].value_or(position_);
    response->vq_state.index = index;
    if (blk_->chosen_features() & virtio::kRingPacked) {
        response->vq_state.packed = packed_state(position_);
    } else {
        response->vq_state.split.avail_index = static_cast<uint16_t>(position_);
    }
    co_return true;
}

Task<bool> VduseExport::update_memory() {
    if (refusal_) {
        // They begin again when they are found in the new memory.
        positions_ = co_await refusal_->stop();
        refusal_->start(blk_->chosen_features(), positions_, record_->file());
        co_return true;
    }
    bool over = true;
    if (busy_) over = co_await finished_in_time(false);
    if (over) {
        begin(queues_->remap());
        over = co_await finished_in_time(false);
    }
    if (!over) {
        log::error("{}: the driver's memory has changed, and requests in the old one do not end: {}", user(),
                   queues_->requests_left());
    }
    co_return over;
}

Task<void> VduseExport::stop_refusing() {
    if (!refusal_) co_return;
    auto refusal = std::move(refusal_);
    positions_ = co_await refusal->stop();
}

void VduseExport::begin(Task<void> work) {
    busy_ = true;
    outcome_ = {};
    workers_.spawn(in_background(std::move(work)));
}

Task<void> VduseExport::in_background(Task<void> work) {
    co_await std::move(work);
    busy_ = false;
    patience_.cancel();
}

Task<void> VduseExport::start_queues(Begin how) {
    auto features = chosen_features();
    if (!features) {
        outcome_ = std::unexpected(std::move(features).error());
        co_return;
    }
    blk_->choose_features(*features);
    outcome_ = co_await queues_->start(*features, how);
}

Task<void> VduseExport::stop_queues() { [[maybe_unused]] const Positions positions = co_await queues_->stop(); }

Task<void> VduseExport::find_position(uint32_t index) {
    auto position = co_await queues_->position(index);
    if (position) {
        position_ = *position;
    } else {
        outcome_ = std::unexpected(std::move(position).error());
    }
}

/// Whether what begin() was given is done before the kernel loses its patience with the message that arrived last.
Task<bool> VduseExport::finished_in_time(bool cancel) {
    if (!busy_) co_return true;
    const std::chrono::nanoseconds patience = kernel_.patience(options_.name);
    const auto begun = arrived_;
    const auto deadline = patience.count() == 0 ? Clock::time_point::max() : begun + patience * 3 / 4;
    auto cancel_at = patience.count() == 0 ? begun + std::chrono::seconds(5) : begun + patience / 4;
    if (!cancel) cancel_at = Clock::time_point::max();
    std::optional<block::RepeatedCancel> cancelling;
    while (busy_) {
        (void)co_await patience_.until(std::min(deadline, cancel_at));
        if (!busy_ || Clock::now() >= deadline) break;
        if (Clock::now() < cancel_at) continue;
        cancel_at = Clock::time_point::max();
        log::warn("{}: its requests are cancelled, because the driver waits for a reset: {}", user(),
                  queues_->requests_left());
        cancelling.emplace([this] { block::Graph::cancel_in_flight(root().node()); });
    }
    if (cancelling) co_await cancelling->over();
    co_return !busy_;
}

}  // namespace gantry::vduse
