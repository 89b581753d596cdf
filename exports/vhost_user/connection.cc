#include "exports/vhost_user/connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>

#include "runtime/io.h"
#include "runtime/socket.h"

namespace gantry::vhost_user {

namespace {

/// Room for the descriptors of one message.
union Control {
    cmsghdr header;  // for its alignment
    std::array<char, CMSG_SPACE(kMaxDescriptors * sizeof(int))> bytes;
};

/// Takes what came along out of `message`.
std::vector<UniqueFd> take_descriptors(msghdr& message) {
    std::vector<UniqueFd> fds;
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; ++i) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            fds.emplace_back(fd);
        }
    }
    return fds;
}

std::unexpected<Error> closed() { return fail(ErrorKind::kShutdown, "it has closed the connection"); }

std::unexpected<Error> socket_error(int error, std::string_view what) {
    if (error == EPIPE || error == ECONNRESET) return closed();
    return fail_errno(error, "{}", what);
}

}  // namespace

Connection::Connection(UniqueFd fd) : fd_(std::move(fd)), peer_(peer_name(fd_.get())) {}

Connection::~Connection() {
    if (Loop* loop = Loop::current_or_null()) loop->forget_fd(fd_.get());
}

Task<Result<Message>> Connection::next() {
    Message message;
    Control control;
    iovec part{&message.header, sizeof message.header};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control.bytes.data();
    header.msg_controllen = control.bytes.size();
    // A descriptor travels with the first byte of its message; what comes with others is dropped by the kernel.
    int got = co_await io_recvmsg(fd_.get(), &header);
    while (got == -EINTR || got == -EAGAIN) got = co_await io_recvmsg(fd_.get(), &header);
    if (got > 0) message.fds = take_descriptors(header);
    if (got == 0) co_return closed();
    if (got < 0) co_return socket_error(-got, "reading a message");
    if (header.msg_flags & MSG_CTRUNC) {
        co_return fail(ErrorKind::kInvalid,
                       "a message comes with more than {} descriptors, or with more than this process may open",
                       kMaxDescriptors);
    }
    const auto begun = static_cast<size_t>(got);
    if (begun < sizeof message.header) {
        CO_CHECK(co_await receive_rest(reinterpret_cast<std::byte*>(&message.header) + begun,
                                       sizeof message.header - begun));
    }
    CO_CHECK(check_header(message.header));
    message.payload.resize(message.header.size);
    CO_CHECK(co_await receive_rest(message.payload.data(), message.payload.size()));
    co_return std::move(message);
}

Task<Result<>> Connection::receive_rest(std::byte* to, size_t size) {
    for (size_t done = 0; done < size;) {
        const int got = co_await io_recv(fd_.get(), to + done, size - done);
        if (got == -EINTR || got == -EAGAIN) continue;
        if (got == 0) co_return closed();
        if (got < 0) co_return socket_error(-got, "reading a message");
        done += static_cast<size_t>(got);
    }
    co_return Result<>();
}

Task<Result<>> Connection::send(std::vector<std::byte> bytes, int fd) {
    Control control{};
    for (size_t done = 0; done < bytes.size();) {
        iovec part{bytes.data() + done, bytes.size() - done};
        msghdr header{};
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        if (fd >= 0 && done == 0) {
            header.msg_control = control.bytes.data();
            header.msg_controllen = CMSG_SPACE(sizeof fd);
            cmsghdr* c = CMSG_FIRSTHDR(&header);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof fd);
            std::memcpy(CMSG_DATA(c), &fd, sizeof fd);
        }
        const int sent = co_await io_sendmsg(fd_.get(), &header);
        if (sent == -EINTR || sent == -EAGAIN) continue;
        if (sent < 0) co_return socket_error(-sent, "sending a reply");
        done += static_cast<size_t>(sent);
    }
    co_return Result<>();
}

void Connection::cut() { ::shutdown(fd_.get(), SHUT_RDWR); }

bool Connection::hung_up() const {
    pollfd look{.fd = fd_.get(), .events = POLLRDHUP, .revents = 0};
    return ::poll(&look, 1, 0) > 0 && (look.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

bool send_notice(int fd, uint32_t request) {
    const Header header{request, kVersion, 0};
    ssize_t sent = 0;
    do {
        sent = ::send(fd, &header, sizeof header, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent == sizeof header;
}

}  // namespace gantry::vhost_user
