// How the request layer cuts requests into pieces.

#pragma once

#include <algorithm>

#include "block/align.h"
#include "block/request.h"

namespace gantry::block {

/// Most bytes that one bounce buffer holds: a multiple of the request alignment.
inline uint64_t bounce_limit(const Limits& l) {
    const uint64_t unit = std::max<uint32_t>(l.request_alignment, 1);
    uint64_t limit = uint64_t{1} << 20;
    if (l.max_transfer) limit = std::min(limit, l.max_transfer);
    return std::max(align_down(limit, unit), unit);
}

/// Length of the piece at `pos` that the driver may get without bouncing, memory permitting; 0 when `pos` or the rest
/// is not aligned.
inline uint64_t direct_length(const Limits& l, uint64_t pos, uint64_t end) {
    const uint64_t unit = std::max<uint32_t>(l.request_alignment, 1);
    if (pos & (unit - 1)) return 0;
    uint64_t length = end - pos;
    if (l.max_transfer) length = std::min(length, l.max_transfer);
    return align_down(length, unit);
}

}  // namespace gantry::block
