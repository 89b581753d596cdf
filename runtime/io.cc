#include "runtime/io.h"

#include <limits.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>

#include "runtime/backend.h"

namespace gantry {

namespace {

/// Makes the fields of an awaiter's operation reachable.
struct Builder : IoAwait {
    Builder(IoOp::Kind kind, int fd) {
        op_.kind = kind;
        op_.fd = fd;
    }
};

IoAwait rw(IoOp::Kind kind, int fd, IoVec iov, uint64_t offset, int flags) {
    Builder b(kind, fd);
    // The kernel takes at most IOV_MAX ranges; more make a short transfer, which every caller handles anyway.
    b.op().rw = {iov.data, std::min<uint32_t>(iov.count, IOV_MAX), flags, offset};
    return b;
}

IoAwait plain(IoOp::Kind kind, int fd) { return Builder(kind, fd); }

}  // namespace

IoAwait io_readv(int fd, IoVec iov, uint64_t offset, int flags) {
    return rw(IoOp::Kind::kRead, fd, iov, offset, flags);
}

IoAwait io_writev(int fd, IoVec iov, uint64_t offset, int flags) {
    return rw(IoOp::Kind::kWrite, fd, iov, offset, flags);
}

IoAwait io_fsync(int fd) { return plain(IoOp::Kind::kFsync, fd); }

IoAwait io_fdatasync(int fd) { return plain(IoOp::Kind::kFdatasync, fd); }

IoAwait io_fallocate(int fd, int mode, uint64_t offset, uint64_t length) {
    Builder b(IoOp::Kind::kFallocate, fd);
    b.op().falloc = {mode, offset, length};
    return b;
}

IoAwait io_recv(int fd, void* data, size_t size, int flags) {
    Builder b(IoOp::Kind::kRecv, fd);
    b.op().buf = {data, size, flags};
    return b;
}

IoAwait io_send(int fd, const void* data, size_t size, int flags) {
    Builder b(IoOp::Kind::kSend, fd);
    b.op().buf = {const_cast<void*>(data), size, flags | MSG_NOSIGNAL};
    return b;
}

IoAwait io_sendmsg(int fd, msghdr* msg, int flags) {
    Builder b(IoOp::Kind::kSendmsg, fd);
    b.op().msg = {msg, flags | MSG_NOSIGNAL};
    return b;
}

IoAwait io_recvmsg(int fd, msghdr* msg, int flags) {
    Builder b(IoOp::Kind::kRecvmsg, fd);
    b.op().msg = {msg, flags | MSG_CMSG_CLOEXEC};
    return b;
}

IoAwait io_accept(int fd, sockaddr* addr, socklen_t* addrlen) {
    Builder b(IoOp::Kind::kAccept, fd);
    b.op().sock = {addr, addrlen, SOCK_CLOEXEC | SOCK_NONBLOCK, 0};
    return b;
}

IoAwait io_connect(int fd, const sockaddr* addr, socklen_t len) {
    Builder b(IoOp::Kind::kConnect, fd);
    b.op().sock = {const_cast<sockaddr*>(addr), nullptr, 0, len};
    return b;
}

IoAwait io_poll(int fd, uint32_t events) {
    Builder b(IoOp::Kind::kPoll, fd);
    b.op().poll = {events};
    return b;
}

IoAwait io_command(int fd, uint32_t op, const void* data, uint32_t size, const iovec* iov, uint32_t count) {
    CHECK(size <= kMaxCommand, "a command fits into its entry of the submission queue");
    Builder b(IoOp::Kind::kCommand, fd);
    b.op().command = {data, size, op, iov, count};
    return b;
}

int poll_now(int fd, uint32_t events) {
    pollfd p{fd, static_cast<short>(events), 0};
    for (;;) {
        const int n = ::poll(&p, 1, 0);
        if (n >= 0) return n == 0 ? 0 : static_cast<int>(static_cast<unsigned short>(p.revents));
        if (errno != EINTR) return -errno;
    }
}

}  // namespace gantry
