// BLOCK_STATUS.

#include <poll.h>

#include <algorithm>
#include <cstring>

#include "block/bitmap.h"
#include "nbd/extent_list.h"
#include "nbd/session.h"
#include "nbd/wire_error.h"

namespace gantry::nbd {

namespace {

/// Parts that are asked for at once; then others on this loop run.
constexpr size_t kPartsAtOnce = 512;
constexpr size_t kPartsForOne = 32;  // one extent is wanted, which may consist of several
/// Whether the client is still there is looked at every so many turns.
constexpr unsigned kTurnsPerLook = 16;
/// Runs of a bitmap, and granules of one run, that are walked over before others on this loop run.
constexpr unsigned kRunsPerTurn = 4096;
constexpr uint64_t kGranulesPerStep = 1u << 22;

uint32_t allocation_flags(const block::BlockStatus& status) {
    return (status.data ? 0 : kStateHole) | (status.zero ? kStateZero : 0);
}

/// Whether nobody can read an answer any more: the client is gone, or cut off by a removal.
bool hung_up(int fd) {
    pollfd p{fd, 0, 0};
    return ::poll(&p, 1, 0) == 1 && (p.revents & (POLLHUP | POLLERR));
}

/// Lets others run now and then, and says when nobody waits for the answer any more.
class Pace {
  public:
    explicit Pace(int fd) : fd_(fd) {}
    Task<Result<>> turn() {
        co_await pause_.until(Clock::time_point::min());
        if (++turns_ % kTurnsPerLook == 0 && hung_up(fd_)) co_return fail(ErrorKind::kShutdown, "the client is gone");
        co_return Result<>();
    }

  private:
    int fd_;
    unsigned turns_ = 0;
    Timer pause_;
};

/// base:allocation and qemu:allocation-depth of [offset, offset + length), in one walk; null: not asked for. At least
/// one extent each. Hundreds of thousands of parts if the image is fragmented: given up (kShutdown) when the client is
/// gone, so that a removal does not wait for them.
Task<Result<>> walk_node(block::Channel& channel, Pace& pace, uint64_t offset, uint64_t length, size_t at_once,
                         ExtentList* allocation, ExtentList* depth) {
    std::vector<block::BlockStatus> parts(std::min<uint64_t>(at_once, length));
    for (uint64_t at = 0; at < length && (allocation || depth);) {
        const Result<size_t> count = co_await channel.block_statuses(offset + at, length - at, parts);
        if (!count) co_return std::unexpected(count.error());
        for (const block::BlockStatus& part : std::span(parts).first(*count)) {
            if (allocation && !allocation->add(part.length, allocation_flags(part))) allocation = nullptr;
            if (depth && !depth->add(part.length, part.depth)) depth = nullptr;
            at += part.length;
        }
        if (at < length) CO_CHECK(co_await pace.turn());
    }
    co_return Result<>();
}

/// qemu:dirty-bitmap:NAME. What lies beyond the bitmap, of a smaller node, may have been written: a backup has to look
/// at it. So may everything of one that lost its bits.
Task<Result<>> walk_bitmap(const block::DirtyBitmap& bitmap, Pace& pace, uint64_t offset, uint64_t length,
                           ExtentList& extents) {
    const uint64_t end = offset + length;
    const uint64_t step = kGranulesPerStep * bitmap.granularity();
    unsigned runs = 0;
    for (uint64_t at = offset; at < end;) {
        uint64_t next = end;
        bool dirty = bitmap.inconsistent || at >= bitmap.size();
        if (!dirty) {
            dirty = bitmap.is_dirty(at);
            next = std::min(end, bitmap.end_of_run(at, dirty, at + std::min(step, end - at)));
            runs += static_cast<unsigned>(1 + (next - at) / (step / kRunsPerTurn + 1));
        }
        // Marked meanwhile: seen again as what it is now.
        if (next == at) continue;
        if (!extents.add(next - at, dirty ? kStateDirty : 0)) break;
        at = next;
        if (runs >= kRunsPerTurn && at < end) {
            runs = 0;
            CO_CHECK(co_await pace.turn());
        }
    }
    co_return Result<>();
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
    std::vector<ExtentList> lists;
    lists.reserve(count);
    for (size_t i = 0; i < count; ++i) lists.emplace_back(limit, config_.extended);
    const auto context_of = [&](size_t i) -> const MetaContext& {
        return config_.contexts[chosen.empty() ? i : chosen[i]];
    };

    Pace pace(fd_);
    Result<> result;
    ExtentList* allocation = nullptr;
    ExtentList* depth = nullptr;
    for (size_t i = 0; i < count && result; ++i) {
        const MetaContext& context = context_of(i);
        if (context.kind == ContextKind::kBaseAllocation) {
            allocation = &lists[i];
        } else if (context.kind == ContextKind::kAllocationDepth) {
            depth = &lists[i];
        } else {
            result = co_await walk_bitmap(*context.bitmap, pace, rq.offset, rq.length, lists[i]);
        }
    }
    if (result && (allocation || depth)) {
        const size_t at_once = one ? kPartsForOne : kPartsAtOnce;
        result = co_await walk_node(channel_, pace, rq.offset, rq.length, at_once, allocation, depth);
    }
    if (!result) {
        reply_failure(rq, result.error());
        finish(rq);
        co_return;
    }
    const size_t fixed = config_.extended ? 8 : 4;
    const uint16_t type = config_.extended ? kChunkBlockStatusExt : kChunkBlockStatus;
    for (size_t i = 0; i < count; ++i) {
        const uint16_t flags = i + 1 == count ? kChunkDone : 0;
        const size_t size = lists[i].bytes();
        uint8_t* p = encode_chunk_of(replies_.reserve(chunk_header_size_ + fixed), rq, flags, type, fixed + size);
        p = store_big(p, context_of(i).id);
        if (config_.extended) store_big(p, lists[i].count());
        replies_.commit(chunk_header_size_ + fixed);
        Buffer descriptors = lists[i].take();
        const uint8_t* bytes = descriptors.data();
        replies_.append_owned(std::move(descriptors), bytes, size);
    }
    finish(rq);
}

}  // namespace gantry::nbd
