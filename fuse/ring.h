// The transport over io_uring: the kernel keeps a queue of requests for each CPU; entries of a ring fetch them and
// bring the answers back, both by the loop's one system call a turn. spec/fuse.md section 5.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "fuse/queue.h"
#include "runtime/task_scope.h"

namespace gantry::fuse {

/// How many queues the kernel has: one for each CPU there could ever be.
Result<unsigned> possible_cpus();

struct RingShape {
    unsigned entries = 0;    // of each queue
    uint32_t max_write = 0;  // bytes of an entry's payload
};
/// Memory grows with queues times entries times payload: many CPUs get smaller ones.
RingShape ring_shape(unsigned queues);

/// Empty: the kernel module offers requests over io_uring to mounts made now; else why not.
std::string ring_offered();

/// The queues of some CPUs, answered by one loop. Own loop only, unless said otherwise. Where a queue cannot be
/// registered the kernel goes on by /dev/fuse for all of them, so that is served besides.
class RingQueue {
  public:
    /// `fd` is the mount's own; stays the caller's.
    RingQueue(Loop& loop, int fd, std::vector<uint16_t> cpus, RingShape shape, FileService& service,
              block::Channel& channel);
    ~RingQueue();

    /// Registers all entries, and answers until the connection is aborted or unmounted.
    Task<void> run();
    /// Requests that come from now on are answered ENOTCONN; returns when those before are answered.
    Task<void> stop();
    Loop& loop() const { return loop_; }
    const QueueCounters& counters() const { return counters_; }
    /// errno of the first entry that was refused; 0: all are registered. Any loop.
    int refused() const { return refused_.load(std::memory_order_relaxed); }

  private:
    struct Entry;
    Task<void> serve(Entry* entry);
    Task<void> answer(Entry* entry);

    Loop& loop_;
    const int fd_;
    FileService& service_;
    block::Channel& channel_;
    QueueCounters counters_;
    LoneClient lone_;
    Follower follower_;
    std::vector<std::unique_ptr<Entry>> entries_;
    TaskScope scope_;
    uint32_t max_write_;
    size_t busy_ = 0;
    WaitQueue idle_;
    uint64_t last_turn_ = 0;
    bool stopping_ = false;
    std::atomic<int> refused_{0};
};

}  // namespace gantry::fuse
