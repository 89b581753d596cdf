// What exports of virtio-blk devices have in common: options, and what operators see.

#pragma once

#include <span>
#include <string>

#include "block/node.h"
#include "exports/virtio/blk_device.h"
#include "exports/virtio/ring.h"
#include "exports/virtio/virtqueue.h"
#include "schema/value.h"

namespace gantry::virtio {

/// So that a request has a place for data besides header and status.
inline constexpr uint64_t kLeastQueueSize = 4;
/// Whether rings of an export may have so many descriptors.
bool is_queue_size(uint64_t value);
/// The option logical-block-size of export `id`, in bytes. kInvalid in the words of the reference.
Result<uint32_t> check_block_size(const std::string& id, uint64_t value);

/// `shape` with what the options of every export and the limits of its node say. Main loop.
BlkShape complete(BlkShape shape, const json::object& options, bool writable, const block::Node& node);

/// Which of `queues` have requests that are not answered, and how many: "2 of queue 0, 1 of queue 3". Null: a queue
/// that was never used. Main loop.
std::string requests_left(std::span<const Virtqueue* const> queues);

/// As of the schema's VirtqueueInfo. `fault`: why it is not served; empty: it is. Main loop.
json::object details_of(const Virtqueue& queue, const RingShape& ring, bool running, bool enabled,
                        const std::string& fault);

}  // namespace gantry::virtio
