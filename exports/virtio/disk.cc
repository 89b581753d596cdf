#include "exports/virtio/disk.h"

#include <algorithm>
#include <bit>

#include "schema/options.h"

namespace gantry::virtio {

namespace {

constexpr uint64_t kLeastBlock = 512, kMostBlock = 65536;

}  // namespace

bool is_queue_size(uint64_t value) {
    return value >= kLeastQueueSize && value <= kMaxQueueSize && std::has_single_bit(value);
}

Result<uint32_t> check_block_size(const std::string& id, uint64_t value) {
    if (value < kLeastBlock || value > kMostBlock) {
        return fail(ErrorKind::kInvalid,
                    "Property {}.logical-block-size doesn't take value {} (minimum: {}, maximum: {})", id, value,
                    kLeastBlock, kMostBlock);
    }
    if (!std::has_single_bit(value)) {
        return fail(ErrorKind::kInvalid,
                    "Property {}.logical-block-size doesn't take value '{}', it's not a power of 2", id, value);
    }
    return static_cast<uint32_t>(value);
}

BlkShape complete(BlkShape shape, const json::object& options, bool writable, const block::Node& node) {
    const block::Limits& limits = node.limits();
    shape.writable = writable;
    shape.write_cache = !schema::Options(options).flag("writethrough");
    shape.physical_block_size = std::max(limits.request_alignment, shape.block_size);
    shape.optimal_io_size = limits.optimal_transfer;
    return shape;
}

std::string requests_left(std::span<const Virtqueue* const> queues) {
    std::string text;
    for (const Virtqueue* queue : queues) {
        const uint64_t count = queue ? queue->counters().in_flight.load(std::memory_order_relaxed) : 0;
        if (count != 0) text += fmt::format("{}{} of queue {}", text.empty() ? "" : ", ", count, queue->index());
    }
    return text.empty() ? "none is left" : text;
}

json::object details_of(const Virtqueue& queue, const RingShape& ring, bool running, bool enabled,
                        const std::string& fault) {
    const QueueCounters& c = queue.counters();
    const auto read = [](const std::atomic<uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
    json::object out{{"index", queue.index()},
                     {"loop", queue.loop().name()},
                     {"running", running},
                     {"enabled", enabled},
                     {"size", ring.size},
                     {"packed", ring.packed},
                     {"in-flight", read(c.in_flight)},
                     {"requests", read(c.requests)},
                     {"bytes-read", read(c.bytes_read)},
                     {"bytes-written", read(c.bytes_written)},
                     {"kicks", read(c.kicks)},
                     {"signals", read(c.signals)}};
    if (!fault.empty()) out["broken"] = fault;
    return out;
}

}  // namespace gantry::virtio
