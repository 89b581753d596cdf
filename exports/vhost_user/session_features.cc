// Features, protocol features, status and reset.

#include "exports/vhost_user/session.h"

namespace gantry::vhost_user {

namespace {

// VIRTIO 1.2, section 2.1 "Device Status Field".
constexpr uint8_t kFeaturesOk = 8, kNeedsReset = 64;

}  // namespace

Task<Result<>> Session::set_features(uint64_t chosen) {
    const uint64_t of_device = chosen & ~(kLogAll | kHasProtocolFeatures);
    virtio::BlkDevice& blk = device_.blk();
    Result<> fits = blk.check_features(of_device);
    // A running ring has its shape by them: only the log of written pages may be switched.
    if (fits && any_running() &&
        (of_device != features() || has_protocol_features_ != !!(chosen & kHasProtocolFeatures))) {
        fits =
            fail(ErrorKind::kBusy, "features cannot change from {:#x} to {:#x} while rings run", features(), of_device);
    }
    if (!fits) {
        features_refused_ = true;
        co_return fits;
    }
    features_refused_ = false;
    features_chosen_ = true;
    has_protocol_features_ = chosen & kHasProtocolFeatures;
    blk.choose_features(of_device);
    recall_write_cache();
    if (log_all_ != !!(chosen & kLogAll)) {
        log_all_ = !log_all_;
        co_await apply_log_to_all();
    }
    for (size_t i = 0; i < rings_.size(); ++i) {
        if (!has_protocol_features_) rings_[i].enabled = true;
        CO_CHECK(co_await start_if_ready(i));
    }
    co_return Result<>();
}

Result<> Session::set_protocol_features(uint64_t chosen) {
    if (const uint64_t strange = chosen & ~kProtocolFeatures) {
        return fail(ErrorKind::kInvalid, "protocol features {:#x} were not offered", strange);
    }
    protocol_features_ = chosen;
    return {};
}

Task<Result<>> Session::set_status(uint64_t status) {
    if (status > 0xff) co_return fail(ErrorKind::kInvalid, "{:#x} is no device status", status);
    status_ = static_cast<uint8_t>(status) & ~kNeedsReset;
    if (status_ == 0) co_await reset();
    co_return Result<>();
}

uint64_t Session::status() const {
    uint8_t status = status_;
    if (features_refused_) status &= ~kFeaturesOk;
    for (size_t i = 0; i < rings_.size(); ++i) {
        if (rings_[i].running && !device_.fault(i).empty()) status |= kNeedsReset;
    }
    return status;
}

/// The driver begins anew; memory, descriptors for calls and what was agreed on the protocol stay.
Task<void> Session::reset() {
    co_await stop_all();
    for (RingState& ring : rings_) {
        // qemu before 8.1 stops a device by SET_STATUS 0, and asks for the bases afterwards.
        ring.ended_at = ring.ended_at.value_or(ring.base);
        ring.size = ring.base = 0;
        ring.address.reset();
        ring.started = false;
        ring.enabled = !has_protocol_features_ && features_chosen_;
        ring.kick.reset();
    }
    status_ = 0;
    features_refused_ = false;
}

/// The write cache is as at first; a front end that does not choose features again goes on with those it has.
void Session::forget_config() {
    const uint64_t chosen = features();
    device_.blk().choose_features(0);
    device_.blk().choose_features(chosen);
    config_written_ = false;
    note_write_cache();
}

}  // namespace gantry::vhost_user
