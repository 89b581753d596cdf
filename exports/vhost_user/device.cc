#include "exports/vhost_user/device.h"

#include <algorithm>

#include "runtime/log.h"

namespace gantry::vhost_user {

namespace {

/// A front end asks for as many queues as its guest has CPUs, and takes it as an error when there are fewer.
constexpr size_t kLeastQueueLimit = 64;

}  // namespace

Device::Device(std::string id, block::Root& root, std::vector<Loop*> loops, virtio::BlkShape shape)
    : id_(std::move(id)),
      root_(root),
      loops_(std::move(loops)),
      blk_(shape, root.node().size()),
      service_(blk_),
      queues_(std::max<size_t>(shape.queues, kLeastQueueLimit)) {}

Device::~Device() = default;

Task<Result<>> Device::flush() {
    block::Channel* channel = co_await root_.channel(main_loop_);
    co_return co_await channel->flush();
}

Task<virtio::Virtqueue*> Device::queue(size_t index) {
    CHECK(index < queues_.size(), "the index of a queue is checked where it comes in");
    Slot& slot = queues_[index];
    if (!slot.queue) {
        Loop& loop = *loops_[index % loops_.size()];
        block::Channel* channel = co_await root_.channel(loop);
        slot.queue = std::make_unique<virtio::Virtqueue>(
            loop, index, service_, *channel, [this](size_t i, const std::string& fault) { queue_broke(i, fault); });
    }
    co_return slot.queue.get();
}

void Device::begin(size_t index) {
    queues_[index].fault.clear();
    queues_[index].start.fetch_add(1, std::memory_order_relaxed);
}

/// On the queue's loop.
void Device::queue_broke(size_t index, const std::string& fault) {
    const uint64_t start = queues_[index].start.load(std::memory_order_relaxed);
    main_loop_.post([weak = std::weak_ptr(self_), index, fault, start] {
        const auto self = weak.lock();
        if (!self) return;
        Device& device = **self;
        Slot& slot = device.queues_[index];
        if (slot.start.load(std::memory_order_relaxed) != start || !slot.fault.empty()) return;
        slot.fault = fault;
        log::warn("export '{}': queue {} is not served any more: {}", device.id_, index, fault);
        if (device.on_fault) device.on_fault(index, fault);
    });
}

}  // namespace gantry::vhost_user
