#pragma once

#include <expected>
#include <string>
#include <utility>

namespace gantry::bench {

/// What a step of the generator returns: a value, or one sentence for the person who started it.
template <typename T = void>
using Outcome = std::expected<T, std::string>;

inline std::unexpected<std::string> failure(std::string message) { return std::unexpected(std::move(message)); }

}  // namespace gantry::bench

/// Returns the failure of `expression` from the calling function.
#define BENCH_CHECK(expression)                                       \
    do {                                                              \
        if (auto bench_outcome = (expression); !bench_outcome)        \
            return std::unexpected(std::move(bench_outcome.error())); \
    } while (false)
