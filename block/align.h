// Arithmetic of alignments (powers of two).

#pragma once

#include <cstdint>

#include "runtime/iovec.h"

namespace gantry::block {

constexpr uint64_t align_down(uint64_t value, uint64_t unit) { return value & ~(unit - 1); }
/// `value` + `unit` must not overflow.
constexpr uint64_t align_up(uint64_t value, uint64_t unit) { return (value + unit - 1) & ~(unit - 1); }

/// Every base and length of the list is a multiple of `unit`.
inline bool memory_aligned(const IoVec& iov, uint32_t unit) {
    uintptr_t bits = 0;
    for (uint32_t i = 0; i < iov.count; i++) {
        bits |= reinterpret_cast<uintptr_t>(iov.data[i].iov_base) | iov.data[i].iov_len;
    }
    return (bits & (unit - 1)) == 0;
}

/// Offsets are signed 64-bit on disk and on the wire; nothing lies above.
constexpr uint64_t kMaxOffset = INT64_MAX & ~uint64_t{0xfffff};

}  // namespace gantry::block
