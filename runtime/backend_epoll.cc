// The epoll back end: sockets are tried first and watched edge-triggered when they would block; file operations run on
// the blocking pool.

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <vector>

#include "runtime/backend.h"
#include "runtime/blocking_pool.h"
#include "runtime/unique_fd.h"

namespace gantry {

namespace {

/// How often each descriptor number (folded) was closed in this process. A registration remembers the count; when it
/// differs the number may stand for a new descriptor that epoll does not know.
std::array<std::atomic<uint32_t>, 4096> closings;

uint32_t closings_of(int fd) {
    return closings[static_cast<unsigned>(fd) % closings.size()].load(std::memory_order_acquire);
}

enum State : uint32_t { kIdle, kWaiting, kOnPool };

struct OpList {
    IoOp* head = nullptr;
    IoOp* tail = nullptr;
    void push(IoOp& op) {
        op.next = nullptr;
        op.prev = tail;
        (tail ? tail->next : head) = &op;
        tail = &op;
    }
    void remove(IoOp& op) {
        (op.prev ? op.prev->next : head) = op.next;
        (op.next ? op.next->prev : tail) = op.prev;
    }
    bool empty() const { return head == nullptr; }
};

struct Watched {
    OpList readers, writers, pollers;
    uint32_t closings = 0;
    bool registered = false;
    bool idle() const { return readers.empty() && writers.empty() && pollers.empty(); }
};

bool is_file_op(IoOp::Kind kind) {
    switch (kind) {
        case IoOp::Kind::kRead:
        case IoOp::Kind::kWrite:
        case IoOp::Kind::kFsync:
        case IoOp::Kind::kFdatasync:
        case IoOp::Kind::kFallocate:
            return true;
        default:
            return false;
    }
}

/// The call behind `op`, without sleeping for socket operations. -EAGAIN: it would have to.
int call_once(IoOp& op) {
    ssize_t n = 0;
    switch (op.kind) {
        case IoOp::Kind::kRead:
            n = ::preadv2(op.fd, op.rw.iov, static_cast<int>(op.rw.count), static_cast<off_t>(op.rw.offset),
                          op.rw.flags);
            break;
        case IoOp::Kind::kWrite:
            n = ::pwritev2(op.fd, op.rw.iov, static_cast<int>(op.rw.count), static_cast<off_t>(op.rw.offset),
                           op.rw.flags);
            break;
        case IoOp::Kind::kFsync:
            n = ::fsync(op.fd);
            break;
        case IoOp::Kind::kFdatasync:
            n = ::fdatasync(op.fd);
            break;
        case IoOp::Kind::kFallocate:
            n = ::fallocate(op.fd, op.falloc.mode, static_cast<off_t>(op.falloc.offset),
                            static_cast<off_t>(op.falloc.length));
            break;
        case IoOp::Kind::kRecv:
            n = ::recv(op.fd, op.buf.data, op.buf.size, op.buf.flags | MSG_DONTWAIT);
            break;
        case IoOp::Kind::kSend:
            n = ::send(op.fd, op.buf.data, op.buf.size, op.buf.flags | MSG_DONTWAIT);
            break;
        case IoOp::Kind::kSendmsg:
            n = ::sendmsg(op.fd, op.msg.msg, op.msg.flags | MSG_DONTWAIT);
            break;
        case IoOp::Kind::kRecvmsg:
            n = ::recvmsg(op.fd, op.msg.msg, op.msg.flags | MSG_DONTWAIT);
            break;
        case IoOp::Kind::kAccept:
            n = ::accept4(op.fd, op.sock.addr, op.sock.addrlen, op.sock.flags);
            break;
        case IoOp::Kind::kConnect:
            n = ::connect(op.fd, op.sock.addr, op.sock.len);
            break;
        case IoOp::Kind::kCommand:
            return -EOPNOTSUPP;
        case IoOp::Kind::kPoll: {
            const int events = poll_now(op.fd, op.poll.events);
            if (events < 0) return events;
            if (events & POLLNVAL) return -EBADF;
            return events == 0 ? -EAGAIN : events;
        }
    }
    return n < 0 ? -errno : static_cast<int>(n);
}

int call(IoOp& op) {
    for (;;) {
        const int result = call_once(op);
        if (result != -EINTR) return result;
        if (op.kind == IoOp::Kind::kConnect) return -EINPROGRESS;  // an interrupted connect goes on by itself
    }
}

/// A connect that was under way: its outcome, or -EAGAIN while it is undecided.
int connect_outcome(int fd) {
    if (poll_now(fd, POLLOUT) == 0) return -EAGAIN;
    int error = 0;
    socklen_t len = sizeof error;
    if (::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) != 0) return -errno;
    return -error;
}

class EpollBackend final : public IoBackend {
  public:
    EpollBackend(Loop& loop, UniqueFd epoll, UniqueFd event)
        : loop_(loop), epoll_(std::move(epoll)), event_(std::move(event)), events_(256) {}

    std::string_view name() const override { return "epoll"; }
    bool submit(IoOp& op) override;
    void cancel(IoOp& op) override;
    void wait(Clock::time_point deadline) override;
    void wake() override;
    void forget_fd(int fd) override;
    size_t in_flight() const override { return in_flight_; }

  private:
    /// A file operation on its way through the pool and back.
    struct Job : PoolItem, PostItem {
        EpollBackend* backend = nullptr;
        IoOp* op = nullptr;
    };

    void submit_to_pool(IoOp& op);
    /// 0, or -errno when epoll cannot watch it (EPERM: it is always ready).
    int watch(int fd);
    void dispatch(int fd, uint32_t events);
    void retry(OpList& list, bool connects_done);
    void complete(IoOp& op, int result);
    int sleep(Clock::time_point deadline);

    Loop& loop_;
    UniqueFd epoll_;
    UniqueFd event_;
    std::vector<epoll_event> events_;
    std::vector<std::unique_ptr<Watched>> watched_;  // by descriptor
    std::vector<std::unique_ptr<Job>> jobs_;
    std::vector<Job*> free_jobs_;
    size_t in_flight_ = 0;
    bool no_pwait2_ = false;
};

bool EpollBackend::submit(IoOp& op) {
    op.state = kIdle;
    if (op.kind == IoOp::Kind::kPoll) op.poll.events &= ~static_cast<uint32_t>(EPOLLEXCLUSIVE);  // watched by all
    if (is_file_op(op.kind)) {
        submit_to_pool(op);
        return false;
    }
    op.result = call(op);
    if (op.result == -EINPROGRESS && op.kind == IoOp::Kind::kConnect)
        op.result = -EAGAIN;
    else if (op.kind == IoOp::Kind::kConnect)
        return true;  // a full backlog of a unix socket is the caller's to retry
    if (op.result != -EAGAIN) return true;
    if ((op.kind == IoOp::Kind::kRecv || op.kind == IoOp::Kind::kSend) && (op.buf.flags & MSG_DONTWAIT)) return true;
    if ((op.kind == IoOp::Kind::kRecvmsg || op.kind == IoOp::Kind::kSendmsg) && (op.msg.flags & MSG_DONTWAIT))
        return true;
    if (const int error = watch(op.fd); error < 0) {
        // Files that epoll refuses are always ready for reading and writing; other events never come.
        const uint32_t always =
            op.kind == IoOp::Kind::kPoll ? op.poll.events & (POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM) : 0;
        op.result = error == -EPERM && always ? static_cast<int>(always) : error;
        return true;
    }
    Watched& w = *watched_[static_cast<size_t>(op.fd)];
    if (op.kind == IoOp::Kind::kPoll) {
        w.pollers.push(op);
    } else if (op.kind == IoOp::Kind::kRecv || op.kind == IoOp::Kind::kRecvmsg || op.kind == IoOp::Kind::kAccept) {
        w.readers.push(op);
    } else {
        w.writers.push(op);
    }
    op.state = kWaiting;
    ++in_flight_;
    return false;
}

int EpollBackend::watch(int fd) {
    const auto index = static_cast<size_t>(fd);
    if (index >= watched_.size()) watched_.resize(std::max<size_t>(index + 1, watched_.size() * 2));
    if (!watched_[index]) watched_[index] = std::make_unique<Watched>();
    Watched& w = *watched_[index];
    const uint32_t now = closings_of(fd);
    if (w.registered && w.closings == now) return 0;
    epoll_event event{};
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET;
    event.data.fd = fd;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
        if (errno != EEXIST) return -errno;
        // Still the same description after all; MOD looks at its readiness anew, so that no edge is lost.
        if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) != 0) return -errno;
    }
    w.registered = true;
    w.closings = now;
    return 0;
}

void EpollBackend::forget_fd(int fd) {
    const auto index = static_cast<size_t>(fd);
    if (fd < 0 || index >= watched_.size() || !watched_[index]) return;
    Watched& w = *watched_[index];
    CHECK(w.idle(), "a descriptor is forgotten while an operation waits on it");
    if (w.registered) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
    watched_[index].reset();
}

void EpollBackend::cancel(IoOp& op) {
    if (op.state != kWaiting) return;
    Watched& w = *watched_[static_cast<size_t>(op.fd)];
    switch (op.kind) {
        case IoOp::Kind::kPoll:
            w.pollers.remove(op);
            break;
        case IoOp::Kind::kRecv:
        case IoOp::Kind::kRecvmsg:
        case IoOp::Kind::kAccept:
            w.readers.remove(op);
            break;
        default:
            w.writers.remove(op);
    }
    complete(op, -ECANCELED);
}

void EpollBackend::complete(IoOp& op, int result) {
    op.state = kIdle;
    op.result = result;
    --in_flight_;
    loop_.ready(op.waiter);
}

void EpollBackend::submit_to_pool(IoOp& op) {
    if (free_jobs_.empty()) {
        jobs_.push_back(std::make_unique<Job>());
        free_jobs_.push_back(jobs_.back().get());
    }
    Job& job = *free_jobs_.back();
    free_jobs_.pop_back();
    job.backend = this;
    job.op = &op;
    job.PoolItem::run = [](PoolItem* item) {
        auto* self = static_cast<Job*>(item);
        self->op->result = call(*self->op);
        self->backend->loop_.post(static_cast<PostItem&>(*self));
    };
    job.PostItem::run = [](PostItem* item) {
        auto* self = static_cast<Job*>(item);
        IoOp& done = *self->op;
        self->backend->free_jobs_.push_back(self);
        self->backend->complete(done, done.result);
    };
    op.state = kOnPool;
    ++in_flight_;
    loop_.pool().submit(job);
}

void EpollBackend::retry(OpList& list, bool connects_done) {
    for (IoOp* op = list.head; op;) {
        IoOp* next = op->next;
        int result;
        if (op->kind == IoOp::Kind::kConnect) {
            result = connect_outcome(op->fd);
        } else {
            result = call(*op);
        }
        // Pollers wait for different events; the others take turns: when the first cannot go on, none can.
        if (result == -EAGAIN) {
            if (!connects_done) return;
        } else {
            list.remove(*op);
            complete(*op, result);
        }
        op = next;
    }
}

void EpollBackend::dispatch(int fd, uint32_t events) {
    const auto index = static_cast<size_t>(fd);
    if (index >= watched_.size() || !watched_[index]) return;
    Watched& w = *watched_[index];
    const bool ended = events & (EPOLLERR | EPOLLHUP);
    if (ended || (events & (EPOLLIN | EPOLLRDHUP | EPOLLPRI))) retry(w.readers, false);
    if (ended || (events & EPOLLOUT)) retry(w.writers, false);
    retry(w.pollers, true);
}

int EpollBackend::sleep(Clock::time_point deadline) {
    const int max = static_cast<int>(events_.size());
    if (deadline == Clock::time_point::max()) return ::epoll_wait(epoll_.get(), events_.data(), max, -1);
    const auto now = Clock::now();
    if (deadline <= now) return ::epoll_wait(epoll_.get(), events_.data(), max, 0);
    const auto left = deadline - now;
    if (!no_pwait2_) {
        const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
        const timespec ts{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
        const int n = ::epoll_pwait2(epoll_.get(), events_.data(), max, &ts, nullptr);
        if (n >= 0 || errno != ENOSYS) return n;
        no_pwait2_ = true;
    }
    const auto ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
    return ::epoll_wait(epoll_.get(), events_.data(), max, static_cast<int>(std::min<int64_t>(ms, 3'600'000)));
}

void EpollBackend::wait(Clock::time_point deadline) {
    int n = sleep(deadline);
    while (n > 0) {
        for (int i = 0; i < n; ++i) {
            const epoll_event& event = events_[static_cast<size_t>(i)];
            if (event.data.fd != event_.get()) dispatch(event.data.fd, event.events);
        }
        if (static_cast<size_t>(n) < events_.size()) return;
        events_.resize(std::min<size_t>(events_.size() * 2, 8192));
        n = ::epoll_wait(epoll_.get(), events_.data(), static_cast<int>(events_.size()), 0);
    }
    CHECK(n == 0 || errno == EINTR, "epoll_wait works");
}

void EpollBackend::wake() {
    // Edge-triggered: each write is an edge, the counter need not be read. 64 bits of wake-ups do not overflow.
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
}

}  // namespace

void detail::descriptor_closing(int fd) noexcept {
    closings[static_cast<unsigned>(fd) % closings.size()].fetch_add(1, std::memory_order_release);
}

Result<std::unique_ptr<IoBackend>> make_epoll_backend(Loop& loop) {
    UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll) return fail_errno(errno, "cannot create an epoll descriptor");
    UniqueFd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!event) return fail_errno(errno, "cannot create an eventfd");
    epoll_event e{};
    e.events = EPOLLIN | EPOLLET;
    e.data.fd = event.get();
    if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, event.get(), &e) != 0)
        return fail_errno(errno, "cannot watch an eventfd");
    return std::make_unique<EpollBackend>(loop, std::move(epoll), std::move(event));
}

}  // namespace gantry
