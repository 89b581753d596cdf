#include "bench/loadgen/numbers.h"

#include <charconv>
#include <cmath>
#include <string>
#include <system_error>

namespace gantry::bench {

Outcome<uint64_t> parse_size(std::string_view option, std::string_view text, uint64_t least, uint64_t most) {
    uint64_t value = 0;
    const auto [rest, error] = std::from_chars(text.begin(), text.end(), value);
    std::string_view suffix(rest, static_cast<size_t>(text.end() - rest));
    unsigned shift = 0;
    if (suffix == "k" || suffix == "K") shift = 10;
    if (suffix == "m" || suffix == "M") shift = 20;
    if (suffix == "g" || suffix == "G") shift = 30;
    const bool valid = error == std::errc{} && (suffix.empty() || shift != 0) && value <= (UINT64_MAX >> shift);
    if (!valid || value << shift < least || value << shift > most) {
        return failure("--" + std::string(option) + "=" + std::string(text) + ": expected a number from " +
                       std::to_string(least) + " to " + std::to_string(most) + ", with k, M or G if you like");
    }
    return value << shift;
}

Outcome<int64_t> parse_time(std::string_view option, std::string_view text) {
    double value = 0;
    const auto [rest, error] = std::from_chars(text.begin(), text.end(), value);
    const std::string_view suffix(rest, static_cast<size_t>(text.end() - rest));
    const bool milliseconds = suffix == "ms";
    const double seconds = milliseconds ? value / 1000 : value;
    const bool valid = error == std::errc{} && (milliseconds || suffix.empty() || suffix == "s");
    if (!valid || !std::isfinite(value) || seconds < 0.001 || seconds > 86400) {
        return failure("--" + std::string(option) + "=" + std::string(text) +
                       ": expected seconds (1.5) or milliseconds (200ms), at most a day");
    }
    return static_cast<int64_t>(seconds * 1e9);
}

}  // namespace gantry::bench
