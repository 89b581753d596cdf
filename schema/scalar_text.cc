#include "schema/scalar_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace gantry::schema {

namespace {

std::string_view skip_blanks(std::string_view text) {
    const size_t first = text.find_first_not_of(" \t\n\v\f\r");
    return first == text.npos ? std::string_view() : text.substr(first);
}

/// All of `text` as digits in the base its prefix says.
std::optional<uint64_t> parse_digits(std::string_view text) {
    int base = 10;
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
        base = 16;
        text.remove_prefix(2);
    } else if (text.size() > 1 && text[0] == '0') {
        base = 8;
        text.remove_prefix(1);
    }
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
    if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
    return value;
}

int suffix_shift(char c) {
    switch (c) {
        case 'b':
        case 'B':
            return 0;
        case 'k':
        case 'K':
            return 10;
        case 'm':
        case 'M':
            return 20;
        case 'g':
        case 'G':
            return 30;
        case 't':
        case 'T':
            return 40;
        case 'p':
        case 'P':
            return 50;
        case 'e':
        case 'E':
            return 60;
        default:
            return -1;
    }
}

}  // namespace

std::optional<bool> parse_bool_text(std::string_view text) {
    for (std::string_view yes : {"on", "yes", "true", "y"}) {
        if (text == yes) return true;
    }
    for (std::string_view no : {"off", "no", "false", "n"}) {
        if (text == no) return false;
    }
    return std::nullopt;
}

std::optional<int64_t> parse_signed_text(std::string_view text) {
    text = skip_blanks(text);
    const bool negative = text.starts_with('-');
    if (negative || text.starts_with('+')) text.remove_prefix(1);
    const auto magnitude = parse_digits(text);
    constexpr uint64_t kTop = uint64_t{1} << 63;
    if (!magnitude || *magnitude > (negative ? kTop : kTop - 1)) return std::nullopt;
    return negative ? static_cast<int64_t>(-*magnitude) : static_cast<int64_t>(*magnitude);
}

std::optional<uint64_t> parse_unsigned_text(std::string_view text) {
    text = skip_blanks(text);
    if (text.starts_with('+')) text.remove_prefix(1);
    return parse_digits(text);
}

std::optional<uint64_t> parse_size_text(std::string_view text) {
    if (text.starts_with("0x") || text.starts_with("0X")) return parse_digits(text);
    uint64_t whole = 0;
    const char* const end = text.data() + text.size();
    auto [at, error] = std::from_chars(text.data(), end, whole);
    if (error != std::errc()) return std::nullopt;
    double fraction = 0;
    if (at != end && *at == '.') {
        const auto r = std::from_chars(at, end, fraction, std::chars_format::fixed);
        if (r.ec != std::errc()) return std::nullopt;
        at = r.ptr;
    }
    int shift = 0;
    if (at != end) {
        shift = suffix_shift(*at++);
        if (shift < 0 || at != end) return std::nullopt;
    }
    if (fraction != 0 && shift == 0) return std::nullopt;
    if (whole > std::numeric_limits<uint64_t>::max() >> shift) return std::nullopt;
    const auto rest = static_cast<uint64_t>(std::ldexp(fraction, shift));
    return (whole << shift) + std::min(rest, (uint64_t{1} << shift) - 1);  // a fraction may have been rounded up to 1
}

std::optional<double> parse_number_text(std::string_view text) {
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
    return value;
}

}  // namespace gantry::schema
