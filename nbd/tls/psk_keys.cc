#include "nbd/tls/psk_keys.h"

namespace gantry::nbd {

using block::crypto::SecretBytes;

namespace {

constexpr size_t kMaxIdentity = 256, kMaxKey = 512;

int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

}  // namespace

Result<PskKeys> parse_psk_keys(std::string_view text, const std::string& path) {
    PskKeys keys;
    for (unsigned line = 1; !text.empty(); ++line) {
        const size_t end = text.find('\n');
        std::string_view row = text.substr(0, end);
        text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
        if (row.ends_with('\r')) row.remove_suffix(1);
        if (row.empty() || row.starts_with('#')) continue;
        const size_t colon = row.rfind(':');
        const auto wrong = [&](std::string_view what) {
            return fail(ErrorKind::kInvalid, "Cannot load PSK file '{}': line {} {}; a line is IDENTITY:HEXKEY", path,
                        line, what);
        };
        if (colon == std::string_view::npos || colon == 0) return wrong("has no identity");
        const std::string_view identity = row.substr(0, colon), hex = row.substr(colon + 1);
        if (identity.size() > kMaxIdentity) return wrong("has an identity of more than 256 bytes");
        if (hex.size() < 2 || hex.size() % 2 != 0 || hex.size() > 2 * kMaxKey)
            return wrong("has a key of a bad length");
        SecretBytes key(hex.size() / 2);
        for (size_t i = 0; i < key.size(); ++i) {
            const int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);
            if (high < 0 || low < 0) return wrong("has a key that is not hexadecimal");
            key.data()[i] = static_cast<uint8_t>(high * 16 + low);
        }
        // The first of two lines for an identity counts, as in the reference.
        keys.try_emplace(std::string(identity), std::move(key));
    }
    return keys;
}

}  // namespace gantry::nbd
