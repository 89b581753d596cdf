// Virtqueue: serves one ring on one loop.

#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "exports/virtio/blk_request.h"
#include "exports/virtio/call.h"
#include "exports/virtio/ring.h"
#include "runtime/io.h"
#include "runtime/poller.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"

namespace gantry::virtio {

/// Read from the main loop at any time.
struct QueueCounters {
    std::atomic<uint64_t> requests{0}, bytes_read{0}, bytes_written{0}, kicks{0}, signals{0};
};

struct QueueStart {
    std::unique_ptr<Ring> ring;
    std::shared_ptr<const GuestMemory> memory;
    MemorySource* source = nullptr;
    UniqueFd kick;                  // an eventfd; none: the ring is looked at all the time
    std::shared_ptr<DirtyLog> log;  // what requests write is marked here; the ring's own is Ring::set_log
};

/// Lives longer than what it serves; made once for each queue of a device. Functions run on the queue's own loop unless
/// said otherwise; the owner calls one at a time.
class Virtqueue {
  public:
    /// `broken`: the ring makes no sense; called once for each start, on the queue's loop. `channel` is of `loop`.
    Virtqueue(Loop& loop, size_t index, const BlkService& service, block::Channel& channel,
              std::function<void(size_t index, const std::string& fault)> broken);
    ~Virtqueue();

    Loop& loop() const { return loop_; }  // any thread
    size_t index() const { return index_; }
    const QueueCounters& counters() const { return counters_; }  // any thread

    /// Begins to serve, as if it had been kicked. Not while it is started.
    Task<void> start(QueueStart start);
    /// Takes nothing more, waits until everything taken is answered and published. Nothing when it is not started.
    /// The answer is Ring::base().
    Task<uint32_t> stop();
    /// The same, but the ring stays, for changes of the memory.
    Task<void> pause();
    /// Ends pause(): memory and ring as before, or elsewhere.
    Task<void> resume();
    Task<void> resume_in(std::shared_ptr<const GuestMemory> memory, RingPlace place);
    /// Whether chains are taken (SET_VRING_ENABLE); false at first. Does not wait for those in flight.
    Task<void> enable(bool on);
    bool started() const { return ring_ != nullptr; }
    bool is_broken() const { return ring_ && ring_->is_broken(); }
    /// Whom to tell; null: nobody. May change at any time; a new one is told at once, lest a signal is lost.
    Task<void> set_call(std::unique_ptr<Call> call);
    /// Marks pages from now on: what was taken before is answered first. Null ends it.
    Task<void> set_log(std::shared_ptr<DirtyLog> log, bool ring, uint64_t ring_address);
    /// The ring is no longer served, for a reason from outside.
    Task<void> break_off(std::string fault);

  private:
    Loop& loop_;
    const size_t index_;
    const BlkService& service_;
    block::Channel& channel_;
    std::function<void(size_t, const std::string&)> broken_;
    QueueCounters counters_;
    std::unique_ptr<Ring> ring_;
};

}  // namespace gantry::virtio
