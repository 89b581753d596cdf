// What the queues of an export have in common, whichever way requests come: a queue is the part of them that one loop
// answers.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "block/root.h"
#include "fuse/call.h"
#include "fuse/service.h"
#include "runtime/loop.h"

namespace gantry::fuse {

/// How a queue ended.
enum class QueueEnd : uint8_t {
    kStopped,    // as asked
    kUnmounted,  // the kernel has no such mount any more, or somebody has aborted the connection
    kBroken,     // what came was no request; logged
};

/// Counts of one queue: written by its loop alone, read by anybody.
struct QueueCounters {
    std::atomic<uint64_t> requests{0}, bytes_read{0}, bytes_written{0};

    void count(const Call& call) {
        bump(requests, 1);
        if (call.opcode() == Opcode::kRead && call.error == 0) bump(bytes_read, call.reply_size);
        if (call.opcode() == Opcode::kWrite && call.error == 0) bump(bytes_written, call.data_size);
    }

  private:
    static void bump(std::atomic<uint64_t>& counter, uint64_t by) {
        counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
    }
};

/// Watches whether requests come one by one, each only after the one before was answered. Own loop only.
class LoneClient {
  public:
    /// A request was answered, and none was waiting behind it.
    void one() { score_ = std::min(score_ + 1, kMost); }
    /// There was more to do at once. Once in a while that happens with one client, too, while it moves between CPUs.
    void several() { score_ -= std::min(score_, kDoubt); }
    /// Most came one by one.
    bool likely() const { return score_ >= kFew; }
    bool sure() const { return score_ >= kMany; }
    /// To be asked for each request. Of one that was there at once: whether this thread had to let somebody else run
    /// since the request before, who may well have been the client, woken by the reply.
    bool came_meanwhile();

  private:
    static constexpr uint32_t kFew = 16, kMany = 64, kMost = 128, kDoubt = 32;
    uint32_t score_ = 0;
    int64_t preemptions_ = 0;
};

/// Keeps a loop on the CPU of its lone client. Own loop only.
class Follower {
  public:
    explicit Follower(Loop& loop) : loop_(loop) {}
    ~Follower() { stop(); }
    Follower(const Follower&) = delete;
    /// For each request of the client's thread `pid`: looks where it runs, now and then. False: it cannot be followed,
    /// or the loop has others to serve.
    bool follow(uint32_t pid);
    void stop();

  private:
    Loop& loop_;
    bool active_ = false;
    uint32_t since_look_ = 0;
    uint64_t turns_at_look_ = 0;
};

}  // namespace gantry::fuse
