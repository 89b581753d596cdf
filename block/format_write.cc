// FormatNode: writes, in place and by plans.

#include <sys/uio.h>

#include <algorithm>
#include <vector>

#include "block/align.h"
#include "block/format_node.h"
#include "block/zero_data.h"
#include "runtime/buffer.h"

namespace gantry::block {
namespace {

using Kind = Extent::Kind;

constexpr uint64_t kBounce = 1 << 20;
constexpr uint64_t kMaxClaim = 4 << 20;  // guest bytes claimed for one plan
constexpr uint64_t kZeroesInline =
    64 << 10;                // zero edges up to this size are written with the data, larger ones by write_zeroes
constexpr int kAgain = -11;  // -EAGAIN

bool writable_in_place(const Extent& e) { return e.kind == Kind::kData && !e.must_copy; }

void append(std::vector<iovec>& list, const IoVec& part) { list.insert(list.end(), part.data, part.data + part.count); }

IoVec view_of(const std::vector<iovec>& list, uint64_t bytes) {
    return IoVec(list.data(), static_cast<uint32_t>(list.size()), bytes);
}

}  // namespace

Task<Result<>> FormatNode::do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    return write_extents(rq, offset, iov, flags);
}

int FormatNode::do_try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) {
    Pass pass(*this);
    Extent extent;
    if (map(offset, iov.bytes, extent) != MapResult::kHit || !writable_in_place(extent) || extent.transform)
        return kAgain;
    extent.length = std::min<uint64_t>(extent.length, iov.bytes);
    extend(offset, iov.bytes, extent);
    if (extent.length < iov.bytes || !write_allowed(extent.offset, extent.length)) return kAgain;
    return extent.node->try_write(rq, extent.offset, iov, WriteFlags::kNone);
}

Task<Result<>> FormatNode::write_extents(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    Pass pass(*this);
    const uint64_t end = offset + iov.bytes;
    for (uint64_t pos = offset; pos < end;) {
        if (has(flags, WriteFlags::kCompressed)) {
            const IoVecSlice rest(iov, pos - offset, end - pos);
            CO_TRY(const uint64_t done, co_await write_one_compressed(rq, pos, rest.view()));
            pos += done;
            if (done) continue;
        }
        Extent extent;
        if (!hit(pos, end - pos, extent)) {
            CO_TRY(extent, co_await miss(rq, pos, end - pos));
        }
        if (writable_in_place(extent)) {
            const IoVecSlice slice(iov, pos - offset, extent.length);
            if (!write_allowed(extent.offset, extent.length)) {
                co_return std::unexpected(co_await write_refused(rq, extent.offset, extent.length));
            }
            CO_CHECK(co_await write_in_place(rq, extent.node, extent.offset, extent.transform, pos, slice.view()));
            pos += extent.length;
            continue;
        }
        const IoVecSlice rest(iov, pos - offset, end - pos);
        CO_TRY(const uint64_t done, co_await write_planned(rq, pos, rest.view(), flags));
        pos += done;
    }
    co_return Result<>();
}

Task<Result<>> FormatNode::write_in_place(Request& rq, Node* node, uint64_t host, bool transform, uint64_t offset,
                                          IoVec iov) {
    if (!transform) return node->write(rq, host, iov);
    return write_encoded(rq, node, host, offset, iov);
}

Task<Result<>> FormatNode::write_encoded(Request& rq, Node* node, uint64_t host, uint64_t offset, IoVec iov) {
    Buffer bounce = Buffer::alloc(std::min<uint64_t>(iov.bytes, kBounce));
    for (uint64_t done = 0; done < iov.bytes;) {
        const uint64_t part = std::min<uint64_t>(iov.bytes - done, bounce.size());
        const iovec one = bounce.iov(0, part);
        copy_from_iovec(iov, done, bounce.data(), part);
        CO_CHECK(co_await encode_in_place(rq, offset + done, host + done, IoVec(one)));
        CO_CHECK(co_await node->write(rq, host + done, IoVec(one)));
        done += part;
    }
    co_return Result<>();
}

Task<Result<uint64_t>> FormatNode::write_planned(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    const uint64_t end = offset + iov.bytes;
    const uint32_t unit = write_unit(offset);
    const uint64_t claim_begin = align_down(offset, unit);
    const uint64_t limit = claim_begin + std::max<uint64_t>(unit, kMaxClaim);
    const uint64_t claim_end = std::min(align_up(end, unit), limit);
    TrackedRequests::Entry claim(claims_, claim_begin, claim_end, true);
    while (claim.blocked()) co_await claim.turn();
    // Whoever held it before may have taken the cluster away as a whole: then a larger unit is to be claimed.
    if (write_unit(offset) > unit) co_return 0;

    CO_TRY(WritePlan plan, co_await plan_write(rq, offset, std::min(end, claim_end) - offset, flags));
    CHECK(plan.guest_offset == offset && plan.length > 0 && plan.length <= std::min(end, claim_end) - offset,
          "a write plan covers the beginning of what was asked");
    const IoVecSlice slice(iov, 0, plan.length);
    if (plan.in_place) {
        claim.release();
        CO_CHECK(co_await write_in_place(rq, plan.node, plan.host_offset, transforms_writes(), offset, slice.view()));
        co_return plan.length;
    }
    CHECK(plan.copy_begin >= claim_begin && plan.copy_begin <= offset && plan.copy_end >= offset + plan.length &&
              plan.copy_end <= claim_end,
          "a write plan copies inside what was claimed");
    claim.shrink(plan.copy_end);

    Result<> written = co_await write_plan_bytes(rq, plan, slice.view());
    if (!written) {
        co_await abort_write(rq, plan);
        co_return std::unexpected(std::move(written).error());
    }
    CO_CHECK(co_await commit_write(rq, plan));
    co_return plan.length;
}

Task<Result<>> FormatNode::read_edge(Request& rq, uint64_t offset, IoVec iov) {
    const uint64_t end = size();
    const uint64_t inside = offset < end ? std::min<uint64_t>(iov.bytes, end - offset) : 0;
    if (inside < iov.bytes) fill_iovec(iov, inside, iov.bytes - inside);
    if (inside == 0) co_return Result<>();
    const IoVecSlice slice(iov, 0, inside);
    co_return co_await read_extents(rq, offset, slice.view());
}

Task<Result<>> FormatNode::write_plan_bytes(Request& rq, WritePlan& plan, IoVec iov) {
    const uint64_t guest_end = plan.guest_offset + plan.length;
    const uint64_t head = plan.guest_offset - plan.copy_begin;
    const uint64_t tail = plan.copy_end - guest_end;
    const uint64_t host_begin = plan.host_offset - head;
    const bool encode = transforms_writes();
    const ZeroData zeroes;
    std::vector<iovec> list;
    list.reserve(iov.count + 4);
    uint64_t bytes = 0;
    uint64_t first = host_begin;  // where the list begins
    bool copied = false;
    Buffer head_data;
    Buffer tail_data;

    // An edge is skipped (the place reads as zeroes already), zeroed beforehand (too large to write), or part of the
    // write.
    for (const bool is_head : {true, false}) {
        const uint64_t length = is_head ? head : tail;
        const uint64_t guest = is_head ? plan.copy_begin : guest_end;
        const uint64_t host = is_head ? host_begin : plan.host_offset + plan.length;
        bool part_of_write = length > 0;
        if (length) {
            CO_TRY(const bool zero, co_await reads_as_zero(rq, guest, guest + length));
            if (zero && !encode && plan.fresh_reads_zero) {
                part_of_write = false;
            } else if (zero && !encode && length > kZeroesInline) {
                CO_CHECK(co_await plan.node->write_zeroes(rq, host, length, WriteFlags::kNone));
                part_of_write = false;
                copied = true;
            } else if (zero && length <= ZeroData::kLimit) {
                append(list, zeroes.slice(length).view());
                copied = true;  // zeroes that were stable: after a crash the place must not show what it held before
            } else {
                Buffer& buffer = is_head ? head_data : tail_data;
                buffer = Buffer::alloc(length);
                list.push_back(buffer.iov());
                const iovec edge = list.back();
                CO_CHECK(co_await read_edge(rq, guest, IoVec(edge)));
                copied = true;
            }
            if (part_of_write) bytes += length;
        }
        if (is_head) {
            if (!part_of_write) first = plan.host_offset;
            append(list, iov);
            bytes += iov.bytes;
        }
    }

    plan.copied = copied;
    const IoVec all = view_of(list, bytes);
    if (encode) {
        CO_CHECK(co_await write_encoded(rq, plan.node, first, plan.copy_begin, all));
    } else {
        CO_CHECK(co_await plan.node->write(rq, first, all));
    }
    if (copied && plan.flush_copied_first) CO_CHECK(co_await plan.node->flush(rq));
    co_return Result<>();
}

Task<Result<uint64_t>> FormatNode::write_one_compressed(Request& rq, uint64_t offset, IoVec iov) {
    const uint64_t cluster = cluster_size();
    if (cluster == 0 || offset % cluster != 0) co_return 0;
    const uint64_t length = std::min(cluster, size() - offset);
    if (iov.bytes < length) co_return 0;
    TrackedRequests::Entry claim(claims_, offset, offset + cluster, true);
    while (claim.blocked()) co_await claim.turn();
    const IoVecSlice slice(iov, 0, length);
    Result<> done = co_await write_compressed(rq, offset, slice.view());
    if (done) co_return length;
    if (done.error().kind() == ErrorKind::kUnsupported) co_return 0;
    co_return std::unexpected(std::move(done).error());
}

}  // namespace gantry::block
