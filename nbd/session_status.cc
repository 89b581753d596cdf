// BLOCK_STATUS.

#include <poll.h>

#include <algorithm>
#include <cstring>

#include "nbd/extent_list.h"
#include "nbd/session.h"
#include "nbd/wire_error.h"

namespace gantry::nbd {

namespace {

/// Queries of one request before others on this loop run.
constexpr unsigned kQueriesPerTurn = 64;

uint32_t allocation_flags(const block::BlockStatus& status) {
    return (status.data ? 0 : kStateHole) | (status.zero ? kStateZero : 0);
}

/// Whether nobody can read an answer any more: the client is gone, or cut off by a removal.
bool hung_up(int fd) {
    pollfd p{fd, 0, 0};
    return ::poll(&p, 1, 0) == 1 && (p.revents & (POLLHUP | POLLERR));
}

/// base:allocation of [offset, offset + length); at least one extent. Hundreds of thousands of queries if the image is
/// fragmented: given up (kShutdown) when the client on `fd` is gone, so that a removal does not wait for them.
Task<Result<ExtentList>> query_allocation(block::Channel& channel, int fd, uint64_t offset, uint32_t length, bool one) {
    ExtentList extents(one ? 1 : kMaxStatusExtents);
    Timer pause;
    unsigned queries = 0;
    for (uint64_t at = 0; at < length;) {
        if (++queries % kQueriesPerTurn == 0) {
            co_await pause.until(Clock::time_point::min());
            if (hung_up(fd)) co_return fail(ErrorKind::kShutdown, "the client is gone");
        }
        const Result<block::BlockStatus> status = co_await channel.block_status(offset + at, length - at);
        if (!status) co_return std::unexpected(status.error());
        const uint64_t part = std::min<uint64_t>(status->length, length - at);
        if (part == 0 || !extents.add(part, allocation_flags(*status))) break;
        at += part;
    }
    if (extents.count() == 0) co_return fail(ErrorKind::kIo, "the node gave no block status");
    co_return std::move(extents);
}

}  // namespace

Task<void> Session::do_block_status(RequestHeader rq) {
    for (size_t i = 0; i < config_.contexts.size(); ++i) {
        const bool one = rq.flags & kCmdReqOne;
        Result<ExtentList> extents = co_await query_allocation(channel_, fd_, rq.offset, rq.length, one);
        if (!extents) {
            reply_failure(rq, extents.error());
            break;
        }
        const auto size = static_cast<uint32_t>(extents->bytes());
        const uint16_t flags = i + 1 == config_.contexts.size() ? kChunkDone : 0;
        uint8_t* p =
            encode_chunk(replies_.reserve(kChunkHeaderSize + 4), flags, kChunkBlockStatus, rq.cookie, size + 4);
        store_big(p, config_.contexts[i].id);
        replies_.commit(kChunkHeaderSize + 4);
        Buffer descriptors = extents->take();
        const uint8_t* bytes = descriptors.data();
        replies_.append_owned(std::move(descriptors), bytes, size);
    }
    finish(rq);
}

}  // namespace gantry::nbd
