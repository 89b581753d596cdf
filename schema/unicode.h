// UTF-8 as the QMP dialect takes it: strict, but C0 80 is U+0000 and noncharacters are refused.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace gantry::schema {

/// Neither a surrogate nor a noncharacter nor above U+10FFFF.
bool is_unicode_character(uint32_t code);

struct DecodedCharacter {
    uint32_t code = 0;
    size_t length = 0;  // bytes to skip, at least 1, also when not valid
    bool valid = false;
};

/// The first character of `text`, which must not be empty.
DecodedCharacter decode_utf8(std::string_view text);

/// Writes at most 4 bytes, returns how many.
size_t encode_utf8(uint32_t code, char* out);

}  // namespace gantry::schema
