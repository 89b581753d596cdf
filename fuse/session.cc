#include "fuse/session.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "runtime/buffer.h"
#include "runtime/io.h"
#include "runtime/log.h"

namespace gantry::fuse {

namespace {

/// The least that the kernel wants to be given before INIT was answered.
constexpr size_t kFirstRead = 8192;

Result<> send(int fd, OutHeader head, const void* body, size_t size) {
    head.len = static_cast<uint32_t>(sizeof head + size);
    const iovec parts[2] = {{&head, sizeof head}, {const_cast<void*>(body), size}};
    for (;;) {
        if (::writev(fd, parts, size > 0 ? 2 : 1) >= 0) return {};
        if (errno != EINTR) return fail_errno(errno, "writing to /dev/fuse");
    }
}

}  // namespace

Task<Result<Negotiated>> agree_with_kernel(int fd, InitWishes wishes) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        co_return fail_errno(errno, "descriptor of /dev/fuse");
    Buffer buffer = Buffer::alloc(kFirstRead);
    for (;;) {
        const ssize_t n = ::read(fd, buffer.data(), buffer.size());
        if (n < 0) {
            const int error = errno;
            if (error == EAGAIN) {
                [[maybe_unused]] const int events = co_await io_poll(fd, POLLIN);
                continue;
            }
            if (error == EINTR || error == ENOENT) continue;
            co_return fail_errno(error, "the mount was gone before the kernel had introduced itself");
        }
        InHeader head;
        if (static_cast<size_t>(n) < sizeof head + 8)
            co_return fail(ErrorKind::kIo, "{} bytes of /dev/fuse are no request", n);
        std::memcpy(&head, buffer.data(), sizeof head);
        if (head.opcode != static_cast<uint32_t>(Opcode::kInit)) {
            CO_CHECK(send(fd, {.error = -EIO, .unique = head.unique}, nullptr, 0));
            continue;
        }
        const auto size = static_cast<size_t>(n) - sizeof head;
        const InitAnswer answer = negotiate(parse_init({buffer.data() + sizeof head, size}), wishes);
        CO_CHECK(
            send(fd, {.error = -answer.error, .unique = head.unique}, &answer.out, answer.error ? 0 : answer.out_size));
        if (answer.error) {
            co_return fail(ErrorKind::kUnsupported,
                           "the kernel speaks a FUSE protocol that is too old; Linux 5.4 (7.31) or later is needed");
        }
        if (answer.agreed) co_return *answer.agreed;
    }
}

Result<UniqueFd> clone_descriptor(int fd) {
    UniqueFd clone(::open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK));
    if (!clone) return fail_errno(errno, "opening /dev/fuse for a further queue");
    auto source = static_cast<uint32_t>(fd);
    if (::ioctl(clone.get(), kIocClone, &source) != 0) return fail_errno(errno, "cloning a descriptor of /dev/fuse");
    return clone;
}

void notify_changed(int fd, bool pages) {
    const NotifyInvalInode body{.ino = kRootNode, .offset = pages ? 0 : -1, .length = 0};
    const Result<> sent =
        send(fd, {.error = static_cast<int32_t>(Notify::kInvalInode), .unique = 0}, &body, sizeof body);
    // ENOENT: the kernel knows nothing of the file yet; ENODEV, ENOTCONN: the mount is gone.
    if (sent) return;
    const int error = sent.error().errno_value();
    if (error != ENOENT && error != ENODEV && error != ENOTCONN && error != ECONNABORTED) {
        log::warn("FUSE: telling the kernel of a change: {}", sent.error().message());
    }
}

Result<> notify_resend(int fd) {
    return send(fd, {.error = static_cast<int32_t>(Notify::kResend), .unique = 0}, nullptr, 0);
}

}  // namespace gantry::fuse
