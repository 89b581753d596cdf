// Device: what a front end comes to: the virtio-blk device of a node and its queues. Outlives front ends.

#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "block/root.h"
#include "exports/virtio/blk_device.h"
#include "exports/virtio/blk_request.h"
#include "exports/virtio/virtqueue.h"

namespace gantry::vhost_user {

/// Main loop only.
class Device {
  public:
    /// Queue i is served on loop i % loops.size().
    Device(std::string id, block::Root& root, std::vector<Loop*> loops, virtio::BlkShape shape);
    ~Device();

    const std::string& id() const { return id_; }
    virtio::BlkDevice& blk() { return blk_; }
    const virtio::BlkDevice& blk() const { return blk_; }
    /// Queues that a front end may use, whatever the configuration says: front ends want one for each of their CPUs.
    size_t queue_limit() const { return queues_.size(); }

    /// What was answered is stable afterwards.
    Task<Result<>> flush();
    /// Made on first use.
    Task<virtio::Virtqueue*> queue(size_t index);
    /// Null when nobody has used it.
    virtio::Virtqueue* made_queue(size_t index) const { return queues_[index].queue.get(); }

    /// Queue `index` is about to be started: faults of it from now on are of this start.
    void begin(size_t index);
    /// Why it is not served any more; empty: it is, or it is stopped.
    const std::string& fault(size_t index) const { return queues_[index].fault; }
    /// Who is told of a fault; null: nobody.
    std::function<void(size_t index, const std::string& fault)> on_fault;

  private:
    struct Slot {
        std::unique_ptr<virtio::Virtqueue> queue;
        std::string fault;
        std::atomic<uint64_t> start{0};  // read by the queue's loop
    };
    void queue_broke(size_t index, const std::string& fault);

    const std::string id_;
    block::Root& root_;
    const std::vector<Loop*> loops_;
    virtio::BlkDevice blk_;
    virtio::BlkService service_;
    std::vector<Slot> queues_;
    /// Messages of the queues find nobody when this is gone.
    std::shared_ptr<Device*> self_ = std::make_shared<Device*>(this);
    Loop& main_loop_ = Loop::current();
};

}  // namespace gantry::vhost_user
