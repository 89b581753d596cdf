// The transport over /dev/fuse: each queue reads requests from a descriptor of its own and writes replies to it.

#pragma once

#include <memory>
#include <vector>

#include "fuse/queue.h"
#include "fuse/tactics.h"
#include "runtime/buffer.h"
#include "runtime/io.h"
#include "runtime/loop.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"

namespace gantry::fuse {

class ClassicQueue;

/// The queues of one export. All take from the kernel's one list of requests, so as few as are needed wait for it: the
/// first always does, each that has its hands full calls one more, and one that finds nothing to do leaves. Any loop.
class ClassicQueues {
  public:
    std::vector<std::unique_ptr<ClassicQueue>> all;  // complete before the first runs
    /// Until then every request wakes the first queue, not just one of those that wait: what a killed process waited
    /// with goes away some time after it, and a request that wakes that alone would not be seen. Set before they run.
    Clock::time_point crowded_until{};

    /// Lets one more queue wait for requests.
    void call_another();

  private:
    friend class ClassicQueue;
    uint64_t answered() const;
    Tactics tactics_;                   // of the first queue
    std::atomic<bool> paired_{false};   // the second queue stays although one would do
    std::atomic<bool> several_{false};  // another queue than the first had several requests at once
};

/// Own loop only, unless said otherwise.
class ClassicQueue {
  public:
    /// `fd`: non-blocking, the mount's own or a clone of it; stays the caller's.
    ClassicQueue(Loop& loop, int fd, size_t index, FileService& service, block::Channel& channel,
                 ClassicQueues& siblings);
    ~ClassicQueue();

    /// Answers requests until stop() or until there is no mount; every request that was read is answered then.
    Task<QueueEnd> run();
    /// Reads no more.
    Task<void> stop();
    Loop& loop() const { return loop_; }
    bool waits() const { return called_.load(std::memory_order_relaxed); }  // any loop: it is needed at present
    const QueueCounters& counters() const { return counters_; }

  private:
    friend class ClassicQueues;
    struct Slot;
    enum class Step : uint8_t { kTaken, kNothing, kEnd };

    Step step();
    bool accept(Slot& slot, size_t received);
    Task<void> answer_later(Slot* slot);
    void reply(Slot& slot);
    Task<void> wait_for_request();
    Task<void> wait_for_call();
    uint32_t note_pause();
    void note_lone();
    void note_several();
    bool worth_staying();
    Slot* take_slot();
    void give_back(Slot* slot);

    Loop& loop_;
    const int fd_;
    const size_t index_;
    FileService& service_;
    block::Channel& channel_;
    ClassicQueues& siblings_;
    QueueCounters counters_;
    LoneClient lone_;
    Follower follower_;
    TaskScope scope_;
    std::vector<std::unique_ptr<Slot>> slots_;
    std::vector<Slot*> free_;
    size_t out_ = 0;  // slots with a request that is not answered
    WaitQueue returned_;
    CancellableIo* polling_ = nullptr;
    bool stopping_ = false;
    bool large_ = false;  // the last request will take a while
    QueueEnd end_ = QueueEnd::kStopped;
    uint32_t in_a_row_ = 0;    // requests without a pause
    uint32_t load_ = 0;        // what they cost, counted in small ones
    uint32_t calls_made_ = 0;  // in this row
    uint32_t vain_ = 0;        // wake-ups in a row that found nothing
    uint32_t last_pid_ = 0;    // who sent the last one
    uint32_t lone_wakes_ = 0;  // wake-ups in a row that brought one request

    // Shared with siblings: whether this queue waits for requests.
    std::atomic<bool> called_;
    AsyncEvent call_;
};

}  // namespace gantry::fuse
