#include "nbd/tls/stream.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "nbd/handshake/payload.h"
#include "nbd/tls/certificates.h"
#include "nbd/tls/gnutls_handles.h"
#include "runtime/blocking_pool.h"
#include "runtime/io.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::nbd {

namespace {

/// One recv of encrypted bytes.
constexpr size_t kInputSize = 128u << 10;
constexpr size_t kRecordSize = 16u << 10;
/// What GnuTLS may have us keep: far more than encrypt() is ever asked for at once.
constexpr size_t kOutputMax = 8u << 20;
/// send(): encrypted at one go before others on this loop run.
constexpr size_t kSendShare = 256u << 10;
/// Taken from the socket by one try_recv() before others on this loop run, whether it holds data or not.
constexpr size_t kReceiveShare = 512u << 10;
/// Warning alerts of a handshake that we listen to.
constexpr int kMaxWarnings = 8;
/// Records after it that are neither data nor an end.
constexpr unsigned kMaxOddities = 1000;
constexpr std::chrono::seconds kByeTime{1};
/// Handshakes that compute at the same time: a flood of them leaves the pool to those who wait for a disk.
constexpr uint64_t kComputing = 4;

AsyncSemaphore& computing() {
    static AsyncSemaphore slots(kComputing);
    return slots;
}

Task<void> cancel_after(Timer* timer, std::chrono::nanoseconds delay, CancellableIo* io) {
    const bool expired = co_await timer->after(delay);
    if (expired) io->cancel();
}

}  // namespace

struct TlsStream::Session {
    std::shared_ptr<const TlsCredentials> credentials;
    std::string hostname;
    TlsStream* stream = nullptr;
    GnutlsPtr<gnutls_session_int, gnutls_deinit> handle;
    std::string failure;  // said by a callback
    Buffer record;        // bytes of several places on their way into one record
    size_t record_used = 0;
    size_t record_max = kRecordSize;
    bool open = false;       // handshake done, no close_notify sent
    bool peer_left = false;  // with close_notify
    int broken = 0;          // -errno
    unsigned oddities = 0;

    bool server() const { return credentials->endpoint() == TlsEndpoint::kServer; }
    std::string_view peer() const { return server() ? "client" : "server"; }

    static Session* of(gnutls_session_t session) { return static_cast<Session*>(gnutls_session_get_ptr(session)); }
    static ssize_t pull(gnutls_transport_ptr_t self, void* data, size_t size);
    static int pull_timeout(gnutls_transport_ptr_t self, unsigned ms);
    static ssize_t push(gnutls_transport_ptr_t self, const giovec_t* iov, int count);

    int set_up();
    int verify();
    int send_record(const uint8_t* data, size_t size);
    void received_oddity(int error);
    std::string explain(int error) const;
    std::unexpected<Error> gone(int error) const;
    void remember_peer();
};

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

// ---- Set-up ----

int TlsStream::Session::set_up() {
    const TlsCredentials::Impl& c = credentials->impl();
    // No tickets: each would be a record that nobody reads, sent in every handshake.
    gnutls_session_t raw = nullptr;
    const unsigned flags =
        (server() ? GNUTLS_SERVER : GNUTLS_CLIENT) | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL | GNUTLS_NO_TICKETS;
    int r = gnutls_init(&raw, flags);
    if (r < 0) return r;
    handle.reset(raw);
    gnutls_session_set_ptr(raw, this);
    gnutls_transport_set_ptr(raw, this);
    gnutls_transport_set_pull_function(raw, pull);
    gnutls_transport_set_pull_timeout_function(raw, pull_timeout);
    gnutls_transport_set_vec_push_function(raw, push);
    gnutls_handshake_set_timeout(raw, 0);
    r = gnutls_priority_set(raw, c.priority.get());
    if (r < 0) return r;
    if (c.x509) {
        r = gnutls_credentials_set(raw, GNUTLS_CRD_CERTIFICATE, c.x509.get());
        if (r >= 0 && server()) {
            gnutls_certificate_server_set_request(raw,
                                                  c.options.verify_peer ? GNUTLS_CERT_REQUIRE : GNUTLS_CERT_REQUEST);
        }
        // SNI is for names, not for addresses.
        if (r >= 0 && !server() && !hostname.empty() && hostname.find_first_not_of("0123456789.") != hostname.npos &&
            hostname.find(':') == hostname.npos) {
            r = gnutls_server_name_set(raw, GNUTLS_NAME_DNS, hostname.data(), hostname.size());
        }
    } else if (c.psk_server) {
        r = gnutls_credentials_set(raw, GNUTLS_CRD_PSK, c.psk_server.get());
    } else if (c.psk_client) {
        r = gnutls_credentials_set(raw, GNUTLS_CRD_PSK, c.psk_client.get());
    } else if (c.anon_server) {
        r = gnutls_credentials_set(raw, GNUTLS_CRD_ANON, c.anon_server.get());
    } else {
        r = gnutls_credentials_set(raw, GNUTLS_CRD_ANON, c.anon_client.get());
    }
    return r;
}

TlsStream::TlsStream() = default;
TlsStream::~TlsStream() = default;

Result<std::unique_ptr<TlsStream>> TlsStream::create(std::shared_ptr<const TlsCredentials> credentials,
                                                     std::string hostname) {
    const bool client = credentials->endpoint() == TlsEndpoint::kClient;
    if (client && credentials->kind() == TlsKind::kX509 && credentials->verify_peer() && hostname.empty()) {
        return fail(ErrorKind::kInvalid,
                    "No hostname for certificate validation; say with tls-hostname which name the server's certificate "
                    "must have");
    }
    std::unique_ptr<TlsStream> stream(new TlsStream);
    stream->session_ = std::make_unique<Session>();
    Session& s = *stream->session_;
    s.credentials = std::move(credentials);
    s.hostname = std::move(hostname);
    s.stream = stream.get();
    const int r = s.set_up();
    if (r < 0) return fail(ErrorKind::kNoMemory, "Cannot set up a TLS session: {}", gnutls_strerror(r));
    return stream;
}

// ---- Handshake ----

int tls_find_psk(gnutls_session_t session, const char* identity, gnutls_datum_t* key) {
    auto* s = TlsStream::Session::of(session);
    const auto& keys = s->credentials->impl().psk_keys;
    const auto it = keys.find(std::string_view(identity));
    if (it == keys.end()) {
        s->failure = fmt::format("the client's PSK identity {} is not in keys.psk", quote(identity));
        return -1;
    }
    key->data = static_cast<unsigned char*>(gnutls_malloc(it->second.size()));
    if (!key->data) return -1;
    key->size = static_cast<unsigned>(it->second.size());
    std::memcpy(key->data, it->second.data(), it->second.size());
    return 0;
}

int tls_verify_peer(gnutls_session_t session) { return TlsStream::Session::of(session)->verify(); }

int TlsStream::Session::verify() {
    unsigned count = 0;
    const gnutls_datum_t* raw = gnutls_certificate_get_peers(handle.get(), &count);
    std::vector<CertificatePtr> chain;
    for (unsigned i = 0; raw && i < std::min(count, 16u); ++i) {
        gnutls_x509_crt_t certificate = nullptr;
        if (gnutls_x509_crt_init(&certificate) < 0) return GNUTLS_E_MEMORY_ERROR;
        chain.emplace_back(certificate);
        if (gnutls_x509_crt_import(certificate, &raw[i], GNUTLS_X509_FMT_DER) < 0) {
            failure = fmt::format("the {} sent a certificate that cannot be read", peer());
            return GNUTLS_E_CERTIFICATE_ERROR;
        }
    }
    const TlsCredentials::Impl& c = credentials->impl();
    char purpose[] = GNUTLS_KP_TLS_WWW_SERVER;
    if (server()) std::strcpy(purpose, GNUTLS_KP_TLS_WWW_CLIENT);
    static_assert(sizeof GNUTLS_KP_TLS_WWW_SERVER == sizeof GNUTLS_KP_TLS_WWW_CLIENT);
    gnutls_typed_vdata_st data{GNUTLS_DT_KEY_PURPOSE_OID, reinterpret_cast<unsigned char*>(purpose), 0};
    unsigned status = 0;
    const int r = gnutls_certificate_verify_peers(handle.get(), &data, 1, &status);
    if (r < 0) {
        failure = chain.empty() ? fmt::format("the {} sent no certificate", peer())
                                : fmt::format("the {} certificate cannot be verified: {}", peer(), gnutls_strerror(r));
        return GNUTLS_E_CERTIFICATE_ERROR;
    }
    if (status != 0) {
        failure = explain_verification(chain, status, peer(), c.ca_file, c.ca_names);
        return GNUTLS_E_CERTIFICATE_ERROR;
    }
    if (!server() && !gnutls_x509_crt_check_hostname(chain.front().get(), hostname.c_str())) {
        failure = fmt::format("the server certificate does not match the hostname '{}': it is for {}", hostname,
                              certificate_names(chain.front().get()));
        return GNUTLS_E_CERTIFICATE_ERROR;
    }
    std::string subject = certificate_subject(chain.front().get());
    // Who has no name is nobody, whom no rule lets in.
    if (subject != kNoCertificateName) stream->peer_name_ = std::move(subject);
    return 0;
}

std::string TlsStream::Session::explain(int error) const {
    if (!failure.empty()) return failure;
    if (error == GNUTLS_E_FATAL_ALERT_RECEIVED || error == GNUTLS_E_WARNING_ALERT_RECEIVED) {
        const char* name = gnutls_alert_get_name(gnutls_alert_get(handle.get()));
        return fmt::format("the {} refused us: {}", peer(), name ? name : "an unknown alert");
    }
    if (error == GNUTLS_E_PREMATURE_TERMINATION) return fmt::format("the {} closed the connection", peer());
    if (error == GNUTLS_E_NO_CERTIFICATE_FOUND || error == GNUTLS_E_CERTIFICATE_REQUIRED) {
        return fmt::format("the {} sent no certificate", peer());
    }
    if (error == GNUTLS_E_UNSUPPORTED_VERSION_PACKET) {
        return fmt::format("the {} speaks no version of TLS that is allowed here (1.2 or later by default)", peer());
    }
    if (error == GNUTLS_E_UNEXPECTED_PACKET_LENGTH || error == GNUTLS_E_UNEXPECTED_PACKET ||
        error == GNUTLS_E_RECORD_OVERFLOW) {
        return fmt::format("the {} does not speak TLS ({})", peer(), gnutls_strerror(error));
    }
    return gnutls_strerror(error);
}

std::unexpected<Error> TlsStream::Session::gone(int error) const {
    return fail(ErrorKind::kShutdown, "TLS handshake failed: the {} is gone: {}", peer(), errno_text(error));
}

void TlsStream::Session::remember_peer() {
    gnutls_session_t raw = handle.get();
    if (credentials->kind() == TlsKind::kPsk && server()) {
        if (const char* identity = gnutls_psk_server_get_username(raw)) stream->peer_name_ = identity;
    }
    const char* version = gnutls_protocol_get_name(gnutls_protocol_get_version(raw));
    const char* cipher = gnutls_cipher_get_name(gnutls_cipher_get(raw));
    stream->summary_ = fmt::format("{} {}", version ? version : "TLS", cipher ? cipher : "");
    record_max = std::clamp<size_t>(gnutls_record_get_max_size(raw), 1, kRecordSize);
}

Task<Result<>> TlsStream::handshake(int fd) {
    Session& s = *session_;
    int warnings = 0;
    bool may_go_on = !s.server();
    for (;;) {
        int r = GNUTLS_E_AGAIN;
        if (may_go_on) {
            co_await computing().acquire();
            r = co_await run_blocking([&s] { return gnutls_handshake(s.handle.get()); });
            computing().release();
        }
        if (r < 0 && gnutls_error_is_fatal(r)) {
            // What it complains about goes to the peer, as far as it takes it.
            if (r != GNUTLS_E_FATAL_ALERT_RECEIVED) gnutls_alert_send_appropriate(s.handle.get(), r);
            (void)try_flush(fd);
            const bool left = r == GNUTLS_E_PREMATURE_TERMINATION;
            co_return fail(left ? ErrorKind::kShutdown : ErrorKind::kPermission, "TLS handshake failed: {}",
                           s.explain(r));
        }
        if (r == GNUTLS_E_WARNING_ALERT_RECEIVED && ++warnings > kMaxWarnings) {
            co_return fail(ErrorKind::kPermission, "TLS handshake failed: {}", s.explain(r));
        }
        const int sent = co_await drain(fd);
        if (sent < 0) co_return s.gone(-sent);
        if (r == GNUTLS_E_SUCCESS) break;
        if (r == GNUTLS_E_AGAIN && in_pos_ == in_end_) {
            const int got = co_await fill(fd);
            if (got < 0) co_return s.gone(-got);
        }
        may_go_on = true;
    }
    s.remember_peer();
    s.open = true;
    co_return Result<>();
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
            if (!s.record) s.record = Buffer::alloc(kRecordSize);
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
