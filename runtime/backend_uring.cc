// The io_uring back end: one ring per loop, one io_uring_enter per turn.

#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "runtime/backend.h"
#include "runtime/unique_fd.h"

namespace gantry {

namespace {

constexpr unsigned kSqEntries = 256;
constexpr unsigned kCqEntries = 4096;
/// Entries have room for a driver's command.
constexpr unsigned kCommonSetup =
    IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SQE128;
constexpr size_t kMaxTransfer = 0x7ffff000;  // what Linux moves in one call

/// user_data of the ring's own requests; operations have their address, which is aligned.
constexpr uint64_t kWakeTag = 1;
constexpr uint64_t kIgnoreTag = 2;
constexpr uint64_t kTimeoutTag = 3;

enum State : uint32_t { kIdle, kInRing, kWaitingForRoom };

struct SetupLevel {
    unsigned flags;
    std::string_view text;
};

/// Best first. R_DISABLED lets one thread create the ring and another be its single issuer. The loop is the only
/// waiter, so completions need not interrupt it: it runs them when it looks (deferred), or at its next system call
/// (cooperative).
constexpr SetupLevel kLevels[] = {
    {IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
     "single issuer, deferred task work"},  // 6.1
    {IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
     "single issuer, cooperative task work"},                                                                    // 6.0
    {IORING_SETUP_R_DISABLED | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG, "cooperative task work"},  // 5.19
};

/// Submission and timed waiting in one call; iovecs may go once submitted; completions are never dropped.
constexpr unsigned kNeededFeatures = IORING_FEAT_EXT_ARG | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_NODROP |
                                     IORING_FEAT_RW_CUR_POS | IORING_FEAT_FAST_POLL;

constexpr int kNeededOps[] = {IORING_OP_READ,      IORING_OP_WRITE,       IORING_OP_READV,   IORING_OP_WRITEV,
                              IORING_OP_FSYNC,     IORING_OP_RECV,        IORING_OP_SEND,    IORING_OP_SENDMSG,
                              IORING_OP_RECVMSG,   IORING_OP_ACCEPT,      IORING_OP_CONNECT, IORING_OP_POLL_ADD,
                              IORING_OP_FALLOCATE, IORING_OP_ASYNC_CANCEL};

std::string kernel_release() {
    utsname u{};
    return ::uname(&u) == 0 ? std::string(u.release) : std::string("?");
}

/// The best level this kernel takes, after `level`; -errno in `error` when it takes none.
int init_ring(io_uring& ring, size_t& level, int& features) {
    int result = -EINVAL;
    for (; level < std::size(kLevels); ++level) {
        io_uring_params params{};
        params.flags = kLevels[level].flags | kCommonSetup;
        params.cq_entries = kCqEntries;
        result = ::io_uring_queue_init_params(kSqEntries, &ring, &params);
        if (result == 0) {
            features = static_cast<int>(params.features);
            return 0;
        }
        if (result != -EINVAL) return result;
    }
    return result;
}

Error refused(int e) {
    std::string_view hint;
    if (e == ENOSYS) hint = "; this kernel has no io_uring or a sandbox hides it";
    if (e == EPERM || e == EACCES)
        hint = "; sysctl kernel.io_uring_disabled or a container's seccomp filter forbids it";
    if (e == EINVAL) hint = "; Linux 5.19 or later is needed";
    if (e == ENOMEM) hint = "; raise the limit of locked memory (ulimit -l)";
    return Error(ErrorKind::kUnsupported,
                 fmt::format("io_uring is not available on kernel {}: {}{}", kernel_release(), errno_text(e), hint), e);
}

Result<std::string> run_probe() {
    io_uring ring{};
    size_t level = 0;
    int features = 0;
    if (const int r = init_ring(ring, level, features); r < 0) return std::unexpected(refused(-r));
    std::string missing;
    if ((static_cast<unsigned>(features) & kNeededFeatures) != kNeededFeatures) {
        missing = fmt::format("features {:#x} of {:#x}", features, kNeededFeatures);
    }
    if (io_uring_probe* probe = ::io_uring_get_probe_ring(&ring)) {
        for (const int op : kNeededOps) {
            if (!::io_uring_opcode_supported(probe, op)) missing = fmt::format("operation {}", op);
        }
        ::io_uring_free_probe(probe);
    } else {
        missing = "the probe";
    }
    ::io_uring_queue_exit(&ring);
    if (!missing.empty()) {
        return fail(ErrorKind::kUnsupported, "io_uring of kernel {} lacks {}", kernel_release(), missing);
    }
    return fmt::format("kernel {}: {}", kernel_release(), kLevels[level].text);
}

class UringBackend final : public IoBackend {
  public:
    explicit UringBackend(Loop& loop) : loop_(loop) {}
    ~UringBackend() override {
        if (ring_ready_) ::io_uring_queue_exit(&ring_);
    }
    Result<> init();

    std::string_view name() const override { return "io_uring"; }
    bool submit(IoOp& op) override;
    void cancel(IoOp& op) override;
    void wait(Clock::time_point deadline) override;
    void wake() override;
    void forget_fd(int) override {}
    void attach() override;
    void detach() override;
    size_t in_flight() const override { return in_flight_; }

  private:
    io_uring_sqe* get_sqe();
    void queue(IoOp& op);
    static void prepare(io_uring_sqe* sqe, IoOp& op);
    bool worth_retry(const IoOp& op, int result) const;
    void arm_wake();
    void flush_overflow();
    bool arm_timeout(Clock::time_point deadline);
    void enter(Clock::time_point deadline);
    void reap();

    Loop& loop_;
    io_uring ring_{};
    UniqueFd event_;
    bool ring_ready_ = false;
    bool enabled_ = false;
    bool wake_armed_ = false;
    bool timeout_armed_ = false;
    Clock::time_point timeout_at_{};
    __kernel_timespec timeout_spec_{};
    size_t in_flight_ = 0;
    // Operations for which the submission queue had no room, in order.
    IoOp* waiting_head_ = nullptr;
    IoOp* waiting_tail_ = nullptr;
};

Result<> UringBackend::init() {
    event_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!event_) return fail_errno(errno, "cannot create an eventfd");
    size_t level = 0;
    int features = 0;
    if (const int r = init_ring(ring_, level, features); r < 0) return std::unexpected(refused(-r));
    ring_ready_ = true;
    return {};
}

void UringBackend::attach() {
    if (!enabled_) {
        // Not io_uring_enable_rings(): the shared library of liburing 2.3 does not export it.
        const long r = ::syscall(__NR_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
        CHECK(r == 0, "a ring is enabled on the thread of its loop");
        enabled_ = true;
    }
    // Saves the kernel a descriptor look-up per call. The index belongs to this thread, so detach() gives it back.
    (void)::io_uring_register_ring_fd(&ring_);
}

void UringBackend::detach() {
    if (ring_.enter_ring_fd != ring_.ring_fd) (void)::io_uring_unregister_ring_fd(&ring_);
}

void UringBackend::prepare(io_uring_sqe* sqe, IoOp& op) {
    switch (op.kind) {
        case IoOp::Kind::kRead:
        case IoOp::Kind::kWrite: {
            const bool write = op.kind == IoOp::Kind::kWrite;
            if (op.rw.count == 1) {
                const auto length = static_cast<unsigned>(std::min(op.rw.iov->iov_len, kMaxTransfer));
                if (write) {
                    ::io_uring_prep_write(sqe, op.fd, op.rw.iov->iov_base, length, op.rw.offset);
                } else {
                    ::io_uring_prep_read(sqe, op.fd, op.rw.iov->iov_base, length, op.rw.offset);
                }
                sqe->rw_flags = op.rw.flags;
            } else if (write) {
                ::io_uring_prep_writev2(sqe, op.fd, op.rw.iov, op.rw.count, op.rw.offset, op.rw.flags);
            } else {
                ::io_uring_prep_readv2(sqe, op.fd, op.rw.iov, op.rw.count, op.rw.offset, op.rw.flags);
            }
            break;
        }
        case IoOp::Kind::kFsync:
            ::io_uring_prep_fsync(sqe, op.fd, 0);
            break;
        case IoOp::Kind::kFdatasync:
            ::io_uring_prep_fsync(sqe, op.fd, IORING_FSYNC_DATASYNC);
            break;
        case IoOp::Kind::kFallocate:
            ::io_uring_prep_fallocate(sqe, op.fd, op.falloc.mode, static_cast<off_t>(op.falloc.offset),
                                      static_cast<off_t>(op.falloc.length));
            break;
        case IoOp::Kind::kRecv:
            ::io_uring_prep_recv(sqe, op.fd, op.buf.data, std::min(op.buf.size, kMaxTransfer), op.buf.flags);
            break;
        case IoOp::Kind::kSend:
            ::io_uring_prep_send(sqe, op.fd, op.buf.data, std::min(op.buf.size, kMaxTransfer), op.buf.flags);
            break;
        case IoOp::Kind::kSendmsg:
            ::io_uring_prep_sendmsg(sqe, op.fd, op.msg.msg, static_cast<unsigned>(op.msg.flags));
            break;
        case IoOp::Kind::kRecvmsg:
            ::io_uring_prep_recvmsg(sqe, op.fd, op.msg.msg, static_cast<unsigned>(op.msg.flags));
            break;
        case IoOp::Kind::kAccept:
            ::io_uring_prep_accept(sqe, op.fd, op.sock.addr, op.sock.addrlen, op.sock.flags);
            break;
        case IoOp::Kind::kConnect:
            ::io_uring_prep_connect(sqe, op.fd, op.sock.addr, op.sock.len);
            break;
        case IoOp::Kind::kPoll:
            ::io_uring_prep_poll_add(sqe, op.fd, op.poll.events);
            break;
        case IoOp::Kind::kCommand:
            ::io_uring_prep_rw(IORING_OP_URING_CMD, sqe, op.fd, op.command.iov, op.command.count, 0);
            sqe->cmd_op = op.command.op;
            std::memset(sqe->cmd, 0, kMaxCommand);
            std::memcpy(sqe->cmd, op.command.data, op.command.size);
            break;
    }
    ::io_uring_sqe_set_data(sqe, &op);
}

io_uring_sqe* UringBackend::get_sqe() {
    io_uring_sqe* sqe = ::io_uring_get_sqe(&ring_);
    if (!sqe && enabled_) {
        (void)::io_uring_submit(
            &ring_);  // may be refused while completions overflow; then there is no room until wait()
        sqe = ::io_uring_get_sqe(&ring_);
    }
    return sqe;
}

void UringBackend::queue(IoOp& op) {
    io_uring_sqe* sqe = waiting_head_ ? nullptr : get_sqe();
    if (sqe) [[likely]] {
        prepare(sqe, op);
        op.state = kInRing;
        return;
    }
    op.state = kWaitingForRoom;
    op.next = nullptr;
    op.prev = waiting_tail_;
    (waiting_tail_ ? waiting_tail_->next : waiting_head_) = &op;
    waiting_tail_ = &op;
}

bool UringBackend::submit(IoOp& op) {
    ++in_flight_;
    queue(op);
    return false;
}

void UringBackend::flush_overflow() {
    while (IoOp* op = waiting_head_) {
        io_uring_sqe* sqe = get_sqe();
        if (!sqe) return;
        waiting_head_ = op->next;
        (waiting_head_ ? waiting_head_->prev : waiting_tail_) = nullptr;
        prepare(sqe, *op);
        op->state = kInRing;
    }
}

void UringBackend::cancel(IoOp& op) {
    if (op.state == kWaitingForRoom) {
        (op.prev ? op.prev->next : waiting_head_) = op.next;
        (op.next ? op.next->prev : waiting_tail_) = op.prev;
        op.state = kIdle;
        op.result = -ECANCELED;
        --in_flight_;
        loop_.ready(op.waiter);
        return;
    }
    if (op.state != kInRing) return;
    io_uring_sqe* sqe = get_sqe();
    while (!sqe) {  // make room: completions that overflowed hold submission up
        reap();
        if (op.state != kInRing) return;
        (void)::io_uring_submit_and_get_events(&ring_);
        sqe = ::io_uring_get_sqe(&ring_);
    }
    // It is queued behind the operation and before anything that could reuse the address, so it never hits another one.
    ::io_uring_prep_cancel(sqe, &op, 0);
    ::io_uring_sqe_set_data64(sqe, kIgnoreTag);
}

void UringBackend::arm_wake() {
    io_uring_sqe* sqe = get_sqe();
    if (!sqe) return;  // again before the next sleep
    // Multishot: each write to the eventfd makes a completion; its counter need not be read.
    ::io_uring_prep_poll_multishot(sqe, event_.get(), POLLIN);
    ::io_uring_sqe_set_data64(sqe, kWakeTag);
    wake_armed_ = true;
}

/// The ring completes something at `deadline` or earlier. A timeout that is too early stays: programming the clock for
/// each sleep of a busy loop costs more than one vain wake-up once in a while.
bool UringBackend::arm_timeout(Clock::time_point deadline) {
    if (timeout_armed_ && timeout_at_ <= deadline) return true;
    io_uring_sqe* sqe = get_sqe();
    if (!sqe) return false;
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline.time_since_epoch()).count();
    timeout_spec_ = {ns / 1'000'000'000, ns % 1'000'000'000};
    if (timeout_armed_) {
        // When it has just fired there is nothing to move, and its completion ends the sleep.
        ::io_uring_prep_timeout_update(sqe, &timeout_spec_, kTimeoutTag, IORING_TIMEOUT_ABS);
        ::io_uring_sqe_set_data64(sqe, kIgnoreTag);
    } else {
        ::io_uring_prep_timeout(sqe, &timeout_spec_, 0, IORING_TIMEOUT_ABS);
        ::io_uring_sqe_set_data64(sqe, kTimeoutTag);
    }
    timeout_armed_ = true;
    timeout_at_ = deadline;
    return true;
}

bool UringBackend::worth_retry(const IoOp& op, int result) const {
    if (result != -EINTR && result != -EAGAIN) return false;
    switch (op.kind) {
        case IoOp::Kind::kRead:
        case IoOp::Kind::kWrite: {
            if (result == -EINTR) return true;
            if (op.rw.flags & RWF_NOWAIT) return false;
            const int flags = ::fcntl(op.fd, F_GETFL);
            return flags >= 0 && !(flags & O_NONBLOCK);
        }
        case IoOp::Kind::kRecv:
        case IoOp::Kind::kSend:
            return result == -EINTR || !(op.buf.flags & MSG_DONTWAIT);
        case IoOp::Kind::kSendmsg:
        case IoOp::Kind::kRecvmsg:
            return result == -EINTR || !(op.msg.flags & MSG_DONTWAIT);
        case IoOp::Kind::kConnect:
        case IoOp::Kind::kCommand:
            return false;
        default:
            return true;
    }
}

void UringBackend::reap() {
    io_uring_cqe* cqe = nullptr;
    unsigned head;
    unsigned seen = 0;
    io_uring_for_each_cqe(&ring_, head, cqe) {
        ++seen;
        if (cqe->user_data == kIgnoreTag) continue;
        if (cqe->user_data == kWakeTag) {
            if (!(cqe->flags & IORING_CQE_F_MORE)) wake_armed_ = false;
            continue;
        }
        if (cqe->user_data == kTimeoutTag) {
            timeout_armed_ = false;
            continue;
        }
        auto* op = reinterpret_cast<IoOp*>(cqe->user_data);
        op->result = cqe->res;
        if (worth_retry(*op, cqe->res)) [[unlikely]] {
            // Not through queue(): that could enter the kernel while this batch is being read.
            op->state = kWaitingForRoom;
            op->next = nullptr;
            op->prev = waiting_tail_;
            (waiting_tail_ ? waiting_tail_->next : waiting_head_) = op;
            waiting_tail_ = op;
            continue;
        }
        op->state = kIdle;
        --in_flight_;
        loop_.ready(op->waiter);
    }
    if (seen > 0) ::io_uring_cq_advance(&ring_, seen);
}

void UringBackend::enter(Clock::time_point deadline) {
    if (deadline == Clock::time_point::min()) {
        const unsigned flags = IO_URING_READ_ONCE(*ring_.sq.kflags);
        if (::io_uring_sq_ready(&ring_) > 0) {
            (void)::io_uring_submit_and_get_events(&ring_);
        } else if (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) {
            (void)::io_uring_get_events(&ring_);
        }
        return;
    }
    (void)::io_uring_submit_and_wait(&ring_, 1);
}

void UringBackend::wait(Clock::time_point deadline) {
    flush_overflow();
    if (!wake_armed_) arm_wake();
    if (deadline != Clock::time_point::min() && deadline != Clock::time_point::max() && !arm_timeout(deadline)) {
        deadline = Clock::time_point::min();
    }
    if (!wake_armed_ || waiting_head_) deadline = Clock::time_point::min();  // no room: look again at once
    enter(deadline);
    reap();
}

void UringBackend::wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(event_.get(), &one, sizeof one);
}

}  // namespace

const Result<std::string>& probe_io_uring() {
    static const Result<std::string> answer = run_probe();
    return answer;
}

Result<std::unique_ptr<IoBackend>> make_uring_backend(Loop& loop) {
    if (const auto& probe = probe_io_uring(); !probe) return std::unexpected(probe.error());
    auto backend = std::make_unique<UringBackend>(loop);
    CHECK_OK(backend->init());
    return backend;
}

}  // namespace gantry
