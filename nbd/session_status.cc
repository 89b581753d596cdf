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
Task<Result<ExtentList>> query_allocation(block::Channel& channel, int fd, uint64_t offset, uint64_t length,
                                          uint32_t limit, bool wide) {
    ExtentList extents(limit, wide);
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

void Session::status_with_payload(const RequestHeader& rq, const uint8_t* payload) {
    if (rq.length < kStatusPayloadFixed || (rq.length - kStatusPayloadFixed) % sizeof(uint32_t) != 0) {
        return reply_error(rq, kWireInval, "the payload is not a length and context ids");
    }
    RequestHeader query = rq;
    query.flags &= static_cast<uint16_t>(~kCmdPayloadLen);
    query.length = load_big<uint64_t>(payload);
    const Verdict verdict = check_request(query, rules_);
    if (verdict.error != kWireOk) return reply_error(rq, verdict.error, verdict.reason);
    const size_t count = (rq.length - kStatusPayloadFixed) / sizeof(uint32_t);
    if (count == 0) return reply_error(rq, kWireInval, "no context is asked for");
    std::vector<bool> seen(config_.contexts.size());
    std::vector<uint16_t> chosen;
    chosen.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        const auto id = load_big<uint32_t>(payload + kStatusPayloadFixed + i * sizeof(uint32_t));
        const auto it = std::ranges::lower_bound(config_.contexts, id, {}, &MetaContext::id);
        if (it == config_.contexts.end() || it->id != id) {
            return reply_error(rq, kWireInval, "a context id was not negotiated");
        }
        const auto index = static_cast<uint16_t>(it - config_.contexts.begin());
        if (seen[index]) return reply_error(rq, kWireInval, "a context id is named twice");
        seen[index] = true;
        chosen.push_back(index);
    }
    start(query, do_block_status(query, std::move(chosen)));
}

Task<void> Session::do_block_status(RequestHeader rq, std::vector<uint16_t> chosen) {
    const size_t count = chosen.empty() ? config_.contexts.size() : chosen.size();
    const bool one = rq.flags & kCmdReqOne;
    const uint32_t limit = one ? 1 : std::max<uint32_t>(1, kMaxStatusExtents / static_cast<uint32_t>(count));
    for (size_t i = 0; i < count; ++i) {
        const MetaContext& context = config_.contexts[chosen.empty() ? i : chosen[i]];
        Result<ExtentList> extents =
            co_await query_allocation(channel_, fd_, rq.offset, rq.length, limit, config_.extended);
        if (!extents) {
            reply_failure(rq, extents.error());
            break;
        }
        const size_t fixed = config_.extended ? 8 : 4;
        const uint16_t flags = i + 1 == count ? kChunkDone : 0;
        const uint16_t type = config_.extended ? kChunkBlockStatusExt : kChunkBlockStatus;
        const size_t size = extents->bytes();
        uint8_t* p = encode_chunk_of(replies_.reserve(chunk_header_size_ + fixed), rq, flags, type, fixed + size);
        p = store_big(p, context.id);
        if (config_.extended) store_big(p, extents->count());
        replies_.commit(chunk_header_size_ + fixed);
        Buffer descriptors = extents->take();
        const uint8_t* bytes = descriptors.data();
        replies_.append_owned(std::move(descriptors), bytes, size);
    }
    finish(rq);
}

}  // namespace gantry::nbd
