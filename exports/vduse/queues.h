// Queues: the virtqueues of a VDUSE device, from DRIVER_OK to reset.

#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "block/root.h"
#include "exports/vduse/device.h"
#include "exports/vduse/iotlb.h"
#include "exports/vduse/record.h"
#include "exports/virtio/blk_request.h"
#include "exports/virtio/virtqueue.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::vduse {

/// How rings begin.
enum class Begin : uint8_t {
    kFresh,     // where the driver says
    kAgain,     // where the driver says, unless a process before this one has begun and was killed before its answer
    kTakeOver,  // in use since before this process: where the record says, or, without one, where nothing is in flight
};

/// A ring as it is found in the driver's memory.
struct FoundRing {
    virtio::RingShape shape;
    virtio::RingPlace place;
    uint32_t base = 0;
};

/// Finds the ring of a ready queue; null: this queue is not ready.
Result<std::unique_ptr<FoundRing>> find_ring(const Device& device, Iotlb& iotlb, uint32_t index, uint64_t features,
                                             uint32_t most);

/// Where each queue ended that ran, in the form of Ring::base().
using Positions = std::vector<std::optional<uint32_t>>;

/// Main loop only; functions wait as long as requests take, one at a time. Each queue is served on a loop of its own
/// choice: queue i on the loop i modulo their number.
class Queues {
  public:
    Queues(Device& device, Record& record, const virtio::BlkService& service, block::Root& root,
           std::vector<Loop*> loops, std::string user);
    ~Queues();

    /// Starts what is ready. On failure nothing runs.
    Task<Result<>> start(uint64_t features, Begin begin);
    /// Ends what runs when everything taken is answered; forgets the driver's memory.
    Task<Positions> stop();
    bool running() const { return running_; }
    /// Where a process after this one would go on with a queue, in the form of Ring::base().
    Task<Result<uint32_t>> position(uint32_t index);
    /// The driver's memory has changed: finds everything again. A ring that is not there any more is broken.
    Task<void> remap();
    /// No coroutine of it is left.
    Task<void> join();

    /// As virtio::requests_left.
    std::string requests_left() const;
    /// Those that were ever used; as of the schema.
    json::array details() const;

  private:
    class Interrupt;
    struct Owed;
    struct Queue {
        std::unique_ptr<virtio::Virtqueue> queue;
        virtio::RingShape shape;
        bool started = false;
        std::string fault;
    };
    Result<> inherit(bool packed);
    Task<Result<>> start_one(uint32_t index, Begin begin, std::optional<uint32_t> base);
    Result<bool> find_place(uint32_t index, Begin begin, FoundRing& ring) const;
    Task<uint32_t> stop_one(uint32_t index);
    Task<Result<>> make_queue(uint32_t index);
    Task<void> deliver_owed();

    Device& device_;
    Record& record_;
    const virtio::BlkService& service_;
    block::Root& root_;
    const std::vector<Loop*> loops_;
    const std::string user_;
    const size_t queue_count_;
    Iotlb iotlb_;
    std::vector<Queue> queues_;
    std::shared_ptr<virtio::InflightFile> file_;
    uint64_t features_ = 0;
    bool running_ = false;
    std::shared_ptr<Owed> owed_;
    bool delivering_ = false;
    Timer pause_;
    TaskScope scope_;
};

}  // namespace gantry::vduse
