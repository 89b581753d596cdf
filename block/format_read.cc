// FormatNode: reads and block status.

#include <algorithm>
#include <optional>

#include "block/format_node.h"
#include "runtime/buffer.h"
#include "runtime/task_scope.h"

namespace gantry::block {
namespace {

using Kind = Extent::Kind;

constexpr uint64_t kBounce = 1 << 20;
constexpr unsigned kStatusSteps = 256;  // extents looked at for one answer
constexpr int kAgain = -11;             // -EAGAIN

constexpr unsigned kSideBySide = 8;  // parts of one request that are read at the same time
constexpr uint64_t kWorthATask = 16 << 10;

bool worth_its_own_task(const Extent& e) { return e.kind == Kind::kEncoded || e.length >= kWorthATask; }

/// Whether `next`, which follows `status`, is more of the same.
bool continues(const BlockStatus& status, const BlockStatus& next) {
    return next.data == status.data && next.zero == status.zero && next.allocated == status.allocated &&
           next.compressed == status.compressed && next.encrypted == status.encrypted && next.depth == status.depth &&
           next.has_offset == status.has_offset && next.file == status.file &&
           (!status.has_offset || next.host_offset == status.host_offset + status.length);
}

bool plain_data(const Extent& e) { return e.kind == Kind::kData && !e.transform; }

}  // namespace

Task<Result<>> FormatNode::do_read(Request& rq, uint64_t offset, IoVec iov) {
    if (!recycles_) {
        Extent extent;
        if (map(offset, iov.bytes, extent) == MapResult::kHit && plain_data(extent) && extent.length >= iov.bytes) {
            return extent.node->read(rq, extent.offset, iov);
        }
        return read_extents(rq, offset, iov);
    }
    return read_pass(rq, offset, iov);
}

Task<Result<>> FormatNode::read_pass(Request& rq, uint64_t offset, IoVec iov) {
    Pass pass(*this);
    Extent extent;
    if (map(offset, iov.bytes, extent) == MapResult::kHit && plain_data(extent) && extent.length >= iov.bytes) {
        co_return co_await extent.node->read(rq, extent.offset, iov);
    }
    co_return co_await read_extents(rq, offset, iov);
}

/// Reads of parts of one request that run at the same time, on the request's loop.
struct FormatNode::SideBySide {
    TaskScope scope;
    WaitQueue done;
    unsigned running = 0;
    std::optional<Error> error;  // the first
};

Task<Result<>> FormatNode::read_extent(Request& rq, const Extent& extent, uint64_t offset, IoVec iov) {
    switch (extent.kind) {
        case Kind::kZero:
            fill_iovec(iov, 0, iov.bytes);
            break;
        case Kind::kUnallocated:
            return read_backing(rq, offset, iov);
        case Kind::kData:
            if (extent.transform) return read_transformed(rq, extent, offset, iov);
            return extent.node->read(rq, extent.offset, iov);
        case Kind::kEncoded:
            return read_encoded(rq, extent, offset, iov);
    }
    return ready_task(Result<>());
}

Task<void> FormatNode::read_beside(Request& rq, Extent extent, uint64_t offset, IoVec iov, uint64_t skip,
                                   SideBySide* reads) {
    const IoVecSlice slice(iov, skip, extent.length);
    Result<> read = co_await read_extent(rq, extent, offset, slice.view());
    if (!read && !reads->error) reads->error = std::move(read).error();
    reads->running--;
    reads->done.notify_one();
}

Task<Result<>> FormatNode::read_extents(Request& rq, uint64_t offset, IoVec iov) {
    const uint64_t end = offset + iov.bytes;
    std::optional<SideBySide> reads;
    Result<> result;
    for (uint64_t pos = offset; pos < end;) {
        Extent extent;
        if (!hit(pos, end - pos, extent)) {
            Result<Extent> loaded = co_await miss(rq, pos, end - pos);
            if (!loaded) {
                result = std::unexpected(std::move(loaded).error());
                break;
            }
            extent = *loaded;
        }
        const bool last = pos + extent.length == end;
        if (extent.kind == Kind::kZero) {
            fill_iovec(iov, pos - offset, extent.length);
        } else if (!last && worth_its_own_task(extent)) {
            if (!reads) reads.emplace();
            while (reads->running >= kSideBySide) co_await reads->done.wait();
            if (reads->error) break;
            reads->running++;
            reads->scope.spawn(read_beside(rq, extent, pos, iov, pos - offset, &*reads));
        } else {
            const IoVecSlice slice(iov, pos - offset, extent.length);
            result = co_await read_extent(rq, extent, pos, slice.view());
            if (!result) break;
        }
        pos += extent.length;
    }
    if (reads) {
        co_await reads->scope.join();
        if (result && reads->error) result = std::unexpected(std::move(*reads->error));
    }
    co_return result;
}

Task<Result<>> FormatNode::read_backing(Request& rq, uint64_t offset, IoVec iov) {
    Node* below = backing();
    if (!below || offset >= below->size()) {
        fill_iovec(iov, 0, iov.bytes);
        return ready_task(Result<>());
    }
    return below->read(rq, offset, iov);  // beyond its end: zeroes
}

Task<Result<>> FormatNode::read_transformed(Request& rq, Extent extent, uint64_t offset, IoVec iov) {
    Buffer bounce = Buffer::alloc(std::min<uint64_t>(iov.bytes, kBounce));
    for (uint64_t done = 0; done < iov.bytes;) {
        const uint64_t part = std::min<uint64_t>(iov.bytes - done, bounce.size());
        const iovec one = bounce.iov(0, part);
        CO_CHECK(co_await extent.node->read(rq, extent.offset + done, IoVec(one)));
        CO_CHECK(co_await decode_in_place(rq, offset + done, extent.offset + done, IoVec(one)));
        copy_to_iovec(iov, done, bounce.data(), part);
        done += part;
    }
    co_return Result<>();
}

int FormatNode::do_try_read(Request& rq, uint64_t offset, const IoVec& iov) {
    Pass pass(*this);
    const uint64_t end = offset + iov.bytes;
    for (uint64_t pos = offset; pos < end;) {
        Extent extent;
        if (!hit(pos, end - pos, extent)) return kAgain;
        Node* below = nullptr;
        uint64_t at = 0;
        uint64_t stored = 0;  // bytes to be read from `below`; the rest of the extent is zeroes
        if (extent.kind == Kind::kData) {
            if (extent.transform) return kAgain;
            below = extent.node;
            at = extent.offset;
            stored = extent.length;
        } else if (extent.kind == Kind::kUnallocated && backing() && pos < backing()->size()) {
            below = backing();
            at = pos;
            stored = std::min(extent.length, below->size() - pos);
        } else if (extent.kind == Kind::kEncoded) {
            return kAgain;
        }
        if (stored == iov.bytes) return below->try_read(rq, at, iov);
        if (stored) {
            const IoVecSlice slice(iov, pos - offset, stored);
            if (int r = below->try_read(rq, at, slice.view()); r != 0) return r;
        }
        if (stored < extent.length) fill_iovec(iov, pos - offset + stored, extent.length - stored);
        pos += extent.length;
    }
    return 0;
}

bool FormatNode::own_status(const Extent& extent, uint64_t offset, uint64_t length, BlockStatus& status) const {
    status = {};
    status.length = std::min(extent.length, length);
    status.allocated = extent.allocated;
    status.depth = extent.allocated ? 1 : 0;
    switch (extent.kind) {
        case Kind::kZero:
            status.zero = true;
            break;
        case Kind::kData:
            status.data = true;
            status.allocated = true;
            status.depth = 1;
            status.encrypted = extent.transform;
            status.file = extent.node;
            status.host_offset = extent.offset;
            status.has_offset = !extent.transform;
            break;
        case Kind::kEncoded:
            status.data = true;
            status.allocated = true;
            status.depth = 1;
            status.compressed = true;
            break;
        case Kind::kUnallocated:
            if (backing() && offset < backing()->size()) return false;
            status.zero = true;
            break;
    }
    return true;
}

Task<Result<BlockStatus>> FormatNode::status_of(Request& rq, Extent extent, uint64_t offset, uint64_t length) {
    BlockStatus status;
    if (own_status(extent, offset, length, status)) co_return status;
    Node* below = backing();
    const uint64_t asked = std::min(status.length, below->size() - offset);
    CO_TRY(status, co_await below->block_status(rq, offset, asked));
    status.allocated = false;
    if (status.depth) status.depth++;
    co_return status;
}

Task<Result<BlockStatus>> FormatNode::do_block_status(Request& rq, uint64_t offset, uint64_t length) {
    Pass pass(*this);
    Extent first;
    if (!hit(offset, length, first)) {
        CO_TRY(first, co_await miss(rq, offset, length));
    }
    CO_TRY(BlockStatus status, co_await status_of(rq, first, offset, length));
    for (unsigned step = 0; step < kStatusSteps && status.length < length; step++) {
        const uint64_t pos = offset + status.length;
        Extent extent;
        if (map(pos, length - status.length, extent) != MapResult::kHit) break;
        extent.length = std::min(extent.length, length - status.length);
        CO_TRY(const BlockStatus next, co_await status_of(rq, extent, pos, length - status.length));
        if (!continues(status, next)) break;
        status.length += next.length;
    }
    co_return status;
}

Task<Result<size_t>> FormatNode::do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                                   std::span<BlockStatus> out) {
    Pass pass(*this);
    const uint64_t end = offset + length;
    size_t count = 0;
    unsigned steps = 0;
    for (uint64_t pos = offset; pos < end && count < out.size();) {
        Extent extent;
        if (map(pos, end - pos, extent) != MapResult::kHit) {
            CO_TRY(extent, co_await load_map(rq, pos, end - pos));
        }
        CHECK(extent.length > 0, "a map must make progress");
        extent.length = std::min(extent.length, end - pos);
        BlockStatus status;
        if (own_status(extent, pos, end - pos, status)) {
            pos += status.length;
            if (count && continues(out[count - 1], status)) {
                out[count - 1].length += status.length;
                if (++steps < kStatusSteps) continue;
                break;  // one long part takes its time, too
            }
            out[count++] = status;
            continue;
        }
        Node* below = backing();
        const uint64_t asked = std::min(extent.length, below->size() - pos);
        CO_TRY(const size_t more, co_await below->block_statuses(rq, pos, asked, out.subspan(count)));
        for (size_t i = 0; i < more; i++) {
            BlockStatus& one = out[count + i];
            one.allocated = false;
            if (one.depth) one.depth++;
            pos += one.length;
        }
        count += more;
    }
    co_return count;
}

Task<Result<bool>> FormatNode::reads_as_zero(Request& rq, uint64_t begin, uint64_t end) {
    end = std::min(end, size());
    for (uint64_t pos = begin; pos < end;) {
        Extent extent;
        if (!hit(pos, end - pos, extent)) {
            CO_TRY(extent, co_await miss(rq, pos, end - pos));
        }
        if (extent.kind == Kind::kData || extent.kind == Kind::kEncoded) co_return false;
        uint64_t length = extent.length;
        if (extent.kind == Kind::kUnallocated) {
            CO_TRY(const BlockStatus status, co_await status_of(rq, extent, pos, length));
            if (!status.zero) co_return false;
            length = status.length;
        }
        pos += length;
    }
    co_return true;
}

}  // namespace gantry::block
