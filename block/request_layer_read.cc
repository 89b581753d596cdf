// Reads that do not fit the driver's limits, and block status.

#include <algorithm>

#include "block/align.h"
#include "block/request_layer.h"
#include "block/request_pieces.h"
#include "runtime/buffer.h"

namespace gantry::block {

Task<Result<>> RequestLayer::read(Node& n, Request& rq, uint64_t offset, IoVec iov) {
    if (offset > kMaxOffset || iov.bytes > kMaxOffset - offset) {
        co_return fail(ErrorKind::kInvalid, "node '{}': read of {} bytes at {} is out of range", n.name_, iov.bytes,
                       offset);
    }
    const uint64_t size = n.size();
    const uint64_t inside = offset >= size ? 0 : std::min<uint64_t>(iov.bytes, size - offset);
    if (inside < iov.bytes) fill_iovec(iov, inside, iov.bytes - inside);

    const Limits& l = n.limits_;
    const uint64_t unit = std::max<uint32_t>(l.request_alignment, 1);
    const uint64_t end = offset + inside;
    for (uint64_t pos = offset; pos < end;) {
        const uint64_t direct = direct_length(l, pos, end);
        if (direct) {
            IoVecSlice slice(iov, pos - offset, direct);
            if (fits(l, pos, slice.view())) {
                CO_CHECK(co_await n.do_read(rq, pos, slice.view()));
                pos += direct;
                continue;
            }
        }
        // Whole units into memory of ours. The last one may reach beyond size(): the driver gives zeroes there.
        const uint64_t begin = align_down(pos, unit);
        const uint64_t length = std::min(align_up(end - begin, unit), bounce_limit(l));
        Buffer bounce = Buffer::alloc(length);
        const iovec whole = bounce.iov();
        CO_CHECK(co_await n.do_read(rq, begin, IoVec(whole)));
        const uint64_t part = std::min(end, begin + length) - pos;
        copy_to_iovec(iov, pos - offset, bounce.data() + (pos - begin), part);
        pos += part;
    }
    co_return Result<>();
}

Task<Result<BlockStatus>> RequestLayer::block_status(Node& n, Request& rq, uint64_t offset, uint64_t length) {
    const uint64_t size = n.size();
    if (length == 0 || offset >= size || length > size - offset) {
        co_return fail(ErrorKind::kInvalid, "node '{}': block status of {} bytes at {} is out of range", n.name_,
                       length, offset);
    }
    const uint64_t unit = std::max<uint32_t>(n.limits_.request_alignment, 1);
    const uint64_t begin = align_down(offset, unit);
    const uint64_t end = std::min(align_up(offset + length, unit), size);
    CO_TRY(BlockStatus status, co_await n.do_block_status(rq, begin, end - begin));
    const uint64_t skip = offset - begin;
    if (status.length == 0) {
        co_return fail(ErrorKind::kIo, "node '{}': block status at {} made no progress", n.name_, offset);
    }
    if (status.length <= skip) {
        // The kind changes inside the unit, before `offset`: "data" is never wrong.
        status = {};
        status.length = unit;
        status.data = status.allocated = true;
        status.depth = 1;
    }
    status.length = std::min(status.length - skip, length);
    if (status.has_offset) status.host_offset += skip;
    status.eof = offset + status.length >= size;
    co_return status;
}

Task<Result<size_t>> RequestLayer::block_statuses(Node& n, Request& rq, uint64_t offset, uint64_t length,
                                                  std::span<BlockStatus> out) {
    const uint64_t size = n.size();
    const uint64_t unit = std::max<uint32_t>(n.limits_.request_alignment, 1);
    const bool inside = length != 0 && offset < size && length <= size - offset;
    const bool aligned = offset % unit == 0 && (length % unit == 0 || offset + length == size);
    if (!inside || !aligned) {
        CO_TRY(out[0], co_await block_status(n, rq, offset, length));
        co_return size_t{1};
    }
    CO_TRY(size_t count, co_await n.do_block_statuses(rq, offset, length, out));
    uint64_t done = 0;
    for (size_t i = 0; i < count; i++) {
        if (out[i].length == 0 || done == length) {
            count = i;
            break;
        }
        out[i].length = std::min(out[i].length, length - done);
        done += out[i].length;
        out[i].eof = offset + done >= size;
    }
    if (count == 0) {
        co_return fail(ErrorKind::kIo, "node '{}': block status at {} made no progress", n.name_, offset);
    }
    co_return count;
}

}  // namespace gantry::block
