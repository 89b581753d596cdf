// Scalars written as text on the command line.

#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace gantry::schema {

/// on off yes no true false y n, in this case only.
std::optional<bool> parse_bool_text(std::string_view text);

/// C notation (decimal, 0x hexadecimal, 0 octal), an optional sign, leading blanks; nothing may follow.
std::optional<int64_t> parse_signed_text(std::string_view text);
/// The same without a minus sign.
std::optional<uint64_t> parse_unsigned_text(std::string_view text);

/// Bytes: a number with an optional suffix b k M G T P E (powers of 1024, either case), a decimal fraction where there
/// is a suffix above b ("1.5k"; what is below a byte is cut off), or 0x hexadecimal without a suffix.
std::optional<uint64_t> parse_size_text(std::string_view text);

/// A finite decimal number.
std::optional<double> parse_number_text(std::string_view text);

}  // namespace gantry::schema
