// READ: at once when the page cache answers, else as a coroutine; holes as chunks of their own when replies are
// structured.

#include <algorithm>
#include <array>
#include <cerrno>

#include "nbd/session.h"
#include "nbd/wire_error.h"

namespace gantry::nbd {

namespace {

/// Reads up to this size are laid end to end in the arena.
constexpr uint32_t kArenaRead = 32u << 10;
/// Larger reads are not done on the reader's turn.
constexpr uint32_t kInlineRead = 1u << 20;
/// How far block status looks ahead of a read, to remember a range of data.
constexpr uint64_t kLookAhead = 64u << 20;
/// Shorter holes travel as zeroes.
constexpr uint64_t kMinHole = 4096;
constexpr uint64_t kChunkBoundary = 512;
constexpr size_t kMaxParts = 64;

/// One chunk of a structured read, relative to the request.
struct Part {
    uint64_t begin, end;
    bool hole;
};

/// The parts of one read, in order, neighbours of a kind merged. The last slot is data to the end: bounded.
struct Parts {
    std::array<Part, kMaxParts> part;
    size_t count = 0;

    void add(uint64_t begin, uint64_t end, bool hole) {
        if (begin == end) return;
        if (count && part[count - 1].hole == hole) {
            part[count - 1].end = end;
        } else {
            part[count++] = {begin, end, hole};
        }
    }
    /// A hole in [begin, end), cut to whole boundaries of the disk; `base` is the request's offset.
    void add_hole(uint64_t base, uint64_t begin, uint64_t end, bool at_end) {
        const uint64_t first = begin == 0 ? base : (base + begin + kChunkBoundary - 1) & ~(kChunkBoundary - 1);
        const uint64_t last = at_end ? base + end : (base + end) & ~(kChunkBoundary - 1);
        const bool whole = begin == 0 && at_end;
        if (!whole && (last < first || last - first < kMinHole || count + 3 > kMaxParts)) {
            add(begin, end, false);
            return;
        }
        add(begin, first - base, false);
        add(first - base, last - base, true);
        add(last - base, end, false);
    }
};

}  // namespace

void Session::encode_read_header(uint8_t* p, const RequestHeader& rq) const {
    if (!config_.structured) {
        encode_simple_reply(p, kWireOk, rq.cookie);
    } else {
        p = encode_chunk_of(p, rq, kChunkDone, kChunkOffsetData, rq.length + 8);
        store_big(p, rq.offset);
    }
}

void Session::reply_empty_read(const RequestHeader& rq) {
    // A structured READ is answered by chunks, also without data.
    config_.structured ? reply_none(rq) : reply_ok(rq);
}

void Session::reply_data(const RequestHeader& rq, Buffer data) {
    const size_t header = read_header_size_;
    encode_read_header(replies_.reserve(header), rq);
    replies_.commit(header);
    const uint8_t* bytes = data.data();
    replies_.append_owned(std::move(data), bytes, rq.length);
    bytes_read_ += rq.length;
}

void Session::read_now(const RequestHeader& rq) {
    if (rq.length == 0) return reply_empty_read(rq);
    if (rq.length <= kArenaRead) {
        if (!try_read_small(rq)) start(rq, do_read(rq, true));
        return;
    }
    const bool want_holes = config_.structured && !(rq.flags & kCmdDf) && rq.length >= kHoleThreshold &&
                            !(rq.offset >= known_data_begin_ && rq.offset + rq.length <= known_data_end_);
    if (want_holes) return start(rq, do_structured_read(rq));
    const bool try_inline = rq.length <= kInlineRead;
    if (!try_inline || !try_read_large(rq)) start(rq, do_read(rq, try_inline));
}

bool Session::try_read_small(const RequestHeader& rq) {
    const size_t header = read_header_size_;
    uint8_t* p = replies_.reserve(header + rq.length);
    const iovec one{p + header, rq.length};
    const int r = channel_.try_read(rq.offset, IoVec(one));
    if (r == -EAGAIN) return false;
    if (r != 0) {
        const WireError wire = wire_error(-r);
        reply_error(rq, wire, wire_error_text(wire));
        return true;
    }
    encode_read_header(p, rq);
    replies_.commit(header + rq.length);
    turn_bytes_ += rq.length;
    bytes_read_ += rq.length;
    return true;
}

bool Session::try_read_large(const RequestHeader& rq) {
    auto memory = Buffer::try_alloc(rq.length);
    if (!memory) {
        reply_error(rq, kWireNoMem, wire_error_text(kWireNoMem));
        return true;
    }
    const iovec one = memory->iov();
    const int r = channel_.try_read(rq.offset, IoVec(one));
    if (r == -EAGAIN) return false;
    if (r != 0) {
        const WireError wire = wire_error(-r);
        reply_error(rq, wire, wire_error_text(wire));
        return true;
    }
    turn_bytes_ += rq.length;
    reply_data(rq, std::move(*memory));
    return true;
}

Task<void> Session::do_read(RequestHeader rq, bool inline_tried) {
    auto memory = Buffer::try_alloc(rq.length);
    if (!memory) {
        reply_error(rq, kWireNoMem, wire_error_text(kWireNoMem));
        finish(rq);
        co_return;
    }
    const iovec one = memory->iov();
    const Result<> result = co_await channel_.read(rq.offset, IoVec(one), inline_tried);
    if (result) {
        reply_data(rq, std::move(*memory));
    } else {
        reply_failure(rq, result.error());
    }
    finish(rq);
}

Task<void> Session::do_structured_read(RequestHeader rq) {
    Parts parts;
    for (uint64_t at = 0; at < rq.length;) {
        const uint64_t offset = rq.offset + at;
        const uint64_t left = rq.length - at;
        const uint64_t ask = std::max(left, std::min(kLookAhead, rules_.size - offset));
        const Result<block::BlockStatus> status = co_await channel_.block_status(offset, ask);
        // Not knowing is no error: reading tells. A full table or an odd answer reads the rest as data.
        if (!status || status->length == 0 || parts.count + 3 > kMaxParts) {
            parts.add(at, rq.length, false);
            break;
        }
        const uint64_t length = std::min(status->length, left);
        if (status->zero) {
            parts.add_hole(rq.offset, at, at + length, at + length == rq.length);
        } else {
            known_data_begin_ = offset;
            known_data_end_ = offset + status->length;
            parts.add(at, at + length, false);
        }
        at += length;
    }

    Buffer data;
    const bool any_data = parts.count > 1 || !parts.part[0].hole;
    if (any_data) {
        auto memory = Buffer::try_alloc(rq.length);
        if (!memory) {
            reply_error(rq, kWireNoMem, wire_error_text(kWireNoMem));
            finish(rq);
            co_return;
        }
        data = std::move(*memory);
    }
    for (size_t i = 0; i < parts.count; ++i) {
        const Part& part = parts.part[i];
        if (part.hole) continue;
        const iovec one = data.iov(part.begin, part.end - part.begin);
        const Result<> result = co_await channel_.read(rq.offset + part.begin, IoVec(one));
        if (!result) {
            reply_failure_at(rq, result.error(), rq.offset + part.begin);
            finish(rq);
            co_return;
        }
    }

    // Nothing can fail any more: all chunks at once, DONE on the last.
    const uint8_t* bytes = data.data();
    size_t last_data = parts.count;
    for (size_t i = 0; i < parts.count; ++i) {
        if (!parts.part[i].hole) last_data = i;
    }
    for (size_t i = 0; i < parts.count; ++i) {
        const Part& part = parts.part[i];
        const auto length = static_cast<uint32_t>(part.end - part.begin);
        const uint16_t flags = i + 1 == parts.count ? kChunkDone : 0;
        if (part.hole) {
            uint8_t* p = encode_chunk_of(replies_.reserve(chunk_header_size_ + 12), rq, flags, kChunkOffsetHole, 12);
            p = store_big(p, rq.offset + part.begin);
            store_big(p, length);
            replies_.commit(chunk_header_size_ + 12);
            continue;
        }
        uint8_t* p = encode_chunk_of(replies_.reserve(chunk_header_size_ + 8), rq, flags, kChunkOffsetData, length + 8);
        store_big(p, rq.offset + part.begin);
        replies_.commit(chunk_header_size_ + 8);
        if (i == last_data) {
            replies_.append_owned(std::move(data), bytes + part.begin, length);
        } else {
            replies_.append_ref(bytes + part.begin, length);
        }
    }
    bytes_read_ += rq.length;
    turn_bytes_ += rq.length;
    finish(rq);
}

}  // namespace gantry::nbd
