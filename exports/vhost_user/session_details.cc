// What operators see of a front end.

#include "exports/vhost_user/session.h"

namespace gantry::vhost_user {

json::object Session::details() const {
    json::object out{{"peer", peer()},
                     {"features", features()},
                     {"protocol-features", protocol_features_},
                     {"status", status()},
                     {"inflight-tracking", inflight_ != nullptr},
                     {"dirty-log", active_log() != nullptr}};
    uint64_t bytes = 0;
    for (const virtio::Region& region : regions()) bytes += region.size;
    out["memory-regions"] = regions().size();
    out["memory-bytes"] = bytes;
    json::array queues;
    for (size_t i = 0; i < rings_.size(); ++i) {
        const virtio::Virtqueue* queue = device_.made_queue(i);
        if (!queue) continue;
        const RingState& r = rings_[i];
        const virtio::QueueCounters& c = queue->counters();
        json::object one{{"index", i},
                         {"loop", queue->loop().name()},
                         {"running", r.running},
                         {"enabled", r.enabled},
                         {"size", r.size},
                         {"packed", shape(r).packed},
                         {"requests", c.requests.load(std::memory_order_relaxed)},
                         {"bytes-read", c.bytes_read.load(std::memory_order_relaxed)},
                         {"bytes-written", c.bytes_written.load(std::memory_order_relaxed)},
                         {"kicks", c.kicks.load(std::memory_order_relaxed)},
                         {"signals", c.signals.load(std::memory_order_relaxed)}};
        if (!device_.fault(i).empty()) one["broken"] = device_.fault(i);
        queues.push_back(std::move(one));
    }
    out["queues"] = std::move(queues);
    return out;
}

}  // namespace gantry::vhost_user
