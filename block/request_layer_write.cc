// Writes that need more than the driver: checks, tracking, read-modify-write, FUA emulation, dirty bitmaps.

#include <algorithm>
#include <optional>

#include "block/align.h"
#include "block/bitmap.h"
#include "block/request_layer.h"
#include "block/request_pieces.h"
#include "runtime/buffer.h"

namespace gantry::block {

Result<> RequestLayer::check_change(const Node& n, uint64_t offset, uint64_t length, const char* verb) {
    if (n.read_only()) {
        return fail(ErrorKind::kReadOnly, "node '{}' is read-only: {} of {} bytes at {} refused", n.name_, verb, length,
                    offset);
    }
    const uint64_t limit = n.limits_.can_grow_by_write ? kMaxOffset : n.size();
    if (offset > limit || length > limit - offset) {
        return fail(ErrorKind::kNoSpace, "node '{}': {} of {} bytes at {} ends beyond its end at {}", n.name_, verb,
                    length, offset, limit);
    }
    return {};
}

void RequestLayer::changed(Node& n, uint64_t offset, uint64_t length, bool ok, bool unchanged) {
    if (!unchanged) {
        for (const auto& bitmap : n.bitmaps_) bitmap->mark(offset, length);
    }
    if (ok && n.limits_.can_grow_by_write && offset + length > n.size()) n.grow_size(offset + length);
}

Task<Result<>> RequestLayer::write(Node& n, Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    CO_CHECK(check_change(n, offset, iov.bytes, "write"));
    const Limits& l = n.limits_;
    const uint64_t length = iov.bytes;
    if (n.flags_.detect_zeroes != DetectZeroes::kOff && length && !has(flags, WriteFlags::kCompressed) &&
        iovec_is_zero(iov)) {
        WriteFlags zero_flags = flags;
        if (n.flags_.detect_zeroes == DetectZeroes::kUnmap) zero_flags = zero_flags | WriteFlags::kMayUnmap;
        co_return co_await write_zeroes(n, rq, offset, length, zero_flags);
    }

    const uint64_t unit = std::max<uint32_t>(l.request_alignment, 1);
    const uint64_t begin = align_down(offset, unit);
    const uint64_t end = align_up(offset + length, unit);
    const bool serialising = has(flags, WriteFlags::kSerialising) || begin != offset || end != offset + length;
    CHECK(!has(flags, WriteFlags::kSerialising) || tracks(n), "kSerialising needs Node::track_requests() first");
    const bool fua = has(flags, WriteFlags::kFua) && !(n.flags_.cache_no_flush && n.children_.empty());
    WriteFlags driver_flags = flags & ~(WriteFlags::kSerialising | WriteFlags::kFua);
    if (fua && l.supports_fua) driver_flags = driver_flags | WriteFlags::kFua;

    Result<> result;
    {
        std::optional<TrackedRequests::Entry> entry;
        if (tracks(n)) {
            entry.emplace(n.tracked_, begin, end, serialising);
            while (entry->blocked()) co_await entry->turn();
        }
        n.note_highest(offset + length);
        result = co_await write_pieces(n, rq, offset, iov, driver_flags);
        changed(n, offset, length, result.has_value(), has(flags, WriteFlags::kUnchanged));
    }
    if (result && fua && !l.supports_fua) result = co_await n.flush(rq);
    co_return result;
}

Task<Result<>> RequestLayer::write_pieces(Node& n, Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    const Limits& l = n.limits_;
    const uint64_t unit = std::max<uint32_t>(l.request_alignment, 1);
    const uint64_t end = offset + iov.bytes;
    for (uint64_t pos = offset; pos < end;) {
        const uint64_t direct = direct_length(l, pos, end);
        if (direct) {
            IoVecSlice slice(iov, pos - offset, direct);
            if (fits(l, pos, slice.view())) {
                CO_CHECK(co_await n.do_write(rq, pos, slice.view(), flags));
                pos += direct;
                continue;
            }
        }
        const uint64_t part = std::min(end, align_down(pos, unit) + bounce_limit(l)) - pos;
        IoVecSlice slice(iov, pos - offset, part);
        CO_CHECK(co_await write_bounced(n, rq, pos, slice.view(), flags));
        pos += part;
    }
    co_return Result<>();
}

Task<Result<>> RequestLayer::write_bounced(Node& n, Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    const uint64_t unit = std::max<uint32_t>(n.limits_.request_alignment, 1);
    const uint64_t begin = align_down(offset, unit);
    const uint64_t end = align_up(offset + iov.bytes, unit);
    const uint64_t size = n.size();
    Buffer bounce = Buffer::alloc(end - begin);

    // The first and the last unit, where the guest's bytes fill them only in part.
    const uint64_t last = end - unit;
    const bool head = offset != begin;
    const bool tail = offset + iov.bytes != end && !(head && last == begin);
    for (int side = 0; side < 2; side++) {
        if (side == 0 ? !head : !tail) continue;
        const uint64_t at = side == 0 ? begin : last;
        const iovec one = bounce.iov(at - begin, unit);
        if (at >= size) {
            fill_iovec(IoVec(one), 0, unit);
        } else {
            CO_CHECK(co_await n.do_read(rq, at, IoVec(one)));
        }
    }
    copy_from_iovec(iov, 0, bounce.data() + (offset - begin), iov.bytes);
    const iovec whole = bounce.iov();
    co_return co_await n.do_write(rq, begin, IoVec(whole), flags);
}

}  // namespace gantry::block
