// Commands other than READ and BLOCK_STATUS, and the replies all commands share.

#include <algorithm>
#include <cerrno>

#include "nbd/extent_list.h"
#include "nbd/session.h"
#include "nbd/wire_error.h"

namespace gantry::nbd {

namespace {

/// Larger writes are not done on the reader's turn.
constexpr uint32_t kInlineWrite = 1u << 20;
/// Longer ones may be done beside the loop while the next payload is received.
constexpr uint32_t kOverlapWrite = 128u << 10;

}  // namespace

// ---- Replies ----

void Session::reply_none(const RequestHeader& rq) {
    encode_chunk_of(replies_.reserve(chunk_header_size_), rq, kChunkDone, kChunkNone, 0);
    replies_.commit(chunk_header_size_);
}

void Session::reply_ok(const RequestHeader& rq) {
    // Extended headers know no simple reply.
    if (config_.extended) return reply_none(rq);
    encode_simple_reply(replies_.reserve(kSimpleReplySize), kWireOk, rq.cookie);
    replies_.commit(kSimpleReplySize);
}

void Session::reply_error(const RequestHeader& rq, WireError error, std::string_view text) {
    if (!config_.structured) {
        encode_simple_reply(replies_.reserve(kSimpleReplySize), error, rq.cookie);
        replies_.commit(kSimpleReplySize);
        return;
    }
    const auto text_size = static_cast<uint16_t>(std::min(text.size(), kMaxString));
    const size_t size = chunk_header_size_ + 6 + text_size;
    uint8_t* p = encode_chunk_of(replies_.reserve(size), rq, kChunkDone, kChunkError, 6u + text_size);
    p = store_big(p, static_cast<uint32_t>(error));
    p = store_big(p, text_size);
    std::memcpy(p, text.data(), text_size);
    replies_.commit(size);
}

void Session::reply_failure(const RequestHeader& rq, const Error& error) {
    // The operator's text may name files and nodes: the client gets the plain reason.
    const bool fast_zero = rq.command == kCmdWriteZeroes && (rq.flags & kCmdFastZero);
    const WireError wire = wire_error(error, fast_zero);
    reply_error(rq, wire, wire_error_text(wire));
}

void Session::reply_failure_at(const RequestHeader& rq, const Error& error, uint64_t offset) {
    if (!config_.structured) return reply_failure(rq, error);
    const WireError wire = wire_error(error);
    const std::string_view text = wire_error_text(wire);
    const auto text_size = static_cast<uint16_t>(text.size());
    const size_t size = chunk_header_size_ + 6 + text_size + 8;
    uint8_t* p = encode_chunk_of(replies_.reserve(size), rq, kChunkDone, kChunkErrorOffset, 6u + text_size + 8u);
    p = store_big(p, static_cast<uint32_t>(wire));
    p = store_big(p, text_size);
    std::memcpy(p, text.data(), text_size);
    store_big(p + text_size, offset);
    replies_.commit(size);
}

void Session::reply_result(const RequestHeader& rq, const Result<>& result) {
    if (result) {
        reply_ok(rq);
    } else {
        reply_failure(rq, result.error());
    }
}

// ---- Starting and ending what waits ----

uint64_t Session::cost(const RequestHeader& rq) {
    switch (rq.command) {
        case kCmdRead:
        case kCmdWrite:
            // What is longer gets an error, and no memory.
            return std::min<uint64_t>(rq.length, kMaxPayload);
        case kCmdBlockStatus:
            return uint64_t{kMaxStatusExtents} * ExtentList::kMaxDescriptor;
        default:
            return 0;
    }
}

void Session::start(const RequestHeader& rq, Task<void> task) {
    ++in_flight_;
    in_flight_bytes_ += cost(rq);
    requests_scope_.spawn(std::move(task));
}

void Session::finish(const RequestHeader& rq) {
    --in_flight_;
    in_flight_bytes_ -= cost(rq);
    if (broken_) replies_.clear();
    if (reading_) return;
    publish_counters();
    room_.notify_all();
    if (!replies_.empty()) wake_writer();
}

// ---- Commands ----

void Session::write_now(const RequestHeader& rq, const uint8_t* data) {
    turn_bytes_ += rq.length;
    bytes_written_ += rq.length;
    if (rq.length == 0) return reply_ok(rq);
    if (!(rq.flags & kCmdFua)) {
        const iovec one{const_cast<uint8_t*>(data), rq.length};
        const int r = channel_.try_write(rq.offset, IoVec(one), block::WriteFlags::kNone);
        if (r == 0) return reply_ok(rq);
        if (r != -EAGAIN) {
            const WireError wire = wire_error(-r);
            return reply_error(rq, wire, wire_error_text(wire));
        }
    }
    Buffer copy = Buffer::alloc(rq.length);
    std::memcpy(copy.data(), data, rq.length);
    start(rq, do_write(rq, std::move(copy)));
}

void Session::write_received(const RequestHeader& rq, Buffer data) {
    turn_bytes_ += rq.length;
    bytes_written_ += rq.length;
    const bool beside = rq.length > kOverlapWrite && write_placement_.beside(Clock::now());
    if (!(rq.flags & kCmdFua) && !beside && rq.length <= kInlineWrite) {
        const iovec one = data.iov();
        const int r = channel_.try_write(rq.offset, IoVec(one), block::WriteFlags::kNone);
        if (r == 0) return reply_ok(rq);
        if (r != -EAGAIN) {
            const WireError wire = wire_error(-r);
            return reply_error(rq, wire, wire_error_text(wire));
        }
    }
    start(rq, do_write(rq, std::move(data)));
}

Task<void> Session::do_write(RequestHeader rq, Buffer data) {
    const iovec one = data.iov();
    const auto flags = rq.flags & kCmdFua ? block::WriteFlags::kFua : block::WriteFlags::kNone;
    const Result<> result = co_await channel_.write(rq.offset, IoVec(one), flags, true);
    data.reset();
    reply_result(rq, result);
    finish(rq);
}

Task<void> Session::do_flush(RequestHeader rq) {
    const Result<> result = co_await channel_.flush();
    reply_result(rq, result);
    finish(rq);
}

Task<void> Session::do_trim(RequestHeader rq) {
    Result<> result;
    if (rq.length != 0) result = co_await channel_.discard(rq.offset, rq.length);
    if (result && (rq.flags & kCmdFua)) result = co_await channel_.flush();
    reply_result(rq, result);
    finish(rq);
}

Task<void> Session::do_cache(RequestHeader rq) {
    Result<> result;
    if (rq.length != 0) result = co_await channel_.preload(rq.offset, rq.length);
    reply_result(rq, result);
    finish(rq);
}

Task<void> Session::do_write_zeroes(RequestHeader rq) {
    auto flags = block::WriteFlags::kNone;
    if (!(rq.flags & kCmdNoHole)) flags = flags | block::WriteFlags::kMayUnmap;
    if (rq.flags & kCmdFastZero) flags = flags | block::WriteFlags::kNoFallback;
    if (rq.flags & kCmdFua) flags = flags | block::WriteFlags::kFua;
    Result<> result;
    if (rq.length != 0) result = co_await channel_.write_zeroes(rq.offset, rq.length, flags);
    reply_result(rq, result);
    finish(rq);
}

}  // namespace gantry::nbd
