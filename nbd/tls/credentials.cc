#include "nbd/tls/credentials.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "nbd/tls/certificates.h"
#include "nbd/tls/gnutls_handles.h"
#include "nbd/tls/psk_keys.h"
#include "runtime/unique_fd.h"

namespace gantry::nbd {

using block::crypto::SecretBytes;

const char* const kDefaultTlsPriority =
    "NORMAL:-VERS-TLS1.0:-VERS-TLS1.1:-CIPHER-ALL:+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305:+AES-128-CCM:"
    "+AES-256-CCM:%SERVER_PRECEDENCE";

std::string_view tls_endpoint_name(TlsEndpoint endpoint) {
    return endpoint == TlsEndpoint::kServer ? "server" : "client";
}

namespace {

constexpr size_t kMaxFile = 1u << 20;

template <class Ptr, class Allocate>
Result<Ptr> allocate(Allocate allocate_handle) {
    typename Ptr::pointer handle = nullptr;
    const int r = allocate_handle(&handle);
    if (r < 0) return fail(ErrorKind::kNoMemory, "Cannot allocate credentials: {}", gnutls_strerror(r));
    return Ptr(handle);
}

Result<SecretBytes> read_whole(const std::string& path) {
    UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!fd) return fail_errno(errno, "Unable to access credentials {}", path);
    struct stat st{};
    if (::fstat(fd.get(), &st) != 0) return fail_errno(errno, "Unable to access credentials {}", path);
    if (!S_ISREG(st.st_mode)) return fail(ErrorKind::kInvalid, "Unable to access credentials {}: not a file", path);
    if (static_cast<uint64_t>(st.st_size) > kMaxFile) {
        return fail(ErrorKind::kTooLarge, "Unable to access credentials {}: longer than {} bytes", path, kMaxFile);
    }
    SecretBytes bytes(static_cast<size_t>(st.st_size));
    size_t have = 0;
    while (have < bytes.size()) {
        const ssize_t n = ::read(fd.get(), bytes.data() + have, bytes.size() - have);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(errno, "Unable to access credentials {}", path);
        if (n == 0) return fail(ErrorKind::kIo, "Unable to access credentials {}: it is being changed", path);
        have += static_cast<size_t>(n);
    }
    return bytes;
}

gnutls_datum_t datum(const SecretBytes& bytes) {
    return {const_cast<unsigned char*>(bytes.data()), static_cast<unsigned>(bytes.size())};
}

/// A file of the set: `single` when it is given, else `name` in the directory. Empty: there is none, which is only
/// allowed for one that is not `needed`.
Result<std::string> find_file(const TlsCredentialsOptions& o, const std::string& single, std::string_view name,
                              bool needed) {
    if (!single.empty()) return single;
    if (o.dir.empty()) {
        if (!needed) return std::string();
        return fail(ErrorKind::kInvalid, "Missing 'dir' property value; it is where {} is looked for", name);
    }
    std::string path = fmt::format("{}/{}", o.dir, name);
    if (::access(path.c_str(), R_OK) == 0) return path;
    if (errno == ENOENT && !needed) return std::string();
    return fail_errno(errno, "Unable to access credentials {}", path);
}

Result<PriorityPtr> make_priority(const TlsCredentialsOptions& o) {
    std::string text = o.priority.empty() ? kDefaultTlsPriority : o.priority;
    if (o.kind == TlsKind::kPsk) text += ":+ECDHE-PSK:+DHE-PSK:+PSK";
    if (o.kind == TlsKind::kAnon) text += ":+ANON-ECDH:+ANON-DH";
    gnutls_priority_t priority = nullptr;
    const char* where = nullptr;
    const int r = gnutls_priority_init(&priority, text.c_str(), &where);
    if (r < 0) {
        return fail(ErrorKind::kInvalid, "Unable to set TLS session priority '{}': {} at '{}'", text,
                    gnutls_strerror(r), where ? where : "");
    }
    return PriorityPtr(priority);
}

Result<DhParamsPtr> load_dh_params(const TlsCredentialsOptions& o) {
    if (o.endpoint != TlsEndpoint::kServer) return DhParamsPtr();
    TRY(const std::string path, find_file(o, o.dh_params, "dh-params.pem", false));
    if (path.empty()) return DhParamsPtr();  // the groups of RFC 7919, nothing to compute
    TRY(const SecretBytes bytes, read_whole(path));
    TRY(DhParamsPtr params, allocate<DhParamsPtr>(gnutls_dh_params_init));
    const gnutls_datum_t data = datum(bytes);
    const int r = gnutls_dh_params_import_pkcs3(params.get(), &data, GNUTLS_X509_FMT_PEM);
    if (r < 0) {
        return fail(ErrorKind::kInvalid, "Unable to load DH parameters from {}: {}", path, gnutls_strerror(r));
    }
    return params;
}

Result<> set_key_pair(TlsCredentials::Impl& in, const SecretBytes& cert, const std::string& cert_path,
                      const std::string& key_path) {
    TRY(const SecretBytes key, read_whole(key_path));
    const gnutls_datum_t cert_data = datum(cert), key_data = datum(key);
    const SecretBytes& password = in.options.key_password;
    const std::string text(password.text());
    const int r = gnutls_certificate_set_x509_key_mem2(in.x509.get(), &cert_data, &key_data, GNUTLS_X509_FMT_PEM,
                                                       password.empty() ? nullptr : text.c_str(), 0);
    block::crypto::wipe(const_cast<char*>(text.data()), text.size());
    if (r >= 0) return {};
    const char* hint = "";
    if (r == GNUTLS_E_CERTIFICATE_KEY_MISMATCH) hint = "; the key belongs to another certificate";
    if (r == GNUTLS_E_DECRYPTION_FAILED || r == GNUTLS_E_INVALID_PASSWORD || r == GNUTLS_E_BASE64_DECODING_ERROR) {
        hint = password.empty() ? "; if the key is encrypted, name the secret with its password as passwordid"
                                : "; is the password in the secret of passwordid right?";
    }
    return fail(ErrorKind::kInvalid, "Cannot load certificate '{}' & key '{}': {}{}", cert_path, key_path,
                gnutls_strerror(r), hint);
}

Result<> load_x509(TlsCredentials::Impl& in) {
    const TlsCredentialsOptions& o = in.options;
    const bool server = o.endpoint == TlsEndpoint::kServer;
    TRY(in.x509, allocate<CertificateCredentialsPtr>(gnutls_certificate_allocate_credentials));
    // A server that does not verify its clients needs no authorities.
    TRY(in.ca_file, find_file(o, o.ca_cert, "ca-cert.pem", !server || o.verify_peer));
    TRY(const std::string crl_path, find_file(o, o.ca_crl, "ca-crl.pem", false));
    TRY(const std::string cert_path, find_file(o, o.cert, server ? "server-cert.pem" : "client-cert.pem", server));
    TRY(const std::string key_path,
        find_file(o, o.key, server ? "server-key.pem" : "client-key.pem", server || !cert_path.empty()));
    std::vector<CertificatePtr> authorities, chain;
    if (!in.ca_file.empty()) {
        TRY(const SecretBytes ca, read_whole(in.ca_file));
        TRY(authorities, import_certificates(ca.text(), in.ca_file));
        const gnutls_datum_t data = datum(ca);
        const int r = gnutls_certificate_set_x509_trust_mem(in.x509.get(), &data, GNUTLS_X509_FMT_PEM);
        if (r < 0) {
            return fail(ErrorKind::kInvalid, "Cannot load CA certificate '{}': {}", in.ca_file, gnutls_strerror(r));
        }
        for (const CertificatePtr& c : authorities) {
            in.ca_names += (in.ca_names.empty() ? "" : "', '") + certificate_subject(c.get());
        }
    }
    SecretBytes cert;
    if (!cert_path.empty()) {
        TRY(cert, read_whole(cert_path));
        TRY(chain, import_certificates(cert.text(), cert_path));
    }
    if (o.sanity_check) {
        const CertificateUse use = server ? CertificateUse::kServer : CertificateUse::kClient;
        if (!chain.empty()) CHECK_OK(check_own_certificate(chain.front().get(), cert_path, use));
        for (const CertificatePtr& c : authorities) {
            CHECK_OK(check_own_certificate(c.get(), in.ca_file, CertificateUse::kAuthority));
        }
        if (!chain.empty() && !authorities.empty()) {
            CHECK_OK(check_own_chain(chain, cert_path, authorities, in.ca_file, use));
        }
    }
    if (!cert_path.empty()) CHECK_OK(set_key_pair(in, cert, cert_path, key_path));
    if (!crl_path.empty()) {
        TRY(const SecretBytes crl, read_whole(crl_path));
        const gnutls_datum_t data = datum(crl);
        const int r = gnutls_certificate_set_x509_crl_mem(in.x509.get(), &data, GNUTLS_X509_FMT_PEM);
        if (r < 0) return fail(ErrorKind::kInvalid, "Cannot load CRL '{}': {}", crl_path, gnutls_strerror(r));
    }
    if (in.dh_params) gnutls_certificate_set_dh_params(in.x509.get(), in.dh_params.get());
    if (server && !in.dh_params) gnutls_certificate_set_known_dh_params(in.x509.get(), GNUTLS_SEC_PARAM_MEDIUM);
    if (o.verify_peer) gnutls_certificate_set_verify_function(in.x509.get(), tls_verify_peer);
    return {};
}

Result<> load_psk(TlsCredentials::Impl& in) {
    const TlsCredentialsOptions& o = in.options;
    TRY(const std::string path, find_file(o, o.psk_file, "keys.psk", true));
    TRY(const SecretBytes bytes, read_whole(path));
    TRY(in.psk_keys, parse_psk_keys(bytes.text(), path));
    if (in.psk_keys.empty()) return fail(ErrorKind::kInvalid, "Cannot load PSK file '{}': it holds no key", path);
    if (o.endpoint == TlsEndpoint::kServer) {
        TRY(in.psk_server, allocate<PskServerPtr>(gnutls_psk_allocate_server_credentials));
        gnutls_psk_set_server_credentials_function(in.psk_server.get(), tls_find_psk);
        if (in.dh_params) {
            gnutls_psk_set_server_dh_params(in.psk_server.get(), in.dh_params.get());
        } else {
            gnutls_psk_set_server_known_dh_params(in.psk_server.get(), GNUTLS_SEC_PARAM_MEDIUM);
        }
        return {};
    }
    const auto key = in.psk_keys.find(o.username);
    if (key == in.psk_keys.end()) {
        return fail(ErrorKind::kNotFound, "PSK file '{}' has no key for the username '{}'", path, o.username);
    }
    TRY(in.psk_client, allocate<PskClientPtr>(gnutls_psk_allocate_client_credentials));
    const gnutls_datum_t data = datum(key->second);
    const int r = gnutls_psk_set_client_credentials(in.psk_client.get(), o.username.c_str(), &data, GNUTLS_PSK_KEY_RAW);
    in.psk_keys.clear();
    if (r < 0) return fail(ErrorKind::kInvalid, "Cannot set PSK client credentials: {}", gnutls_strerror(r));
    return {};
}

Result<> load_anon(TlsCredentials::Impl& in) {
    if (in.options.endpoint == TlsEndpoint::kClient) {
        TRY(in.anon_client, allocate<AnonClientPtr>(gnutls_anon_allocate_client_credentials));
        return {};
    }
    TRY(in.anon_server, allocate<AnonServerPtr>(gnutls_anon_allocate_server_credentials));
    if (in.dh_params) {
        gnutls_anon_set_server_dh_params(in.anon_server.get(), in.dh_params.get());
    } else {
        gnutls_anon_set_server_known_dh_params(in.anon_server.get(), GNUTLS_SEC_PARAM_MEDIUM);
    }
    return {};
}

}  // namespace

Result<std::shared_ptr<const TlsCredentials>> TlsCredentials::load(TlsCredentialsOptions options) {
    auto impl = std::make_unique<Impl>();
    impl->options = std::move(options);
    TRY(impl->priority, make_priority(impl->options));
    TRY(impl->dh_params, load_dh_params(impl->options));
    switch (impl->options.kind) {
        case TlsKind::kX509:
            CHECK_OK(load_x509(*impl));
            break;
        case TlsKind::kPsk:
            CHECK_OK(load_psk(*impl));
            break;
        case TlsKind::kAnon:
            CHECK_OK(load_anon(*impl));
            break;
    }
    impl->options.key_password.clear();
    return std::shared_ptr<const TlsCredentials>(new TlsCredentials(std::move(impl)));
}

TlsCredentials::TlsCredentials(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TlsCredentials::~TlsCredentials() = default;

TlsKind TlsCredentials::kind() const { return impl_->options.kind; }
TlsEndpoint TlsCredentials::endpoint() const { return impl_->options.endpoint; }
bool TlsCredentials::verify_peer() const { return impl_->options.verify_peer; }

}  // namespace gantry::nbd
