#include "nbd/tls/stream.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nbd/tls/stream_session.h"
#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::nbd {

namespace {

/// One recv of encrypted bytes.
constexpr size_t kInputSize = 128u << 10;
/// What GnuTLS may have us keep: far more than encrypt() is ever asked for at once.
constexpr size_t kOutputMax = 8u << 20;
/// send(): encrypted at one go before others on this loop run.
constexpr size_t kSendShare = 256u << 10;
/// Taken from the socket by one try_recv() before others on this loop run, whether it holds data or not.
constexpr size_t kReceiveShare = 512u << 10;
/// Records after the handshake that are neither data nor an end.
constexpr unsigned kMaxOddities = 1000;
constexpr std::chrono::seconds kByeTime{1};

Task<void> cancel_after(Timer* timer, std::chrono::nanoseconds delay, CancellableIo* io) {
    const bool expired = co_await timer->after(delay);
    if (expired) io->cancel();
}

}  // namespace

TlsStream::TlsStream() = default;
TlsStream::~TlsStream() = default;

// ---- GnuTLS asks for bytes ----

ssize_t TlsStream::Session::pull(gnutls_transport_ptr_t self, void* data, size_t size) {
    auto* s = static_cast<Session*>(self);
    TlsStream& stream = *s->stream;
    const size_t n = std::min(size, stream.in_end_ - stream.in_pos_);
    if (n == 0 && stream.in_eof_) return 0;
    if (n == 0) {
        gnutls_transport_set_errno(s->handle.get(), EAGAIN);
        return -1;
    }
    std::memcpy(data, stream.in_.data() + stream.in_pos_, n);
    stream.in_pos_ += n;
    return static_cast<ssize_t>(n);
}

int TlsStream::Session::pull_timeout(gnutls_transport_ptr_t self, unsigned) {
    const TlsStream& stream = *static_cast<Session*>(self)->stream;
    return stream.in_pos_ != stream.in_end_ || stream.in_eof_ ? 1 : 0;
}

ssize_t TlsStream::Session::push(gnutls_transport_ptr_t self, const giovec_t* iov, int count) {
    auto* s = static_cast<Session*>(self);
    TlsStream& stream = *s->stream;
    size_t total = 0;
    for (int i = 0; i < count; ++i) total += iov[i].iov_len;
    const size_t unsent = stream.out_end_ - stream.out_pos_;
    if (unsent + total > kOutputMax) {
        gnutls_transport_set_errno(s->handle.get(), ENOBUFS);
        return -1;
    }
    if (stream.out_end_ + total > stream.out_.size()) {
        Buffer larger = Buffer::alloc(std::max<size_t>({unsent + total, 4096, 2 * unsent}));
        if (unsent) std::memcpy(larger.data(), stream.out_.data() + stream.out_pos_, unsent);
        stream.out_ = std::move(larger);
        stream.out_pos_ = 0;
        stream.out_end_ = unsent;
    }
    for (int i = 0; i < count; ++i) {
        if (iov[i].iov_len == 0) continue;
        std::memcpy(stream.out_.data() + stream.out_end_, iov[i].iov_base, iov[i].iov_len);
        stream.out_end_ += iov[i].iov_len;
    }
    return static_cast<ssize_t>(total);
}

// ---- Receiving ----

Task<int> TlsStream::fill(int fd) {
    for (;;) {
        // Who waits holds no buffer: an idle connection is cheap.
        in_.reset();
        dry_ = false;
        const int events = co_await io_poll(fd, POLLIN);
        if (events < 0 && events != -EINTR) co_return events;
        const int r = try_fill(fd);
        if (r != -EAGAIN) co_return r;
    }
}

int TlsStream::try_recv(int fd, void* data, size_t size) {
    Session& s = *session_;
    auto* to = static_cast<uint8_t*>(data);
    size_t have = 0, taken = 0;
    int end = -EAGAIN;
    while (have < size) {
        if (s.broken || s.peer_left) {
            end = s.broken;
            break;
        }
        const ssize_t n = gnutls_record_recv(s.handle.get(), to + have, size - have);
        if (n > 0) {
            have += static_cast<size_t>(n);
        } else if (n == 0) {
            s.peer_left = true;
        } else if (n == GNUTLS_E_AGAIN) {
            // A record without data (a key update, a ticket) ends a call, too: what follows it is here.
            if (in_pos_ != in_end_) continue;
            if (have || taken >= kReceiveShare) break;
            const int got = try_fill(fd);
            if (got < 0) {
                end = got;
                break;
            }
            taken += in_end_;
        } else {
            s.received_oddity(static_cast<int>(n));
        }
    }
    // What the engine answers by itself (a key update, an alert) does not wait for data of ours.
    if (unsent()) (void)try_flush(fd);
    return have ? static_cast<int>(have) : end;
}

void TlsStream::Session::received_oddity(int error) {
    // Renegotiation is refused by not taking part in it. What is not fatal is of no interest, unless there is no end of
    // it.
    const bool fatal = gnutls_error_is_fatal(error) || error == GNUTLS_E_REHANDSHAKE;
    if (!fatal && ++oddities <= kMaxOddities) return;
    broken = error == GNUTLS_E_PREMATURE_TERMINATION ? -ECONNABORTED : -EPROTO;
    if (error != GNUTLS_E_FATAL_ALERT_RECEIVED && error != GNUTLS_E_PREMATURE_TERMINATION) {
        gnutls_alert_send_appropriate(handle.get(), error);
    }
}

int TlsStream::try_fill(int fd) {
    if (in_eof_) return -ECONNABORTED;
    if (!in_) in_ = Buffer::alloc(kInputSize);
    const ssize_t n = ::recv(fd, in_.data(), in_.size(), MSG_DONTWAIT);
    dry_ = n < 0 && errno == EAGAIN;
    if (n < 0) return errno == EINTR ? -EAGAIN : -errno;
    in_pos_ = 0;
    in_end_ = static_cast<size_t>(n);
    in_eof_ = n == 0;
    return 0;
}

Task<int> TlsStream::recv(int fd, void* data, size_t size) {
    for (;;) {
        // Who has just tried need not try again.
        const int n = dry_ ? -EAGAIN : try_recv(fd, data, size);
        if (n != -EAGAIN) co_return n;
        const int got = co_await fill(fd);
        if (got < 0) co_return got;
    }
}

// ---- Sending ----

int TlsStream::Session::send_record(const uint8_t* data, size_t size) {
    while (size > 0) {
        const ssize_t n = gnutls_record_send(handle.get(), data, std::min(size, record_max));
        if (n == GNUTLS_E_AGAIN || n == GNUTLS_E_INTERRUPTED) continue;
        if (n <= 0) {
            broken = -EPROTO;
            return broken;
        }
        data += n;
        size -= static_cast<size_t>(n);
    }
    return 0;
}

int TlsStream::encrypt(const iovec* iov, size_t count, size_t limit) {
    Session& s = *session_;
    if (s.broken || !s.open) return s.broken ? s.broken : -EPIPE;
    size_t taken = 0;
    for (size_t i = 0; i < count && taken < limit; ++i) {
        const auto* data = static_cast<const uint8_t*>(iov[i].iov_base);
        size_t left = std::min(iov[i].iov_len, limit - taken);
        taken += left;
        while (left > 0) {
            if (s.record_used == 0 && left >= s.record_max) {
                const size_t whole = left - left % s.record_max;
                if (s.send_record(data, whole) != 0) return s.broken;
                data += whole;
                left -= whole;
                continue;
            }
            if (!s.record) s.record = Buffer::alloc(kTlsRecordSize);
            const size_t n = std::min(left, s.record_max - s.record_used);
            std::memcpy(s.record.data() + s.record_used, data, n);
            s.record_used += n;
            data += n;
            left -= n;
            if (s.record_used == s.record_max) {
                s.record_used = 0;
                if (s.send_record(s.record.data(), s.record_max) != 0) return s.broken;
            }
        }
    }
    const size_t rest = std::exchange(s.record_used, 0);
    if (rest && s.send_record(s.record.data(), rest) != 0) return s.broken;
    return static_cast<int>(taken);
}

int TlsStream::try_flush(int fd) {
    while (out_pos_ != out_end_) {
        const ssize_t n = ::send(fd, out_.data() + out_pos_, out_end_ - out_pos_, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n >= 0) {
            out_pos_ += static_cast<size_t>(n);
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    out_pos_ = out_end_ = 0;
    return 0;
}

Task<int> TlsStream::drain(int fd) {
    for (;;) {
        const int r = try_flush(fd);
        if (r != -EAGAIN) co_return r;
        const int events = co_await io_poll(fd, POLLOUT);
        if (events < 0 && events != -EINTR) co_return events;
    }
}

Task<int> TlsStream::send(int fd, const iovec* iov, size_t count) {
    size_t total = 0;
    std::vector<iovec> rest(iov, iov + count);
    for (const iovec& part : rest) total += part.iov_len;
    if (total > INT32_MAX) co_return -EINVAL;
    size_t first = 0, sent = 0;
    while (sent < total) {
        const int n = encrypt(rest.data() + first, rest.size() - first, kSendShare);
        if (n < 0) co_return n;
        sent += static_cast<size_t>(n);
        for (size_t left = static_cast<size_t>(n); left > 0;) {
            iovec& part = rest[first];
            const size_t step = std::min(left, part.iov_len);
            part.iov_base = static_cast<uint8_t*>(part.iov_base) + step;
            part.iov_len -= step;
            left -= step;
            if (part.iov_len == 0) ++first;
        }
        const int r = co_await drain(fd);
        if (r < 0) co_return r;
        if (sent < total) co_await yield_turn();
    }
    co_return static_cast<int>(total);
}

Task<int> TlsStream::send(int fd, const void* data, size_t size) {
    const iovec one{const_cast<void*>(data), size};
    const int n = co_await send(fd, &one, 1);
    co_return n;
}

Task<void> TlsStream::bye(int fd) {
    Session& s = *session_;
    if (!s.open) co_return;
    s.open = false;
    if (s.broken) co_return;
    while (gnutls_bye(s.handle.get(), GNUTLS_SHUT_WR) == GNUTLS_E_INTERRUPTED) {
    }
    const auto deadline = Clock::now() + kByeTime;
    while (try_flush(fd) == -EAGAIN && Clock::now() < deadline) {
        Timer timer;
        TaskScope scope;
        CancellableIo room(io_poll(fd, POLLOUT));
        scope.spawn(cancel_after(&timer, deadline - Clock::now(), &room));
        const int events = co_await room;
        timer.cancel();
        co_await scope.join();
        if (events < 0) break;
    }
}

void TlsStream::release_buffers() {
    if (in_pos_ == in_end_) in_.reset();
    if (out_pos_ == out_end_) {
        out_.reset();
        out_pos_ = out_end_ = 0;
    }
    if (session_->record_used == 0) session_->record.reset();
}

}  // namespace gantry::nbd
