// FileWriteQueue: buffered writes to a file that is slow at the moment.

#pragma once

#include <coroutine>
#include <cstdint>
#include <mutex>

#include "runtime/blocking_pool.h"
#include "runtime/iovec.h"
#include "runtime/loop.h"

namespace gantry::block {

/// File systems let one buffered write per file run at a time, so one pool thread does them all, in order, and takes
/// the next one without a wake-up; more threads would only wait for each other and keep others from the pool. Any loop.
class FileWriteQueue {
  public:
    FileWriteQueue() = default;
    FileWriteQueue(const FileWriteQueue&) = delete;

    struct [[nodiscard]] Awaiter : PostItem {
        Awaiter(FileWriteQueue& q, int fd, IoVec iov, uint64_t offset) : queue(q), fd(fd), iov(iov), offset(offset) {}
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> h);
        /// 0 or -errno; everything was written or an error.
        int await_resume() const noexcept { return result; }

        FileWriteQueue& queue;
        int fd;
        IoVec iov;
        uint64_t offset;
        std::coroutine_handle<> waiter;
        Loop* loop = nullptr;
        Awaiter* after = nullptr;
        int result = 0;
        int64_t took_ns = 0;   // the system calls alone
        bool blocked = false;  // they slept
    };
    Awaiter write(int fd, IoVec iov, uint64_t offset) { return Awaiter(*this, fd, iov, offset); }

  private:
    struct Worker : PoolItem {
        FileWriteQueue* queue = nullptr;
    };
    void work();

    std::mutex mutex_;  // a leaf lock
    Awaiter* head_ = nullptr;
    Awaiter* tail_ = nullptr;
    bool working_ = false;
    Worker worker_;
};

/// How often the calling thread has given up its processor to wait for something (not: was made to).
int64_t voluntary_switches();

/// pwritev2 until everything is written. 0 or -errno; blocks.
int write_all(int fd, IoVec iov, uint64_t offset, int flags);
/// preadv until everything is read; what lies beyond the end of the file is zero. 0 or -errno; blocks.
int read_all(int fd, IoVec iov, uint64_t offset);

}  // namespace gantry::block
