// FALLOCATE and LSEEK: calls about ranges of any length, in bounded steps.

#include <linux/falloc.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "block/align.h"
#include "fuse/long_call.h"
#include "fuse/reply_error.h"
#include "runtime/timer.h"

namespace gantry::fuse {

namespace {

using block::WriteFlags;

/// Zeroed in one step; between two the call can be interrupted.
constexpr uint64_t kZeroStep = 256 << 20;
/// Parts of the node looked at in one step.
constexpr size_t kStatusStep = 64;
/// Where a node makes no hole of an odd range, its ends are written up to such bounds. Clusters are no larger.
constexpr uint64_t kHoleUnits[] = {64 << 10, 2 << 20};

}  // namespace

Task<int> FileService::zero(const LongCall& self, block::Channel& channel, uint64_t offset, uint64_t length,
                            WriteFlags flags) {
    const uint64_t end = offset + length;
    for (uint64_t at = offset; at < end;) {
        if (at != offset && self.interrupted()) co_return EINTR;
        while (channel.quiesced()) co_await channel.resumed();
        // Somebody may cut the node meanwhile.
        const uint64_t limit = std::min(end, channel.size());
        if (at >= limit) break;
        const uint64_t part = std::min(limit, block::align_down(at, kZeroStep) + kZeroStep) - at;
        Result<> done = co_await channel.write_zeroes(at, part, flags);
        if (!done) {
            if (done.error().kind() == ErrorKind::kNoSpace && channel.size() < at + part) continue;
            co_return reply_errno(done.error());
        }
        written();
        at += part;
    }
    co_return 0;
}

Task<int> FileService::punch(const LongCall& self, block::Channel& channel, uint64_t offset, uint64_t length) {
    constexpr WriteFlags kHole = WriteFlags::kMayUnmap | WriteFlags::kNoFallback;
    const uint64_t end = offset + length;
    int result = co_await zero(self, channel, offset, length, kHole);
    for (const uint64_t unit : kHoleUnits) {
        if (result != EOPNOTSUPP) co_return result;
        const uint64_t first = std::min(block::align_up(offset, unit), end);
        const uint64_t last = std::max(block::align_down(end, unit), first);
        // The middle tells whether there are holes at all; nothing is written before.
        if (last > first) result = co_await zero(self, channel, first, last - first, kHole);
        if (last > first && result != 0) continue;
        result = co_await zero(self, channel, offset, first - offset, WriteFlags::kMayUnmap);
        if (result == 0) result = co_await zero(self, channel, last, end - last, WriteFlags::kMayUnmap);
    }
    co_return result;
}

/// Space for what lies beyond the end, which becomes a part of the file. Inside of it the node has no way to add space
/// under data that others may be writing.
Task<int> FileService::allocate(const LongCall& self, block::Channel& channel, const FallocateIn& in) {
    const uint64_t size = channel.size();
    const uint64_t end = in.offset + in.length;
    if ((in.mode & FALLOC_FL_KEEP_SIZE) || in.offset < size) co_return EOPNOTSUPP;
    if (!options_.growable) co_return ENOSPC;
    Result<> grown = co_await grow(channel, end);
    if (!grown) co_return reply_errno(grown.error());
    const int result = co_await zero(self, channel, in.offset, in.length, WriteFlags::kNoFallback);
    // Zeroes that take no space are what there is, then.
    co_return result == EOPNOTSUPP ? 0 : result;
}

Task<void> FileService::do_fallocate(Call& call, block::Channel& channel) {
    const auto in = call.arguments<FallocateIn>();
    constexpr uint32_t kKnown = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;
    const bool keep = in.mode & FALLOC_FL_KEEP_SIZE;
    const bool hole = in.mode & FALLOC_FL_PUNCH_HOLE;
    const bool zeroes = in.mode & FALLOC_FL_ZERO_RANGE;
    int refusal = 0;
    if (!options_.writable) {
        refusal = EACCES;
    } else if ((in.mode & ~kKnown) || (hole && (zeroes || !keep))) {
        refusal = EOPNOTSUPP;
    } else if (in.length == 0) {
        refusal = EINVAL;
    } else if (in.offset > INT64_MAX || in.length > INT64_MAX - in.offset) {
        refusal = EFBIG;
    }
    if (refusal) {
        call.fail(refusal);
        co_return;
    }

    LongCall self(*this, call.header.unique);
    int result = 0;
    if (!hole && !zeroes) {
        result = co_await allocate(self, channel, in);
    } else {
        const uint64_t end = in.offset + in.length;
        if (!keep && end > channel.size()) {
            if (!options_.growable) {
                call.fail(ENOSPC);
                co_return;
            }
            Result<> grown = co_await grow(channel, end);
            if (!grown) {
                call.fail(reply_errno(grown.error()));
                co_return;
            }
        }
        const uint64_t last = std::min(end, channel.size());
        if (in.offset < last) {
            const uint64_t length = last - in.offset;
            if (hole) {
                result = co_await punch(self, channel, in.offset, length);
            } else {
                result = co_await zero(self, channel, in.offset, length, WriteFlags::kNone);
            }
        }
    }
    if (result) {
        call.fail(result);
    } else {
        call.succeed();
    }
}

Task<void> FileService::do_lseek(Call& call, block::Channel& channel) {
    const auto in = call.arguments<LseekIn>();
    if (in.whence != SEEK_DATA && in.whence != SEEK_HOLE) {
        call.fail(EINVAL);
        co_return;
    }
    const bool want_hole = in.whence == SEEK_HOLE;
    LongCall self(*this, call.header.unique);
    auto parts = std::make_unique<std::array<block::BlockStatus, kStatusStep>>();
    uint64_t at = in.offset;
    bool first = true;
    for (;;) {
        if (!first && self.interrupted()) {
            call.fail(EINTR);
            co_return;
        }
        while (channel.quiesced()) co_await channel.resumed();
        const uint64_t size = channel.size();
        if (at >= size) {
            // The end is a hole of no length, but not for who starts there.
            if (want_hole && size > in.offset) {
                call.succeed(LseekOut{.offset = size});
            } else {
                call.fail(ENXIO);
            }
            co_return;
        }
        first = false;
        Result<size_t> count = co_await channel.block_statuses(at, size - at, *parts);
        if (!count) {
            // Cut meanwhile: seen in the next round.
            if (count.error().kind() == ErrorKind::kInvalid && channel.size() < size) continue;
            call.fail(reply_errno(count.error()));
            co_return;
        }
        const uint64_t began = at;
        for (size_t i = 0; i < *count; ++i) {
            const block::BlockStatus& part = (*parts)[i];
            if (part.zero == want_hole) {
                call.succeed(LseekOut{.offset = at});
                co_return;
            }
            at += part.length;
        }
        if (at == began) {
            call.fail(EIO);
            co_return;
        }
        co_await yield_turn();
    }
}

}  // namespace gantry::fuse
