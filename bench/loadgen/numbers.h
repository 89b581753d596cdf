#pragma once

#include <cstdint>
#include <string_view>

#include "bench/loadgen/outcome.h"

namespace gantry::bench {

/// The value of an option that is a number of bytes or of things: 4096, 4k, 1M, 2G. `option` is its name without
/// dashes.
Outcome<uint64_t> parse_size(std::string_view option, std::string_view text, uint64_t least, uint64_t most);

/// The value of an option that is a time, in nanoseconds: 1.5, 2s, 200ms; a millisecond to a day.
Outcome<int64_t> parse_time(std::string_view option, std::string_view text);

template <typename T>
Outcome<> assign(Outcome<uint64_t> parsed, T& to) {
    if (!parsed) return std::unexpected(std::move(parsed.error()));
    to = static_cast<T>(*parsed);
    return {};
}

inline Outcome<> assign_time(Outcome<int64_t> parsed, int64_t& to) {
    if (!parsed) return std::unexpected(std::move(parsed.error()));
    to = *parsed;
    return {};
}

}  // namespace gantry::bench
