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
    std::atomic<uint64_t> in_flight{0};  // taken and not published
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
    struct Slot;
    /// What the loop looks at while the driver need not kick.
    class Look final : public Poller {
      public:
        explicit Look(Virtqueue& queue) : queue_(queue) {}
        bool poll() override;
        bool before_sleep() override;
        void after_sleep() override {}

      private:
        Virtqueue& queue_;
    };
    struct Idle {
        Virtqueue& queue;
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> h) { queue.waiting_ = h; }
        void await_resume() const noexcept {}
    };

    Task<void> run();
    Task<void> watch_kicks();
    Task<void> answer_later(Slot* slot);
    Slot* take();
    bool serve();
    bool may_take() const;
    Task<void> wake_when_resumed();
    void forget();
    void count(const BlkRequest& request);
    void set_in_flight(size_t count);
    void publish();
    void check_memory();
    void mark_written(const BlkRequest& request);
    void wake();
    void report_fault();
    Task<void> settle();
    Slot* take_slot();

    Loop& loop_;
    const size_t index_;
    const BlkService& service_;
    block::Channel& channel_;
    std::function<void(size_t, const std::string&)> broken_;
    QueueCounters counters_;
    Look look_{*this};

    // Of one start:
    std::unique_ptr<Ring> ring_;
    AddressSpace space_;
    UniqueFd kick_;
    std::shared_ptr<DirtyLog> log_;
    bool stopping_ = false;
    bool listening_ = false;  // the driver will kick
    bool fault_reported_ = false;
    bool resuming_ = false;  // wake_when_resumed() runs
    TaskScope scope_;
    std::coroutine_handle<> waiting_;  // run(), with nothing to do
    CancellableIo* polling_ = nullptr;
    WaitQueue settled_;

    bool enabled_ = false;
    uint32_t paused_ = 0;
    std::unique_ptr<Call> call_;
    std::vector<std::unique_ptr<Slot>> slots_;
    std::vector<Slot*> free_;
    std::vector<Slot*> finished_;  // not published yet
    std::vector<Used> used_;
    size_t in_flight_ = 0;   // taken and not published
    bool answered_ = false;  // since it last waited
};

}  // namespace gantry::virtio
