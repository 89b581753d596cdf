#include "exports/virtio/shared_eventfd.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "runtime/log.h"
#include "runtime/socket.h"
#include "runtime/unique_fd.h"

namespace gantry::virtio {

namespace {

/// A write to an eventfd waits while the counter is full, unless O_NONBLOCK is set at that moment, and the kernel has
/// no other flag for it (RWF_NOWAIT is for reads alone). The completion of an asynchronous operation adds to an eventfd
/// without ever waiting: here of a read of nothing, which is complete when it has been submitted. One system call, as a
/// write is; it takes 0.4 us longer.
class Raiser {
  public:
    Raiser() {
        if (::syscall(SYS_io_setup, kMost, &context_) == 0) {
            nothing_.reset(::open("/dev/null", O_RDONLY | O_CLOEXEC));
        } else {
            context_ = 0;
        }
        if (usable()) return;
        log::warn(
            "a front end that fills its eventfd can make its export and others of the thread hang: asynchronous I/O "
            "cannot be set up ({}; see /proc/sys/fs/aio-max-nr)",
            errno_text(errno));
    }
    Raiser(const Raiser&) = delete;
    ~Raiser() {
        if (context_ != 0) ::syscall(SYS_io_destroy, context_);
    }

    bool raise(int fd) {
        if (!usable()) return false;
        iocb operation{};
        operation.aio_lio_opcode = IOCB_CMD_PREAD;
        operation.aio_fildes = static_cast<uint32_t>(nothing_.get());
        operation.aio_flags = IOCB_FLAG_RESFD;
        operation.aio_resfd = static_cast<uint32_t>(fd);
        iocb* list[] = {&operation};
        if (++since_reaped_ == kMost) reap();
        if (::syscall(SYS_io_submit, context_, 1L, list) == 1) return true;
        if (errno != EAGAIN) return false;
        reap();
        return ::syscall(SYS_io_submit, context_, 1L, list) == 1;
    }

  private:
    static constexpr unsigned kMost = 64;

    bool usable() const { return context_ != 0 && nothing_; }
    /// Completions take places until somebody has asked for them.
    void reap() {
        std::array<io_event, kMost> events;
        timespec now{};
        (void)::syscall(SYS_io_getevents, context_, 0L, long{kMost}, events.data(), &now);
        since_reaped_ = 0;
    }

    aio_context_t context_ = 0;
    UniqueFd nothing_;
    unsigned since_reaped_ = 0;
};

}  // namespace

bool is_eventfd(int fd) {
    constexpr char kName[] = "anon_inode:[eventfd]";
    char name[sizeof kName];
    const ssize_t n = ::readlink(fmt::format("/proc/self/fd/{}", fd).c_str(), name, sizeof name);
    return n == sizeof kName - 1 && std::memcmp(name, kName, sizeof kName - 1) == 0;
}

void raise_eventfd(int fd) {
    // A context belongs to the thread, whose end waits for the kernel to forget it: too long for the end of a queue.
    static thread_local Raiser raiser;
    if (raiser.raise(fd)) return;
    (void)set_nonblocking(fd);
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(fd, &one, sizeof one);
}

int take_eventfd(int fd) {
    uint64_t count;
    iovec to{&count, sizeof count};
    constexpr off_t kNoOffset = -1;
    ssize_t n = ::preadv2(fd, &to, 1, kNoOffset, RWF_NOWAIT);
    // Kernels before 5.8.
    if (n < 0 && errno == EOPNOTSUPP) {
        (void)set_nonblocking(fd);
        n = ::read(fd, &count, sizeof count);
    }
    return n >= 0 || errno == EAGAIN || errno == EINTR ? 0 : -errno;
}

}  // namespace gantry::virtio
