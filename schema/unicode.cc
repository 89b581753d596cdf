#include "schema/unicode.h"

namespace gantry::schema {

bool is_unicode_character(uint32_t code) {
    if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    return (code & 0xfffe) != 0xfffe && (code < 0xfdd0 || code > 0xfdef);
}

DecodedCharacter decode_utf8(std::string_view text) {
    const auto lead = static_cast<unsigned char>(text[0]);
    if (lead < 0x80) return {lead, 1, true};
    if (lead < 0xc0 || lead >= 0xfe) return {0, 1, false};
    // The old forms of five and six bytes are not valid but skipped as one.
    const size_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf8 ? 4 : lead < 0xfc ? 5 : 6;
    uint32_t code = lead & (0x7fu >> length);
    size_t at = 1;
    for (; at < length && at < text.size(); at++) {
        const auto byte = static_cast<unsigned char>(text[at]);
        if ((byte & 0xc0) != 0x80) break;
        code = code << 6 | (byte & 0x3f);
    }
    if (at < length || length > 4) return {0, at, false};
    constexpr uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
    const bool overlong = code < kSmallest[length] && !(code == 0 && length == 2);
    return {code, length, !overlong && is_unicode_character(code)};
}

size_t encode_utf8(uint32_t code, char* out) {
    const auto byte = [](uint32_t value) { return static_cast<char>(value); };
    if (code < 0x80) {
        out[0] = byte(code);
        return 1;
    }
    if (code < 0x800) {
        out[0] = byte(0xc0 | code >> 6);
        out[1] = byte(0x80 | (code & 0x3f));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = byte(0xe0 | code >> 12);
        out[1] = byte(0x80 | (code >> 6 & 0x3f));
        out[2] = byte(0x80 | (code & 0x3f));
        return 3;
    }
    out[0] = byte(0xf0 | code >> 18);
    out[1] = byte(0x80 | (code >> 12 & 0x3f));
    out[2] = byte(0x80 | (code >> 6 & 0x3f));
    out[3] = byte(0x80 | (code & 0x3f));
    return 4;
}

}  // namespace gantry::schema
