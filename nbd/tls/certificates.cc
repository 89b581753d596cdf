#include "nbd/tls/certificates.h"

#include <arpa/inet.h>

#include <array>

namespace gantry::nbd {

namespace {

constexpr unsigned kMaxCertificates = 16;
constexpr size_t kMaxNames = 16;  // quoted in a message

template <class Get>
std::string dn_text(Get get) {
    size_t size = 0;
    if (get(nullptr, &size) != GNUTLS_E_SHORT_MEMORY_BUFFER || size > 64u << 10) return std::string(kNoCertificateName);
    std::string text(size, '\0');
    if (get(text.data(), &size) != 0) return std::string(kNoCertificateName);
    while (!text.empty() && text.back() == '\0') text.pop_back();
    if (text.empty()) return std::string(kNoCertificateName);
    // It may come from a stranger, and goes into the log: RFC 4514 allows \XX for any byte.
    std::string out;
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        out += byte < 0x20 || byte == 0x7f ? fmt::format("\\{:02X}", byte) : std::string(1, c);
    }
    return out;
}

std::string_view use_name(CertificateUse use) {
    switch (use) {
        case CertificateUse::kAuthority:
            return "CA";
        case CertificateUse::kServer:
            return "server";
        default:
            return "client";
    }
}

Result<> check_validity(gnutls_x509_crt_t certificate, std::string_view path, CertificateUse use) {
    const time_t now = ::time(nullptr);
    const time_t until = gnutls_x509_crt_get_expiration_time(certificate);
    if (until < now) {
        return fail(ErrorKind::kInvalid, "The {} certificate {} has expired; it was valid until {}", use_name(use),
                    path, date_text(until));
    }
    const time_t from = gnutls_x509_crt_get_activation_time(certificate);
    if (from > now) {
        return fail(ErrorKind::kInvalid,
                    "The {} certificate {} is not yet active; it is valid from {} on (is the clock right?)",
                    use_name(use), path, date_text(from));
    }
    return {};
}

Result<> check_constraints(gnutls_x509_crt_t certificate, std::string_view path, CertificateUse use) {
    unsigned critical = 0;
    const int status = gnutls_x509_crt_get_basic_constraints(certificate, &critical, nullptr, nullptr);
    const bool authority = use == CertificateUse::kAuthority;
    if (status > 0 && !authority) {
        return fail(ErrorKind::kInvalid, "The certificate {} basic constraints show a CA, but we need one for a {}",
                    path, use_name(use));
    }
    if (status == 0 && authority) {
        return fail(ErrorKind::kInvalid, "The certificate {} basic constraints do not show a CA; make it with CA:TRUE",
                    path);
    }
    if (status == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE) {
        if (!authority) return {};
        return fail(ErrorKind::kInvalid, "The certificate {} is missing basic constraints for a CA", path);
    }
    if (status < 0) {
        return fail(ErrorKind::kInvalid, "Unable to query certificate {} basic constraints: {}", path,
                    gnutls_strerror(status));
    }
    return {};
}

Result<> check_usage(gnutls_x509_crt_t certificate, std::string_view path, CertificateUse use) {
    unsigned usage = 0, critical = 0;
    const int status = gnutls_x509_crt_get_key_usage(certificate, &usage, &critical);
    if (status == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE) return {};
    if (status < 0) {
        return fail(ErrorKind::kInvalid, "Unable to query certificate {} key usage: {}", path, gnutls_strerror(status));
    }
    if (!critical) return {};
    if (use == CertificateUse::kAuthority && !(usage & GNUTLS_KEY_KEY_CERT_SIGN)) {
        return fail(ErrorKind::kInvalid, "Certificate {} usage does not permit certificate signing", path);
    }
    // keyEncipherment is of no use since every key exchange is signed (TLS 1.3, or ECDHE and DHE in TLS 1.2).
    if (use != CertificateUse::kAuthority && !(usage & GNUTLS_KEY_DIGITAL_SIGNATURE)) {
        return fail(ErrorKind::kInvalid, "Certificate {} usage does not permit digital signature", path);
    }
    return {};
}

std::vector<std::string> key_purposes(gnutls_x509_crt_t certificate, bool& critical) {
    std::vector<std::string> all;
    critical = false;
    for (unsigned i = 0; i < 32; ++i) {
        std::array<char, 128> oid;
        size_t size = oid.size();
        unsigned is_critical = 0;
        if (gnutls_x509_crt_get_key_purpose_oid(certificate, i, oid.data(), &size, &is_critical) != 0) break;
        critical = critical || is_critical;
        all.emplace_back(oid.data());
    }
    return all;
}

std::string purpose_name(std::string_view oid) {
    if (oid == GNUTLS_KP_TLS_WWW_SERVER) return "TLS servers";
    if (oid == GNUTLS_KP_TLS_WWW_CLIENT) return "TLS clients";
    if (oid == GNUTLS_KP_CODE_SIGNING) return "code signing";
    if (oid == GNUTLS_KP_EMAIL_PROTECTION) return "e-mail";
    return std::string(oid);
}

Result<> check_purpose(gnutls_x509_crt_t certificate, std::string_view path, CertificateUse use) {
    bool critical = false;
    const auto purposes = key_purposes(certificate, critical);
    if (purposes.empty() || !critical) return {};
    const std::string_view wanted =
        use == CertificateUse::kServer ? GNUTLS_KP_TLS_WWW_SERVER : GNUTLS_KP_TLS_WWW_CLIENT;
    std::string listed;
    for (const std::string& oid : purposes) {
        if (oid == wanted || oid == GNUTLS_KP_ANY) return {};
        if (!listed.empty()) listed += ", ";
        listed += purpose_name(oid);
    }
    return fail(ErrorKind::kInvalid, "Certificate {} purpose does not allow use with a TLS {}; it is for {}", path,
                use_name(use), listed);
}

/// The first certificate for which `test` holds, or the leaf.
template <class Test>
gnutls_x509_crt_t first_of(std::span<const CertificatePtr> chain, Test test) {
    for (const CertificatePtr& c : chain) {
        if (test(c.get())) return c.get();
    }
    return chain.front().get();
}

}  // namespace

Result<std::vector<CertificatePtr>> import_certificates(std::string_view pem, std::string_view path) {
    std::array<gnutls_x509_crt_t, kMaxCertificates> raw{};
    unsigned count = kMaxCertificates;
    const gnutls_datum_t data{reinterpret_cast<unsigned char*>(const_cast<char*>(pem.data())),
                              static_cast<unsigned>(pem.size())};
    const int got = gnutls_x509_crt_list_import(raw.data(), &count, &data, GNUTLS_X509_FMT_PEM,
                                                GNUTLS_X509_CRT_LIST_IMPORT_FAIL_IF_EXCEED);
    if (got == GNUTLS_E_SHORT_MEMORY_BUFFER) {
        return fail(ErrorKind::kTooLarge, "Unable to import certificates from {}: more than {}", path,
                    kMaxCertificates);
    }
    if (got < 0) {
        return fail(ErrorKind::kInvalid, "Unable to import certificates from {}: {}", path, gnutls_strerror(got));
    }
    std::vector<CertificatePtr> all;
    for (int i = 0; i < got; ++i) all.emplace_back(raw[static_cast<size_t>(i)]);
    if (all.empty()) return fail(ErrorKind::kInvalid, "Unable to import certificates from {}: there is none", path);
    return all;
}

std::string certificate_subject(gnutls_x509_crt_t c) {
    return dn_text([&](char* text, size_t* size) { return gnutls_x509_crt_get_dn(c, text, size); });
}
std::string certificate_issuer(gnutls_x509_crt_t c) {
    return dn_text([&](char* text, size_t* size) { return gnutls_x509_crt_get_issuer_dn(c, text, size); });
}

std::string certificate_names(gnutls_x509_crt_t certificate) {
    std::string all;
    const auto add = [&](std::string_view name) {
        if (!all.empty()) all += ", ";
        for (const char c : name.substr(0, 255)) all += c >= 0x20 && c < 0x7f ? c : '?';
    };
    for (unsigned i = 0; i < kMaxNames; ++i) {
        std::array<char, 1024> value;
        size_t size = value.size();
        const int type = gnutls_x509_crt_get_subject_alt_name(certificate, i, value.data(), &size, nullptr);
        if (type == GNUTLS_E_REQUESTED_DATA_NOT_AVAILABLE) break;
        if (type == GNUTLS_SAN_DNSNAME) {
            add({value.data(), size});
        } else if (type == GNUTLS_SAN_IPADDRESS && (size == 4 || size == 16)) {
            std::array<char, INET6_ADDRSTRLEN> text;
            if (::inet_ntop(size == 4 ? AF_INET : AF_INET6, value.data(), text.data(), text.size())) add(text.data());
        }
    }
    if (!all.empty()) return all;
    std::array<char, 256> name;
    size_t size = name.size();
    if (gnutls_x509_crt_get_dn_by_oid(certificate, GNUTLS_OID_X520_COMMON_NAME, 0, 0, name.data(), &size) == 0) {
        add({name.data(), size});
    }
    return all.empty() ? "no name" : all;
}

std::string date_text(time_t when) {
    tm parts{};
    ::gmtime_r(&when, &parts);
    std::array<char, 64> text;
    return {text.data(), ::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S UTC", &parts)};
}

Result<> check_own_certificate(gnutls_x509_crt_t certificate, std::string_view path, CertificateUse use) {
    CHECK_OK(check_validity(certificate, path, use));
    CHECK_OK(check_constraints(certificate, path, use));
    CHECK_OK(check_usage(certificate, path, use));
    if (use != CertificateUse::kAuthority) CHECK_OK(check_purpose(certificate, path, use));
    return {};
}

Result<> check_own_chain(std::span<const CertificatePtr> chain, std::string_view path,
                         std::span<const CertificatePtr> authorities, std::string_view ca_path, CertificateUse use) {
    std::vector<gnutls_x509_crt_t> ours, trusted;
    std::string ca_names;
    for (const CertificatePtr& c : chain) ours.push_back(c.get());
    for (const CertificatePtr& c : authorities) {
        trusted.push_back(c.get());
        if (!ca_names.empty()) ca_names += "', '";
        ca_names += certificate_subject(c.get());
    }
    unsigned status = 0;
    const int r = gnutls_x509_crt_list_verify(ours.data(), static_cast<int>(ours.size()), trusted.data(),
                                              static_cast<int>(trusted.size()), nullptr, 0, 0, &status);
    if (r < 0) {
        return fail(ErrorKind::kInvalid, "Unable to verify {} certificate {} against CA certificate {}: {}",
                    use_name(use), path, ca_path, gnutls_strerror(r));
    }
    if (status == 0) return {};
    return fail(ErrorKind::kInvalid, "Our own certificate {} failed validation against {}: {}", path, ca_path,
                explain_verification(chain, status, use_name(use), ca_path, ca_names));
}

std::string explain_verification(std::span<const CertificatePtr> chain, unsigned status, std::string_view who,
                                 std::string_view ca_file, std::string_view ca_names) {
    if (chain.empty()) return fmt::format("the {} sent no certificate", who);
    const time_t now = ::time(nullptr);
    gnutls_x509_crt_t leaf = chain.front().get();
    const auto named = [&](gnutls_x509_crt_t c) {
        return fmt::format("the {} certificate '{}'", who, certificate_subject(c));
    };
    if (status & GNUTLS_CERT_REVOKED) return fmt::format("{} has been revoked", named(leaf));
    if (status & GNUTLS_CERT_EXPIRED) {
        gnutls_x509_crt_t c = first_of(chain, [&](auto x) { return gnutls_x509_crt_get_expiration_time(x) < now; });
        const time_t until = gnutls_x509_crt_get_expiration_time(c);
        if (until >= now) return fmt::format("a certificate in {}, which issued {}, has expired", ca_file, named(leaf));
        return fmt::format("{} expired on {}", named(c), date_text(until));
    }
    if (status & GNUTLS_CERT_NOT_ACTIVATED) {
        gnutls_x509_crt_t c = first_of(chain, [&](auto x) { return gnutls_x509_crt_get_activation_time(x) > now; });
        return fmt::format("{} is not valid before {}", named(c), date_text(gnutls_x509_crt_get_activation_time(c)));
    }
    if (status & GNUTLS_CERT_SIGNER_NOT_CA) {
        return fmt::format("the issuer '{}' of {} is no certificate authority (CA:FALSE)",
                           certificate_issuer(chain.back().get()), named(chain.back().get()));
    }
    if (status & GNUTLS_CERT_SIGNER_NOT_FOUND) {
        return fmt::format("{} does not have a known issuer: it was issued by '{}', and {} has '{}'", named(leaf),
                           certificate_issuer(chain.back().get()), ca_file, ca_names);
    }
    if (status & GNUTLS_CERT_SIGNATURE_FAILURE) {
        return fmt::format("the signature of {} is wrong: '{}' of {} did not make it", named(leaf),
                           certificate_issuer(leaf), ca_file);
    }
    if (status & GNUTLS_CERT_INSECURE_ALGORITHM) return fmt::format("{} uses an insecure algorithm", named(leaf));
    if (status & GNUTLS_CERT_PURPOSE_MISMATCH) {
        bool critical = false;
        std::string listed;
        for (const std::string& oid : key_purposes(leaf, critical)) {
            listed += (listed.empty() ? "" : ", ") + purpose_name(oid);
        }
        return fmt::format("{} must not be used by a {}; it is for {}", named(leaf), who,
                           listed.empty() ? "something else" : listed);
    }
    if (status & (GNUTLS_CERT_REVOCATION_DATA_SUPERSEDED | GNUTLS_CERT_REVOCATION_DATA_ISSUED_IN_FUTURE)) {
        return fmt::format("the revocation list for {} is out of date: renew ca-crl.pem", named(leaf));
    }
    if (status & GNUTLS_CERT_SIGNER_CONSTRAINTS_FAILURE) {
        return fmt::format("the issuer '{}' may not sign {} (key usage or name constraints)", certificate_issuer(leaf),
                           named(leaf));
    }
    gnutls_datum_t text{};
    std::string out = fmt::format("{} is not trusted", named(leaf));
    if (gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &text, 0) == 0) {
        out += fmt::format(": {}", std::string_view(reinterpret_cast<char*>(text.data), text.size));
        gnutls_free(text.data);
    }
    return out;
}

}  // namespace gantry::nbd
