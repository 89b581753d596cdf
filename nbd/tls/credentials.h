// TlsCredentials: keys and rules of one end of TLS connections, as loaded at one moment.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "block/crypto/secret_bytes.h"
#include "runtime/error.h"

namespace gantry::nbd {

enum class TlsKind : uint8_t { kX509, kPsk, kAnon };
enum class TlsEndpoint : uint8_t { kClient, kServer };
std::string_view tls_endpoint_name(TlsEndpoint endpoint);  // "client", "server"

/// spec/nbd.md section 4.3.
struct TlsCredentialsOptions {
    TlsKind kind = TlsKind::kX509;
    TlsEndpoint endpoint = TlsEndpoint::kClient;
    std::string dir;  // ca-cert.pem, ca-crl.pem, server-cert.pem, server-key.pem, client-*.pem, keys.psk, dh-params.pem
    // Single files, each instead of the one in `dir`.
    std::string ca_cert, ca_crl, cert, key, psk_file, dh_params;
    std::string priority;  // GnuTLS; empty: kDefaultPriority
    bool verify_peer = true;
    bool sanity_check = true;                 // of our own x509 files
    block::crypto::SecretBytes key_password;  // of the private key; empty: none
    std::string username = "qemu";            // a PSK client's identity
};

/// TLS 1.2 and later, AES-128-GCM first whatever the client likes more: with PSK it is the one fast cipher that TLS 1.3
/// allows (the hash of a PSK is SHA-256).
extern const char* const kDefaultTlsPriority;

/// Immutable; any thread may make streams of it.
class TlsCredentials {
  public:
    /// Reads the files: blocks, so on the blocking pool or at start-up. Texts name the file and what is wrong with it.
    static Result<std::shared_ptr<const TlsCredentials>> load(TlsCredentialsOptions options);
    ~TlsCredentials();
    TlsCredentials(const TlsCredentials&) = delete;

    TlsKind kind() const;
    TlsEndpoint endpoint() const;
    bool verify_peer() const;

    /// For nbd/tls/ alone (gnutls_handles.h).
    struct Impl;
    const Impl& impl() const { return *impl_; }

  private:
    explicit TlsCredentials(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace gantry::nbd
