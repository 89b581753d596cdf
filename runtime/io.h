// Awaitable system calls: `int n = co_await io_recv(fd, buf, size);`. Results are >= 0 or -errno.

#pragma once

#include "runtime/iovec.h"
#include "runtime/loop.h"

namespace gantry {

/// Awaiter of one operation. Own loop (Loop::current()) only.
class [[nodiscard]] IoAwait {
  public:
    IoAwait() = default;
    bool await_ready() {
        loop_ = &Loop::current();
        return false;
    }
    bool await_suspend(std::coroutine_handle<> h) {
        op_.waiter = h;
        return !loop_->submit(op_);
    }
    int await_resume() const { return op_.result; }
    /// For Loop::cancel; valid while suspended.
    IoOp& op() { return op_; }

  protected:
    IoOp op_;
    Loop* loop_ = nullptr;
};

/// File I/O at an offset. Through the ring, or on the blocking pool with the epoll back end. `flags`: RWF_*.
IoAwait io_readv(int fd, IoVec iov, uint64_t offset, int flags = 0);
IoAwait io_writev(int fd, IoVec iov, uint64_t offset, int flags = 0);
IoAwait io_fsync(int fd);
IoAwait io_fdatasync(int fd);
IoAwait io_fallocate(int fd, int mode, uint64_t offset, uint64_t length);
/// Sockets (non-blocking descriptors). recv: 0 = end of stream.
IoAwait io_recv(int fd, void* data, size_t size, int flags = 0);
IoAwait io_send(int fd, const void* data, size_t size, int flags = 0);  // MSG_NOSIGNAL is added
IoAwait io_sendmsg(int fd, msghdr* msg, int flags = 0);                 // MSG_NOSIGNAL is added
IoAwait io_recvmsg(int fd, msghdr* msg, int flags = 0);                 // MSG_CMSG_CLOEXEC is added
/// A ring waits exclusively, and for a while after its process was killed: sockets that outlive it are polled instead.
IoAwait io_accept(int fd, sockaddr* addr = nullptr, socklen_t* addrlen = nullptr);  // SOCK_CLOEXEC | SOCK_NONBLOCK
IoAwait io_connect(int fd, const sockaddr* addr, socklen_t len);
/// Waits for POLLIN/POLLOUT/...; the result is the events that hold.
IoAwait io_poll(int fd, uint32_t events);
/// A command of a driver (IORING_OP_URING_CMD): `size` bytes at `data`, at most 80, travel with it, as do `count`
/// ranges at `iov`; both stay until completion. Only where Loop::is_io_uring(); -EOPNOTSUPP elsewhere. May be
/// cancelled.
IoAwait io_command(int fd, uint32_t op, const void* data, uint32_t size, const iovec* iov, uint32_t count);

/// An operation that another coroutine of the same loop may cancel: `CancellableIo io(io_accept(fd)); int r = co_await
/// io;` with `io.cancel()` elsewhere. After completion cancel() does nothing.
class CancellableIo : public IoAwait {
  public:
    explicit CancellableIo(IoAwait start) : IoAwait(start) {}
    bool await_suspend(std::coroutine_handle<> h) {
        pending_ = true;
        return IoAwait::await_suspend(h);
    }
    int await_resume() {
        pending_ = false;
        return IoAwait::await_resume();
    }
    void cancel() {
        if (pending_) loop_->cancel(op_);
    }

  private:
    bool pending_ = false;
};

}  // namespace gantry
