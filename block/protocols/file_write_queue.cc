#include "block/protocols/file_write_queue.h"

#include <limits.h>
#include <sys/resource.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>

namespace gantry::block {

namespace {

/// Calls `step(slice, done)` for what is left until it is complete, fails or answers 0; the bytes moved, or -errno.
template <class Step>
int64_t move_all(IoVec iov, Step step) {
    size_t done = 0;
    while (done < iov.bytes) {
        const IoVecSlice rest(iov, done, iov.bytes - done);
        const ssize_t n = step(rest.view(), done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -errno;
        if (n == 0) break;
        done += static_cast<size_t>(n);
    }
    return static_cast<int64_t>(done);
}

int count_of(const IoVec& iov) { return static_cast<int>(std::min<uint32_t>(iov.count, IOV_MAX)); }

}  // namespace

int64_t voluntary_switches() {
    rusage usage;
    return ::getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
}

int write_all(int fd, IoVec iov, uint64_t offset, int flags) {
    const int64_t n = move_all(iov, [&](IoVec rest, size_t done) {
        return ::pwritev2(fd, rest.data, count_of(rest), static_cast<off_t>(offset + done), flags);
    });
    if (n < 0) return static_cast<int>(n);
    return static_cast<size_t>(n) == iov.bytes ? 0 : -EIO;
}

int read_all(int fd, IoVec iov, uint64_t offset) {
    const int64_t n = move_all(iov, [&](IoVec rest, size_t done) {
        return ::preadv(fd, rest.data, count_of(rest), static_cast<off_t>(offset + done));
    });
    if (n < 0) return static_cast<int>(n);
    const auto done = static_cast<size_t>(n);
    if (done < iov.bytes) fill_iovec(iov, done, iov.bytes - done);
    return 0;
}

void FileWriteQueue::Awaiter::await_suspend(std::coroutine_handle<> h) {
    waiter = h;
    loop = &Loop::current();
    PostItem::run = [](PostItem* item) { static_cast<Awaiter*>(item)->waiter.resume(); };
    BlockingPool& pool = loop->pool();
    FileWriteQueue& q = queue;
    bool start = false;
    {
        const std::lock_guard lock(q.mutex_);
        (q.tail_ ? q.tail_->after : q.head_) = this;
        q.tail_ = this;
        start = !q.working_;
        q.working_ = true;
    }
    // Not started by us: a worker may already have resumed this coroutine elsewhere; nothing of it may be touched any
    // more.
    if (!start) return;
    q.worker_.queue = &q;
    q.worker_.run = [](PoolItem* item) { static_cast<Worker*>(item)->queue->work(); };
    pool.submit(q.worker_);
}

void FileWriteQueue::work() {
    while (true) {
        Awaiter* w;
        {
            const std::lock_guard lock(mutex_);
            w = head_;
            CHECK(w, "a worker has work");
        }
        const int64_t switches = voluntary_switches();
        const auto begin = Clock::now();
        w->result = write_all(w->fd, w->iov, w->offset, 0);
        w->took_ns = std::chrono::nanoseconds(Clock::now() - begin).count();
        w->blocked = voluntary_switches() != switches;
        bool last;
        {
            const std::lock_guard lock(mutex_);
            head_ = w->after;
            if (!head_) tail_ = nullptr;
            last = !head_;
            if (last) working_ = false;
        }
        // The last answer may end the file: after it this object is not touched.
        w->loop->post(static_cast<PostItem&>(*w));
        if (last) return;
    }
}

}  // namespace gantry::block
