// What operators see of a front end.

#include "exports/vhost_user/session.h"
#include "exports/virtio/disk.h"
#include "runtime/log.h"

namespace gantry::vhost_user {

json::object Session::details() const {
    json::object out{{"peer", peer()},
                     {"features", features()},
                     {"protocol-features", protocol_features_},
                     {"status", status()},
                     {"inflight-tracking", inflight_ != nullptr},
                     {"dirty-log", active_log() != nullptr}};
    if (!handling_.empty()) out["waits-for-answer-to"] = handling_;
    uint64_t bytes = 0;
    for (const virtio::Region& region : regions()) bytes += region.size;
    out["memory-regions"] = regions().size();
    out["memory-bytes"] = bytes;
    json::array queues;
    for (size_t i = 0; i < rings_.size(); ++i) {
        const virtio::Virtqueue* queue = device_.made_queue(i);
        if (!queue) continue;
        const RingState& r = rings_[i];
        queues.push_back(virtio::details_of(*queue, shape(r), r.running, r.enabled, device_.fault(i)));
    }
    out["queues"] = std::move(queues);
    return out;
}

/// Stuck requests keep the front end waiting: an operator has to see which.
void Session::report_wait(std::chrono::seconds passed) const {
    std::vector<const virtio::Virtqueue*> queues;
    for (size_t i = 0; i < rings_.size(); ++i) queues.push_back(device_.made_queue(i));
    log::warn("export '{}': {} has not been {} for {} s, because requests have not ended: {}", device_.id(),
              ended_ ? "the end of front end " + peer() : fmt::format("{} of front end {}", handling_, peer()),
              ended_ ? "reached" : "answered", passed.count(), virtio::requests_left(queues));
}

}  // namespace gantry::vhost_user
