#include "nbd/client/transport.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "runtime/io.h"

namespace gantry::nbd::client {

namespace {

msghdr message_of(const iovec* list, size_t count) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(list);
    message.msg_iovlen = count;
    return message;
}

}  // namespace

std::string stream_error(int result) {
    return result == 0 ? std::string("the server closed the connection") : errno_text(-result);
}

Transport::Transport(UniqueFd socket) : socket_(std::move(socket)) {}

Transport::~Transport() {
    if (socket_) Loop::current().forget_fd(socket_.get());
}

Task<Result<>> Transport::start_tls(std::shared_ptr<const TlsCredentials> credentials, std::string hostname) {
    CO_TRY(std::unique_ptr<TlsStream> stream, TlsStream::create(std::move(credentials), std::move(hostname)));
    CO_CHECK(co_await stream->handshake(socket_.get()));
    tls_ = std::move(stream);
    co_return Result<>();
}

Task<int> Transport::receive(const iovec* list, size_t count) {
    if (tls_) {
        const auto room = std::find_if(list, list + count, [](const iovec& iov) { return iov.iov_len != 0; });
        int n;
        do {
            n = co_await tls_->recv(socket_.get(), room->iov_base, room->iov_len);
        } while (n == -EINTR);
        co_return n;
    }
    msghdr message = message_of(list, count);
    for (;;) {
        const ssize_t now = ::recvmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (now >= 0) co_return static_cast<int>(now);
        if (errno == EINTR) continue;
        if (errno != EAGAIN) co_return -errno;
        const int later = co_await io_recvmsg(socket_.get(), &message);
        if (later != -EINTR && later != -EAGAIN) co_return later;
    }
}

int Transport::try_send(const iovec* list, size_t count) {
    if (tls_) return -EAGAIN;
    const msghdr message = message_of(list, count);
    for (;;) {
        const ssize_t n = ::sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n >= 0) return static_cast<int>(n);
        if (errno != EINTR) return -errno;
    }
}

Task<int> Transport::send(const iovec* list, size_t count) {
    if (tls_) {
        const int n = co_await tls_->send(socket_.get(), list, count);
        co_return n;
    }
    for (;;) {
        const int now = try_send(list, count);
        if (now != -EAGAIN) co_return now;
        msghdr message = message_of(list, count);
        const int later = co_await io_sendmsg(socket_.get(), &message);
        if (later != -EINTR && later != -EAGAIN) co_return later;
    }
}

Task<Result<>> Transport::receive_all(std::span<uint8_t> into) {
    for (size_t have = 0; have < into.size();) {
        const iovec iov{into.data() + have, into.size() - have};
        const int n = co_await receive(&iov, 1);
        if (n <= 0) co_return fail(ErrorKind::kIo, "{}", stream_error(n));
        have += static_cast<size_t>(n);
    }
    co_return Result<>();
}

Task<Result<>> Transport::send_all(std::span<const uint8_t> bytes) {
    for (size_t sent = 0; sent < bytes.size();) {
        const iovec iov{const_cast<uint8_t*>(bytes.data()) + sent, bytes.size() - sent};
        const int n = co_await send(&iov, 1);
        if (n <= 0) co_return fail(ErrorKind::kIo, "{}", stream_error(n));
        sent += static_cast<size_t>(n);
    }
    co_return Result<>();
}

Task<void> Transport::bye() {
    if (tls_) co_await tls_->bye(socket_.get());
}

void Transport::shut_down() {
    if (socket_) ::shutdown(socket_.get(), SHUT_RDWR);
}

}  // namespace gantry::nbd::client
