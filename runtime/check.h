// CHECK: invariants that stay checked in release builds. Never for input.

#pragma once

#include <cstdio>
#include <cstdlib>

namespace gantry {

[[noreturn]] inline void check_failed(const char* file, int line, const char* expr, const char* why) {
    std::fprintf(stderr, "%s:%d: broken invariant (%s): %s\n", file, line, expr, why);
    std::abort();
}

}  // namespace gantry

/// Aborts with `why` when `cond` is false. For lifetime and on-disk invariants of our own making. Headers use this
/// name: in unit tests CHECK is Catch's.
#define GANTRY_CHECK(cond, why)                                     \
    do {                                                            \
        if (!(cond)) [[unlikely]]                                   \
            ::gantry::check_failed(__FILE__, __LINE__, #cond, why); \
    } while (0)

/// The short name, for .cc files.
#ifndef TWOBLUECUBES_SINGLE_INCLUDE_CATCH_HPP_INCLUDED
#define CHECK(cond, why) GANTRY_CHECK(cond, why)
#endif
