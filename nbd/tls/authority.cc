#include "nbd/tls/authority.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gnutls/crypto.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <ctime>
#include <utility>

#include "nbd/tls/certificates.h"
#include "nbd/tls/gnutls_handles.h"
#include "runtime/unique_fd.h"

namespace gantry::nbd {

namespace {

/// Clocks of two machines differ.
constexpr time_t kClockSlack = 3600;
constexpr size_t kMaxPem = 1u << 20;

/// Calls of GnuTLS one after the other; the first failure counts.
class Calls {
  public:
    Calls& operator()(int r) {
        if (first_ >= 0 && r < 0) first_ = r;
        return *this;
    }
    Result<> result(std::string_view what) const {
        if (first_ >= 0) return {};
        return fail(ErrorKind::kIo, "{}: {}", what, gnutls_strerror(first_));
    }

  private:
    int first_ = 0;
};

struct Pem {
    std::string name, text;
    bool is_private = false;
    ~Pem() { block::crypto::wipe(text.data(), text.size()); }
};

/// Writes all or none of the files.
Result<std::vector<std::string>> write_files(const std::string& dir, const std::vector<Pem>& files) {
    if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) return fail_errno(errno, "Could not make '{}'", dir);
    for (const Pem& file : files) {
        const std::string path = fmt::format("{}/{}", dir, file.name);
        if (::faccessat(AT_FDCWD, path.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
            return fail(ErrorKind::kExists, "'{}' exists already; name another directory, or move the old files away",
                        path);
        }
    }
    std::vector<std::string> written;
    for (const Pem& file : files) {
        const std::string path = fmt::format("{}/{}", dir, file.name);
        const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, file.is_private ? 0600 : 0644));
        int error = fd ? 0 : errno;
        size_t have = 0;
        while (!error && have < file.text.size()) {
            const ssize_t n = ::write(fd.get(), file.text.data() + have, file.text.size() - have);
            if (n < 0 && errno != EINTR) error = errno;
            if (n > 0) have += static_cast<size_t>(n);
        }
        if (fd) written.push_back(path);
        if (error) {
            for (const std::string& made : written) ::unlink(made.c_str());
            return fail_errno(error, "Could not write '{}'", path);
        }
    }
    return written;
}

Result<std::string> read_pem(const std::string& path) {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd) return fail_errno(errno, "Could not open '{}'", path);
    std::string text(kMaxPem, '\0');
    const ssize_t n = ::read(fd.get(), text.data(), text.size());
    if (n < 0) return fail_errno(errno, "Could not read '{}'", path);
    text.resize(static_cast<size_t>(n));
    return text;
}

std::string take(gnutls_datum_t& data) {
    std::string text(reinterpret_cast<char*>(data.data), data.size);
    block::crypto::wipe(data.data, data.size);
    gnutls_free(data.data);
    return text;
}

struct Pair {
    PrivateKeyPtr key;
    CertificatePtr certificate;
};

Result<std::string> key_pem(gnutls_x509_privkey_t key) {
    gnutls_datum_t data{};
    const int r = gnutls_x509_privkey_export2_pkcs8(key, GNUTLS_X509_FMT_PEM, nullptr, GNUTLS_PKCS_PLAIN, &data);
    if (r < 0) return fail(ErrorKind::kIo, "Could not write a private key: {}", gnutls_strerror(r));
    return take(data);
}
Result<std::string> certificate_pem(gnutls_x509_crt_t certificate) {
    gnutls_datum_t data{};
    const int r = gnutls_x509_crt_export2(certificate, GNUTLS_X509_FMT_PEM, &data);
    if (r < 0) return fail(ErrorKind::kIo, "Could not write a certificate: {}", gnutls_strerror(r));
    return take(data);
}

void set_name(gnutls_x509_crt_t c, const std::string& name, Calls& calls) {
    std::array<unsigned char, 16> address;
    for (const auto& [family, size] : {std::pair{AF_INET, 4u}, std::pair{AF_INET6, 16u}}) {
        if (::inet_pton(family, name.c_str(), address.data()) != 1) continue;
        calls(gnutls_x509_crt_set_subject_alt_name(c, GNUTLS_SAN_IPADDRESS, address.data(), size, GNUTLS_FSAN_APPEND));
        return;
    }
    calls(gnutls_x509_crt_set_subject_alt_name(c, GNUTLS_SAN_DNSNAME, name.data(), static_cast<unsigned>(name.size()),
                                               GNUTLS_FSAN_APPEND));
}

/// `issuer` null: an authority, signed by itself.
Result<Pair> make_pair(const std::string& common_name, CertificateUse use, const std::vector<std::string>& names,
                       unsigned days, const Pair* issuer) {
    if (common_name.empty() || common_name.size() > 64) {
        return fail(ErrorKind::kInvalid, "'{}' cannot be the name in a certificate; it takes 1 to 64 bytes",
                    common_name);
    }
    gnutls_x509_privkey_t key = nullptr;
    gnutls_x509_crt_t c = nullptr;
    Calls calls;
    calls(gnutls_x509_privkey_init(&key))(gnutls_x509_crt_init(&c));
    Pair pair{PrivateKeyPtr(key), CertificatePtr(c)};
    CHECK_OK(calls.result("Could not make a key"));
    std::array<unsigned char, 16> serial;
    size_t key_id_size = 0;
    calls(gnutls_x509_privkey_generate(key, GNUTLS_PK_ECDSA, GNUTLS_CURVE_TO_BITS(GNUTLS_ECC_CURVE_SECP256R1), 0));
    calls(gnutls_rnd(GNUTLS_RND_NONCE, serial.data(), serial.size()));
    serial[0] = static_cast<unsigned char>((serial[0] & 0x7f) | 0x40);  // positive, of a fixed length
    const time_t now = ::time(nullptr);
    calls(gnutls_x509_crt_set_version(c, 3));
    calls(gnutls_x509_crt_set_serial(c, serial.data(), serial.size()));
    calls(gnutls_x509_crt_set_activation_time(c, now - kClockSlack));
    calls(gnutls_x509_crt_set_expiration_time(c, now + static_cast<time_t>(days) * 86400));
    calls(gnutls_x509_crt_set_dn_by_oid(c, GNUTLS_OID_X520_COMMON_NAME, 0, common_name.data(),
                                        static_cast<unsigned>(common_name.size())));
    calls(gnutls_x509_crt_set_key(c, key));
    const bool authority = use == CertificateUse::kAuthority;
    calls(gnutls_x509_crt_set_basic_constraints(c, authority, -1));
    calls(gnutls_x509_crt_set_key_usage(
        c, authority ? GNUTLS_KEY_KEY_CERT_SIGN | GNUTLS_KEY_CRL_SIGN : GNUTLS_KEY_DIGITAL_SIGNATURE));
    if (!authority) {
        const char* purpose = use == CertificateUse::kServer ? GNUTLS_KP_TLS_WWW_SERVER : GNUTLS_KP_TLS_WWW_CLIENT;
        calls(gnutls_x509_crt_set_key_purpose_oid(c, purpose, 0));
    }
    for (const std::string& name : names) set_name(c, name, calls);
    calls(gnutls_x509_crt_get_key_id(c, GNUTLS_KEYID_USE_SHA1, nullptr, &key_id_size) == GNUTLS_E_SHORT_MEMORY_BUFFER
              ? 0
              : GNUTLS_E_INTERNAL_ERROR);
    std::string id(key_id_size, '\0');
    calls(gnutls_x509_crt_get_key_id(c, GNUTLS_KEYID_USE_SHA1, reinterpret_cast<unsigned char*>(id.data()),
                                     &key_id_size));
    calls(gnutls_x509_crt_set_subject_key_id(c, id.data(), key_id_size));
    if (issuer) {
        std::array<unsigned char, 64> issuer_id;
        size_t issuer_size = issuer_id.size();
        if (gnutls_x509_crt_get_subject_key_id(issuer->certificate.get(), issuer_id.data(), &issuer_size, nullptr) ==
            0) {
            calls(gnutls_x509_crt_set_authority_key_id(c, issuer_id.data(), issuer_size));
        }
    }
    gnutls_x509_crt_t signer = issuer ? issuer->certificate.get() : c;
    calls(gnutls_x509_crt_sign2(c, signer, issuer ? issuer->key.get() : key, GNUTLS_DIG_SHA256, 0));
    CHECK_OK(calls.result(fmt::format("Could not make the certificate of '{}'", common_name)));
    return pair;
}

Result<> append(std::vector<Pem>& files, const Pair& pair, const std::string& prefix) {
    TRY(std::string key, key_pem(pair.key.get()));
    TRY(std::string certificate, certificate_pem(pair.certificate.get()));
    files.push_back({prefix + "-cert.pem", std::move(certificate), false});
    files.push_back({prefix + "-key.pem", std::move(key), true});
    return {};
}

}  // namespace

Result<std::vector<std::string>> make_certificates(const TlsFilesOptions& o) {
    if (o.server_names.empty()) return fail(ErrorKind::kInvalid, "a server certificate needs a name");
    const std::string authority_name = fmt::format("Gantry CA of {}", o.server_names.front()).substr(0, 64);
    TRY(const Pair authority, make_pair(authority_name, CertificateUse::kAuthority, {}, o.days, nullptr));
    TRY(const Pair server,
        make_pair(o.server_names.front().substr(0, 64), CertificateUse::kServer, o.server_names, o.days, &authority));
    TRY(const Pair client, make_pair(o.client_name, CertificateUse::kClient, {}, o.days, &authority));
    std::vector<Pem> files;
    files.reserve(6);
    CHECK_OK(append(files, authority, "ca"));
    CHECK_OK(append(files, server, "server"));
    CHECK_OK(append(files, client, "client"));
    return write_files(o.dir, files);
}

Result<std::vector<std::string>> make_client_certificate(const TlsFilesOptions& o, const std::string& client_dir) {
    const std::string ca_path = o.dir + "/ca-cert.pem", key_path = o.dir + "/ca-key.pem";
    TRY(std::string ca_text, read_pem(ca_path));
    Pem key_text;
    TRY(key_text.text, read_pem(key_path));
    TRY(auto authorities, import_certificates(ca_text, ca_path));
    CHECK_OK(check_own_certificate(authorities.front().get(), ca_path, CertificateUse::kAuthority));
    gnutls_x509_privkey_t key = nullptr;
    if (gnutls_x509_privkey_init(&key) < 0) return fail(ErrorKind::kNoMemory, "no memory for a key");
    Pair authority{PrivateKeyPtr(key), std::move(authorities.front())};
    const gnutls_datum_t data{reinterpret_cast<unsigned char*>(key_text.text.data()),
                              static_cast<unsigned>(key_text.text.size())};
    const int r = gnutls_x509_privkey_import2(key, &data, GNUTLS_X509_FMT_PEM, nullptr, 0);
    if (r < 0) return fail(ErrorKind::kInvalid, "Could not read '{}': {}", key_path, gnutls_strerror(r));
    TRY(const Pair client, make_pair(o.client_name, CertificateUse::kClient, {}, o.days, &authority));
    std::vector<Pem> files;
    files.reserve(3);
    files.push_back({"ca-cert.pem", std::move(ca_text), false});
    CHECK_OK(append(files, client, "client"));
    return write_files(client_dir, files);
}

Result<std::vector<std::string>> make_psk_file(const std::string& dir, const std::vector<std::string>& identities) {
    std::vector<Pem> files(1);
    files[0].name = "keys.psk";
    files[0].is_private = true;
    for (const std::string& identity : identities) {
        if (identity.empty() || identity.size() > 128 || identity.find_first_of(":\n\r#") != std::string::npos) {
            return fail(ErrorKind::kInvalid, "'{}' is no PSK identity: 1 to 128 bytes without ':', '#' and line ends",
                        identity);
        }
        std::array<unsigned char, 32> key;
        const int r = gnutls_rnd(GNUTLS_RND_KEY, key.data(), key.size());
        if (r < 0) return fail(ErrorKind::kIo, "Could not make a key: {}", gnutls_strerror(r));
        files[0].text += identity + ":";
        for (const unsigned char byte : key) files[0].text += fmt::format("{:02x}", byte);
        files[0].text += '\n';
        block::crypto::wipe(key.data(), key.size());
    }
    return write_files(dir, files);
}

}  // namespace gantry::nbd
