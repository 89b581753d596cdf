// What the queues of an export have in common, whichever way requests come: a queue is the part of them that one loop
// answers.

#pragma once

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

/// Watches whether requests come one by one, each only after the one before was answered, and then keeps the loop's
/// thread on the CPU of whoever sends them: waking another CPU up twice costs several times what such a request does.
/// Own loop only.
class LoneClient {
  public:
    explicit LoneClient(Loop& loop) : loop_(loop) {}
    ~LoneClient() { several(); }
    LoneClient(const LoneClient&) = delete;

    /// A request of the thread `pid` was answered, and none was waiting behind it.
    void one(uint32_t pid);
    /// There was more to do at once.
    void several();
    /// To be asked for each request. Of one that was there at once while its CPU is followed: whether this thread had
    /// to let somebody else run since the request before, who may well have been the client.
    bool came_meanwhile();
    /// Several in a row came one by one.
    bool likely() const { return streak_ >= kFew; }

  private:
    static constexpr uint32_t kFew = 16;
    void look(uint32_t pid);

    Loop& loop_;
    bool following_ = false;
    uint32_t streak_ = 0;
    uint32_t next_look_ = 64;
    uint32_t patience_ = 64;  // requests before the next attempt; grows when it did not last
    uint64_t turns_at_look_ = 0;
    int64_t preemptions_ = 0;
};

}  // namespace gantry::fuse
