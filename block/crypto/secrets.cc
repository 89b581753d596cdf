#include "block/crypto/secrets.h"

#include <fcntl.h>
#include <linux/keyctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

#include "block/crypto/cipher.h"
#include "runtime/blocking_pool.h"
#include "runtime/unique_fd.h"
#include "schema/options.h"

namespace gantry::block::crypto {

namespace {

constexpr size_t kMaxBytes = size_t{1} << 20;
constexpr std::string_view kCredential = "credential:";

/// The value of a base64 digit; -1: none.
int digit(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    if (c == '+') return 62;
    if (c == '/') return 63;
    return -1;
}

/// White space between the digits (a line end of the file) is no error.
Result<SecretBytes> from_base64(std::string_view text) {
    SecretBytes out(text.size() / 4 * 3 + 3);
    size_t used = 0, digits = 0, padding = 0;
    uint32_t bits = 0;
    const auto invalid = [] { return fail(ErrorKind::kInvalid, "Base64 data contains invalid characters"); };
    for (const char c : text) {
        if (c == '\n' || c == '\r' || c == ' ' || c == '\t') continue;
        if (c == '=') {
            padding++;
            continue;
        }
        const int value = digit(c);
        if (value < 0 || padding) return invalid();
        bits = (bits << 6) | static_cast<uint32_t>(value);
        if (++digits % 4 == 0) {
            for (const int shift : {16, 8, 0}) out.data()[used++] = static_cast<uint8_t>(bits >> shift);
            bits = 0;
        }
    }
    const size_t rest = digits % 4;
    if (rest == 1 || (padding && padding != (4 - rest) % 4)) {
        return fail(ErrorKind::kInvalid, "Base64 data is not valid; it ends in the middle of a byte");
    }
    if (rest >= 2) out.data()[used++] = static_cast<uint8_t>(bits >> (rest == 2 ? 4 : 10));
    if (rest == 3) out.data()[used++] = static_cast<uint8_t>(bits >> 2);
    return SecretBytes(std::span<const uint8_t>(out.data(), used));
}

Result<std::string> secret_path(const std::string& name) {
    if (!name.starts_with(kCredential)) return name;
    const std::string id = name.substr(kCredential.size());
    const char* directory = std::getenv("CREDENTIALS_DIRECTORY");
    if (!directory || !*directory) {
        return fail(ErrorKind::kNotFound,
                    "Unable to read {}: the service manager has passed no credentials (LoadCredential=)", name);
    }
    if (id.empty() || id == "." || id == ".." || id.find('/') != std::string::npos) {
        return fail(ErrorKind::kInvalid, "Unable to read {}: '{}' is not the name of a credential", name, id);
    }
    return fmt::format("{}/{}", directory, id);
}

/// May block.
Result<SecretBytes> read_secret(const std::string& name) {
    TRY(const std::string path, secret_path(name));
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY));
    if (!fd) return fail_errno(errno, "Unable to read {}: Failed to open file \"{}\"", name, path);
    SecretBytes room(kMaxBytes + 1);
    size_t used = 0;
    while (used < room.size()) {
        const ssize_t got = ::read(fd.get(), room.data() + used, room.size() - used);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail_errno(errno, "Unable to read {}: Error reading file \"{}\"", name, path);
        if (got == 0) return SecretBytes(std::span<const uint8_t>(room.data(), used));
        used += static_cast<size_t>(got);
    }
    return fail(ErrorKind::kTooLarge, "Unable to read {}: the file is larger than {} bytes, no secret is", name,
                kMaxBytes);
}

Result<SecretBytes> read_key(int64_t serial) {
    if (serial == 0) return fail(ErrorKind::kInvalid, "'serial' should not be equal to 0");
    const auto id = static_cast<uint32_t>(serial);
    SecretBytes room(kMaxBytes);
    const long got = ::syscall(SYS_keyctl, KEYCTL_READ, id, room.data(), room.size());
    if (got < 0) return fail_errno(errno, "Unable to read serial key {:08x}", id);
    if (static_cast<size_t>(got) > room.size()) {
        return fail(ErrorKind::kTooLarge,
                    "Unable to read serial key {:08x}: it has {} bytes, no secret is longer than {}", id, got,
                    room.size());
    }
    return SecretBytes(std::span<const uint8_t>(room.data(), static_cast<size_t>(got)));
}

bool is_utf8(std::span<const uint8_t> bytes) {
    for (size_t i = 0; i < bytes.size();) {
        const uint8_t lead = bytes[i];
        const size_t length = lead < 0x80 ? 1 : lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
        if (lead == 0 || (lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || bytes.size() - i < length) return false;
        uint32_t code = length == 1 ? lead : lead & (0x7fu >> length);
        for (size_t k = 1; k < length; k++) {
            if ((bytes[i + k] & 0xc0) != 0x80) return false;
            code = (code << 6) | (bytes[i + k] & 0x3fu);
        }
        if ((length == 3 && code < 0x800) || (length == 4 && code < 0x10000) || code > 0x10ffff ||
            (code >= 0xd800 && code < 0xe000)) {
            return false;
        }
        i += length;
    }
    return true;
}

}  // namespace

Task<Result<>> Secrets::add(json::object options) {
    const schema::Options o(options);
    const std::string id = o.str("id");
    SecretBytes raw;
    if (o.str("qom-type") == "secret_keyring") {
        const int64_t serial = o.integer("serial");
        auto read = co_await run_blocking([serial] { return read_key(serial); });
        CO_TRY(raw, std::move(read));
    } else if (o.has("file")) {
        if (o.has("data")) co_return fail(ErrorKind::kInvalid, "'file' and 'data' are mutually exclusive");
        const std::string file = o.str("file");
        auto read = co_await run_blocking([&file] { return read_secret(file); });
        CO_TRY(raw, std::move(read));
    } else {
        json::value* data = options.if_contains("data");
        if (!data) co_return fail(ErrorKind::kInvalid, "Either 'file' or 'data' must be provided");
        json::string& text = data->as_string();
        raw = SecretBytes(std::string_view(text.data(), text.size()));
        wipe(text.data(), text.size());
    }
    CO_TRY(SecretBytes secret, decode(options, std::move(raw)));
    if (has(id) || (is_other_ && is_other_(id))) {  // another monitor was faster
        co_return fail(ErrorKind::kExists, "attempt to add duplicate property '{}' to object (type 'container')", id);
    }
    secrets_.emplace(id, std::move(secret));
    co_return Result<>();
}

Result<SecretBytes> Secrets::decode(const json::object& options, SecretBytes raw) const {
    const schema::Options o(options);
    if (o.str("format") == "base64") {
        TRY(raw, from_base64(raw.text()));
    }
    if (!o.has("keyid")) return raw;
    TRY(const SecretBytes key, lookup(o.str("keyid")));
    if (!o.has("iv")) return fail(ErrorKind::kInvalid, "IV is required to decrypt secret");
    TRY(const SecretBytes iv, from_base64(o.str("iv")));
    CHECK_OK(decrypt_aes256_cbc(key.span(), iv.span(), raw.span()));
    if (raw.empty()) return raw;
    // PKCS#7: as many bytes of padding as each of them says.
    const size_t padding = raw.data()[raw.size() - 1];
    if (padding == 0 || padding > 16 || padding > raw.size()) {
        return fail(ErrorKind::kInvalid, "Incorrect number of padding bytes ({}) found on decrypted data", padding);
    }
    return SecretBytes(std::span<const uint8_t>(raw.data(), raw.size() - padding));
}

Result<SecretBytes> Secrets::lookup(std::string_view id) const {
    const auto it = secrets_.find(id);
    if (it != secrets_.end()) return it->second.copy();
    if (is_other_ && is_other_(id)) return fail(ErrorKind::kInvalid, "Object with id '{}' is not a secret", id);
    return fail(ErrorKind::kNotFound, "No secret with id '{}'", id);
}

Result<SecretBytes> Secrets::lookup_text(std::string_view id) const {
    TRY(SecretBytes secret, lookup(id));
    if (!is_utf8(secret.span())) return fail(ErrorKind::kInvalid, "Data from secret {} is not valid UTF-8", id);
    return secret;
}

}  // namespace gantry::block::crypto
