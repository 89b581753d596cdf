// GnuTLS handles with an owner. Only files of nbd/tls/ include this.

#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "nbd/tls/credentials.h"

namespace gantry::nbd {

template <class T, void (*kFree)(T*)>
struct GnutlsFree {
    void operator()(T* handle) const { kFree(handle); }
};
template <class T, void (*kFree)(T*)>
using GnutlsPtr = std::unique_ptr<T, GnutlsFree<T, kFree>>;

using CertificatePtr = GnutlsPtr<gnutls_x509_crt_int, gnutls_x509_crt_deinit>;
using CrlPtr = GnutlsPtr<gnutls_x509_crl_int, gnutls_x509_crl_deinit>;
using PrivateKeyPtr = GnutlsPtr<gnutls_x509_privkey_int, gnutls_x509_privkey_deinit>;
using DhParamsPtr = GnutlsPtr<gnutls_dh_params_int, gnutls_dh_params_deinit>;
using PriorityPtr = GnutlsPtr<gnutls_priority_st, gnutls_priority_deinit>;
using CertificateCredentialsPtr = GnutlsPtr<gnutls_certificate_credentials_st, gnutls_certificate_free_credentials>;
using AnonServerPtr = GnutlsPtr<gnutls_anon_server_credentials_st, gnutls_anon_free_server_credentials>;
using AnonClientPtr = GnutlsPtr<gnutls_anon_client_credentials_st, gnutls_anon_free_client_credentials>;
using PskServerPtr = GnutlsPtr<gnutls_psk_server_credentials_st, gnutls_psk_free_server_credentials>;
using PskClientPtr = GnutlsPtr<gnutls_psk_client_credentials_st, gnutls_psk_free_client_credentials>;

/// Everything a session is made of; read only once loaded.
struct TlsCredentials::Impl {
    TlsCredentialsOptions options;
    PriorityPtr priority;
    DhParamsPtr dh_params;  // before those that point to it
    CertificateCredentialsPtr x509;
    AnonServerPtr anon_server;
    AnonClientPtr anon_client;
    PskServerPtr psk_server;
    PskClientPtr psk_client;
    std::map<std::string, block::crypto::SecretBytes, std::less<>> psk_keys;  // server: by identity
    std::string ca_names;                                                     // subjects of the CA file, for messages
    std::string ca_file;
};

/// Callbacks of credentials, called in a handshake; the session's pointer is a TlsStream::Session (stream.cc).
int tls_verify_peer(gnutls_session_t session);
int tls_find_psk(gnutls_session_t session, const char* identity, gnutls_datum_t* key);

}  // namespace gantry::nbd
