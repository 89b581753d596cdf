// write_zeroes, discard and flush.

#include <algorithm>
#include <optional>

#include "block/align.h"
#include "block/request_layer.h"
#include "block/request_pieces.h"
#include "block/zero_data.h"

namespace gantry::block {
Task<Result<>> RequestLayer::write_zero_data(Node& n, Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    const ZeroData zeroes;
    const uint64_t blocks = std::clamp<uint64_t>(n.limits_.max_iov, 1, ZeroData::kLimit / ZeroData::kBlock);
    const uint64_t limit = blocks * ZeroData::kBlock;
    // Pieces end on multiples of the block, so that only the ends of the whole range are read-modify-written.
    for (uint64_t pos = offset, end = offset + length; pos < end;) {
        const uint64_t part = std::min(end, align_down(pos, ZeroData::kBlock) + limit) - pos;
        IoVecSlice slice = zeroes.slice(part);
        CO_CHECK(co_await write_pieces(n, rq, pos, slice.view(), flags));
        pos += part;
    }
    co_return Result<>();
}

Task<Result<>> RequestLayer::write_zeroes(Node& n, Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    CO_CHECK(check_change(n, offset, length, "write-zeroes"));
    const Limits& l = n.limits_;
    const uint64_t unit = std::max<uint32_t>(l.request_alignment, 1);
    const uint64_t begin = align_down(offset, unit);
    const uint64_t end = align_up(offset + length, unit);
    const bool serialising = has(flags, WriteFlags::kSerialising) || begin != offset || end != offset + length;
    CHECK(!has(flags, WriteFlags::kSerialising) || tracks(n), "kSerialising needs Node::track_requests() first");
    const bool fua = has(flags, WriteFlags::kFua) && !(n.flags_.cache_no_flush && n.children_.empty());
    WriteFlags driver_flags = flags & ~(WriteFlags::kSerialising | WriteFlags::kFua);
    if (fua && l.supports_fua) driver_flags = driver_flags | WriteFlags::kFua;
    if (n.flags_.discard != DiscardMode::kUnmap) driver_flags = driver_flags & ~WriteFlags::kMayUnmap;

    Result<> result;
    {
        std::optional<TrackedRequests::Entry> entry;
        if (tracks(n)) {
            entry.emplace(n.tracked_, begin, end, serialising);
            while (entry->blocked()) co_await entry->turn();
        }
        n.note_highest(offset + length);
        result = co_await zero_pieces(n, rq, offset, length, driver_flags);
        changed(n, offset, length, result.has_value(), has(flags, WriteFlags::kUnchanged));
    }
    if (result && fua && !l.supports_fua) result = co_await n.flush(rq);
    co_return result;
}

Task<Result<>> RequestLayer::zero_pieces(Node& n, Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    const Limits& l = n.limits_;
    const uint64_t unit =
        std::max<uint64_t>(std::max<uint32_t>(l.request_alignment, 1), l.partial_zeroes ? 1 : l.zeroes_alignment);
    const uint64_t end = offset + length;
    // [first, last) goes to the driver, what lies around it is written.
    uint64_t first = align_up(offset, unit);
    uint64_t last = align_down(end, unit);
    if (!l.supports_zeroes || first >= last) first = last = end;
    const bool no_fallback = has(flags, WriteFlags::kNoFallback);
    if (no_fallback && length && (first != offset || last != end)) {
        co_return fail(ErrorKind::kUnsupported, "node '{}' cannot zero {} bytes at {} fast", n.name_, length, offset);
    }
    const WriteFlags data_flags = flags & ~(WriteFlags::kMayUnmap | WriteFlags::kNoFallback);

    if (first > offset) CO_CHECK(co_await write_zero_data(n, rq, offset, first - offset, data_flags));
    const uint64_t piece = l.max_zeroes ? std::max(align_down(l.max_zeroes, unit), unit) : last - first;
    for (uint64_t pos = first; pos < last;) {
        const uint64_t part = std::min(last - pos, piece);
        Result<> done = co_await n.do_write_zeroes(rq, pos, part, flags);
        if (!done && done.error().kind() == ErrorKind::kUnsupported && !no_fallback) {
            done = co_await write_zero_data(n, rq, pos, part, data_flags);
        }
        if (!done) co_return done;
        pos += part;
    }
    if (last < end) CO_CHECK(co_await write_zero_data(n, rq, last, end - last, data_flags));
    co_return Result<>();
}

Task<Result<>> RequestLayer::discard(Node& n, Request& rq, uint64_t offset, uint64_t length) {
    const uint64_t size = n.size();
    if (offset >= size) co_return Result<>();
    length = std::min(length, size - offset);
    if (n.read_only()) CO_CHECK(check_change(n, offset, length, "discard"));
    if (n.flags_.discard != DiscardMode::kUnmap) co_return Result<>();

    const Limits& l = n.limits_;
    const uint64_t unit = std::max<uint64_t>(std::max<uint32_t>(l.request_alignment, 1), l.discard_alignment);
    const uint64_t begin = align_up(offset, unit);
    uint64_t end = align_down(offset + length, unit);
    // The last, shorter unit counts as whole.
    if (offset + length == size) end = l.partial_zeroes ? size : align_down(size, std::max(l.request_alignment, 1u));
    if (begin >= end) co_return Result<>();

    std::optional<TrackedRequests::Entry> entry;
    if (tracks(n)) {
        entry.emplace(n.tracked_, begin, end, false);
        while (entry->blocked()) co_await entry->turn();
    }
    Result<> result = co_await discard_pieces(n, rq, begin, end);
    changed(n, begin, end - begin, false, false);
    if (!result && result.error().kind() == ErrorKind::kUnsupported) result = {};
    co_return result;
}

Task<Result<>> RequestLayer::discard_pieces(Node& n, Request& rq, uint64_t begin, uint64_t end) {
    const Limits& l = n.limits_;
    const uint64_t unit = std::max<uint64_t>(std::max<uint32_t>(l.request_alignment, 1), l.discard_alignment);
    const uint64_t piece = l.max_discard ? std::max(align_down(l.max_discard, unit), unit) : end - begin;
    for (uint64_t pos = begin; pos < end;) {
        const uint64_t part = std::min(end - pos, piece);
        CO_CHECK(co_await n.do_discard(rq, pos, part));
        pos += part;
    }
    co_return Result<>();
}

Task<Result<>> RequestLayer::flush(Node& n, Request& rq) {
    const uint64_t ticket = n.flush_state_.ticket();
    Result<> result;
    while (true) {
        const FlushState::Step step = n.flush_state_.next(ticket, result);
        if (step == FlushState::Step::kDone) co_return result;
        if (step == FlushState::Step::kWait) {
            co_await n.flush_state_.turn();
            continue;
        }
        result = co_await n.do_flush(rq);
        // A leaf that failed may have dropped dirty pages: trying again would report success for data that is gone.
        // What a format could not write back it still has, and its leaf's failure comes up again by itself.
        bool sticky = false;
        if (!result && n.children_.empty()) {
            const ErrorKind kind = result.error().kind();
            sticky = kind != ErrorKind::kUnsupported && kind != ErrorKind::kCancelled && kind != ErrorKind::kShutdown;
        }
        n.flush_state_.finish(result, sticky);
        co_return result;
    }
}

}  // namespace gantry::block
