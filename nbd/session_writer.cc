// The sending side of a session: replies gathered into one sendmsg, one writer.

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "nbd/session.h"
#include "runtime/io.h"

namespace gantry::nbd {

namespace {

constexpr size_t kMaxIovecs = 128;
/// Sent at one go before others on this loop run.
constexpr size_t kSendShare = 2u << 20;

}  // namespace

void Session::flush() {
    publish_counters();
    if (writer_busy_ || replies_.empty()) return;
    if (send_now() != Sent::kAll) wake_writer();
}

Session::Sent Session::send_now() {
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

void Session::wake_writer() {
    if (writer_busy_) return;
    writer_busy_ = true;
    writer_wake_.notify_one();
}

Task<void> Session::writer() {
    for (;;) {
        // What other coroutines finish before this one runs leaves in the same sendmsg.
        while (!writer_busy_) co_await writer_wake_.wait();
        while (!replies_.empty()) {
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
