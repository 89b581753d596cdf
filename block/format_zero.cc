// FormatNode: zeroes and discard.

#include <algorithm>

#include "block/align.h"
#include "block/format_node.h"
#include "block/zero_data.h"

namespace gantry::block {

Task<Result<>> FormatNode::write_zero_data(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    const ZeroData zeroes;
    for (uint64_t done = 0; done < length;) {
        const uint64_t part = std::min(length - done, ZeroData::kLimit);
        const IoVecSlice slice = zeroes.slice(part);
        CO_CHECK(co_await write_extents(rq, offset + done, slice.view(), flags));
        done += part;
    }
    co_return Result<>();
}

Task<Result<>> FormatNode::do_write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    Pass pass(*this);
    const uint64_t unit = std::max<uint32_t>(limits().zeroes_alignment, 1);
    const uint64_t cluster = std::max<uint64_t>(cluster_size(), unit);
    const uint64_t end = offset + length;
    const uint64_t outer_begin = align_down(offset, unit);
    const uint64_t outer_end = std::min(align_up(end, unit), std::max(size(), end));
    // What becomes zero by mapping: whole units, and an edge unit whose other part reads as zeroes already. Deciding
    // that and doing it is one step, because the claim keeps writers out.
    uint64_t from = outer_begin;
    uint64_t to = outer_end;
    {
        TrackedRequests::Entry claim(claims_, align_down(offset, cluster), align_up(end, cluster), true);
        while (claim.blocked()) co_await claim.turn();
        if (offset != outer_begin) {
            CO_TRY(const bool zero, co_await reads_as_zero(rq, outer_begin, offset));
            if (!zero) from = align_up(offset, unit);
        }
        if (end != outer_end) {
            CO_TRY(const bool zero, co_await reads_as_zero(rq, end, outer_end));
            if (!zero) to = align_down(end, unit);
        }
        if (has(flags, WriteFlags::kNoFallback) && (from > offset || to < end)) {
            co_return fail(ErrorKind::kUnsupported, "node '{}': {} bytes at {} do not fill whole units of {} bytes",
                           name(), length, offset, unit);
        }
        if (from < to) CO_CHECK(co_await zero_mapped(rq, from, to - from, flags));
    }
    const WriteFlags data_flags = flags & WriteFlags::kUnchanged;
    if (from >= to) co_return co_await write_zero_data(rq, offset, length, data_flags);
    if (from > offset) CO_CHECK(co_await write_zero_data(rq, offset, from - offset, data_flags));
    if (to < end) CO_CHECK(co_await write_zero_data(rq, to, end - to, data_flags));
    co_return Result<>();
}

Task<Result<>> FormatNode::do_discard(Request& rq, uint64_t offset, uint64_t length) {
    Pass pass(*this);
    const uint64_t cluster = std::max<uint64_t>({cluster_size(), limits().discard_alignment, 1});
    TrackedRequests::Entry claim(claims_, align_down(offset, cluster), align_up(offset + length, cluster), true);
    while (claim.blocked()) co_await claim.turn();
    co_return co_await discard_mapped(rq, offset, length);
}

}  // namespace gantry::block
