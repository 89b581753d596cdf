// What certificates say, in words: checks of our own files, reasons why a peer's chain is not accepted.

#pragma once

#include <ctime>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nbd/tls/gnutls_handles.h"

namespace gantry::nbd {

/// All certificates of a PEM text; at most 16. `path` is for the error.
Result<std::vector<CertificatePtr>> import_certificates(std::string_view pem, std::string_view path);

inline constexpr std::string_view kNoCertificateName = "(no name)";
std::string certificate_subject(gnutls_x509_crt_t certificate);  // RFC 4514, or kNoCertificateName
std::string certificate_issuer(gnutls_x509_crt_t certificate);
/// Names and addresses a client may verify: "a.example, 10.0.0.1".
std::string certificate_names(gnutls_x509_crt_t certificate);
std::string date_text(time_t when);  // "2026-11-21 18:00:00 UTC"

enum class CertificateUse : uint8_t { kAuthority, kServer, kClient };

/// The load-time checks of spec/nbd.md section 4.3 on one certificate of ours from file `path`.
Result<> check_own_certificate(gnutls_x509_crt_t certificate, std::string_view path, CertificateUse use);
/// Our chain against our authorities, `use` is kServer or kClient.
Result<> check_own_chain(std::span<const CertificatePtr> chain, std::string_view path,
                         std::span<const CertificatePtr> authorities, std::string_view ca_path, CertificateUse use);

/// Why verification gave `status`: a sentence about "the `who` certificate". `ca_names`: subjects of our CA file.
std::string explain_verification(std::span<const CertificatePtr> chain, unsigned status, std::string_view who,
                                 std::string_view ca_file, std::string_view ca_names);

}  // namespace gantry::nbd
