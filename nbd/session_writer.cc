// The sending side of a session: replies gathered into one sendmsg, one writer.

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "nbd/session.h"
#include "nbd/tls/stream.h"
#include "runtime/io.h"

namespace gantry::nbd {

namespace {

constexpr size_t kMaxIovecs = 128;
/// Sent at one go before others on this loop run.
constexpr size_t kSendShare = 2u << 20;
/// The same with TLS, where each byte costs much more; and what is encrypted for one sendmsg.
constexpr size_t kEncryptShare = 512u << 10;
constexpr size_t kEncryptAtOnce = 64u << 10;

}  // namespace

void Session::flush() {
    publish_counters();
    if (writer_busy_ || replies_.empty()) return;
    if (send_now() != Sent::kAll) wake_writer();
}

Session::Sent Session::send_now() {
    if (config_.tls) return send_encrypted();
    size_t share = kSendShare;
    while (!replies_.empty()) {
        iovec iov[kMaxIovecs];
        msghdr message{};
        message.msg_iov = iov;
        message.msg_iovlen = replies_.gather(iov, kMaxIovecs);
        const ssize_t n = ::sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n >= 0) {
            replies_.consume(static_cast<size_t>(n));
            if (static_cast<size_t>(n) >= share && !replies_.empty()) return Sent::kShare;
            share -= std::min(share, static_cast<size_t>(n));
            continue;
        }
        if (errno == EINTR) continue;
        if (errno == EAGAIN) return Sent::kFull;
        drop_connection();
    }
    return Sent::kAll;
}

Session::Sent Session::send_encrypted() {
    TlsStream& tls = *config_.tls;
    size_t share = kEncryptShare;
    while (!all_sent()) {
        if (tls.unsent() == 0) {
            if (share == 0) return Sent::kShare;
            iovec iov[kMaxIovecs];
            const size_t count = replies_.gather(iov, kMaxIovecs);
            const int n = tls.encrypt(iov, count, std::min(share, kEncryptAtOnce));
            if (n < 0) {
                drop_connection();
                break;
            }
            replies_.consume(static_cast<size_t>(n));
            share -= static_cast<size_t>(n);
        }
        const int sent = tls.try_flush(fd_);
        if (sent == -EAGAIN) return Sent::kFull;
        if (sent < 0) drop_connection();
    }
    return Sent::kAll;
}

bool Session::all_sent() const { return replies_.empty() && (!config_.tls || broken_ || config_.tls->unsent() == 0); }

void Session::wake_writer() {
    if (writer_busy_) return;
    writer_busy_ = true;
    writer_wake_.notify_one();
}

Task<void> Session::writer() {
    for (;;) {
        // What other coroutines finish before this one runs leaves in the same sendmsg.
        while (!writer_busy_) co_await writer_wake_.wait();
        while (!all_sent()) {
            const Sent sent = send_now();
            if (sent == Sent::kAll) break;
            room_.notify_all();
            if (sent == Sent::kFull) {
                const int r = co_await io_poll(fd_, POLLOUT);
                if (r < 0) drop_connection();
            } else {
                Timer pause;
                co_await pause.until(Clock::time_point::min());
            }
        }
        writer_busy_ = false;
        room_.notify_all();
        if (finishing_) co_return;
    }
}

void Session::drop_connection() {
    broken_ = true;
    replies_.clear();
    // Wakes the reader; the descriptor is closed by its owner.
    ::shutdown(fd_, SHUT_RDWR);
    room_.notify_all();
}

void Session::publish_counters() {
    counters_.requests.store(requests_, std::memory_order_relaxed);
    counters_.bytes_read.store(bytes_read_, std::memory_order_relaxed);
    counters_.bytes_written.store(bytes_written_, std::memory_order_relaxed);
    counters_.in_flight.store(in_flight_, std::memory_order_relaxed);
}

}  // namespace gantry::nbd
