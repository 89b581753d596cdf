// The handshake of a TLS stream: its set-up, who the peer is, what went wrong.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "nbd/handshake/payload.h"
#include "nbd/tls/certificates.h"
#include "nbd/tls/stream_session.h"
#include "runtime/blocking_pool.h"
#include "runtime/sync.h"

namespace gantry::nbd {

namespace {

/// Warning alerts of a handshake that we listen to.
constexpr int kMaxWarnings = 8;
/// Handshakes that compute at the same time: a flood of them leaves the pool to those who wait for a disk.
constexpr uint64_t kComputing = 4;

AsyncSemaphore& computing() {
    static AsyncSemaphore slots(kComputing);
    return slots;
}

}  // namespace

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
    record_max = std::clamp<size_t>(gnutls_record_get_max_size(raw), 1, kTlsRecordSize);
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

}  // namespace gantry::nbd
