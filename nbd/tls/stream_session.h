// TlsStream::Session: what GnuTLS knows of a stream. For nbd/tls/stream*.cc alone.

#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "nbd/tls/gnutls_handles.h"
#include "nbd/tls/stream.h"

namespace gantry::nbd {

inline constexpr size_t kTlsRecordSize = 16u << 10;

struct TlsStream::Session {
    std::shared_ptr<const TlsCredentials> credentials;
    std::string hostname;
    TlsStream* stream = nullptr;
    GnutlsPtr<gnutls_session_int, gnutls_deinit> handle;
    std::string failure;  // said by a callback
    Buffer record;        // bytes of several places on their way into one record
    size_t record_used = 0;
    size_t record_max = kTlsRecordSize;
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

}  // namespace gantry::nbd
