#include "block/request_layer.h"

#include <algorithm>

#include "block/align.h"
#include "block/bitmap.h"
#include "runtime/loop.h"

namespace gantry::block {

Request Request::internal() {
    Request rq;
    rq.loop = &Loop::current();
    return rq;
}

bool RequestLayer::fits(const Limits& l, uint64_t offset, const IoVec& iov) {
    if (l.max_transfer && iov.bytes > l.max_transfer) return false;
    if (iov.count > l.max_iov) return false;
    if (l.request_alignment > 1 && ((offset | iov.bytes) & (l.request_alignment - 1))) return false;
    return l.memory_alignment <= 1 || memory_aligned(iov, l.memory_alignment);
}

bool RequestLayer::plain_write(const Node& n, WriteFlags flags) {
    WriteFlags harmless = WriteFlags::kUnchanged | WriteFlags::kCompressed;
    if (n.limits_.supports_fua && !n.flags_.cache_no_flush) harmless = harmless | WriteFlags::kFua;
    return (flags & ~harmless) == WriteFlags::kNone && !n.read_only() && !tracks(n) && n.bitmaps_.empty() &&
           n.flags_.detect_zeroes == DetectZeroes::kOff;
}

// ---- Verbs: what fits goes straight to the driver, without a frame of ours ----

Task<Result<>> Node::read(Request& rq, uint64_t offset, IoVec iov) {
    const uint64_t end = size();
    if (offset <= end && iov.bytes <= end - offset && iov.bytes && RequestLayer::fits(limits_, offset, iov)) {
        return do_read(rq, offset, iov);
    }
    return RequestLayer::read(*this, rq, offset, iov);
}

Task<Result<>> Node::write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    const uint64_t end = size();
    if (offset <= end && iov.bytes <= end - offset && iov.bytes && RequestLayer::plain_write(*this, flags) &&
        RequestLayer::fits(limits_, offset, iov)) {
        note_highest(offset + iov.bytes);
        return do_write(rq, offset, iov, flags);
    }
    return RequestLayer::write(*this, rq, offset, iov, flags);
}

Task<Result<>> Node::write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    return RequestLayer::write_zeroes(*this, rq, offset, length, flags);
}

Task<Result<>> Node::discard(Request& rq, uint64_t offset, uint64_t length) {
    return RequestLayer::discard(*this, rq, offset, length);
}

Task<Result<>> Node::flush(Request& rq) {
    // Formats and filters pass it on also then: their metadata must reach the page cache (survives kill -9).
    if (flags_.cache_no_flush && children_.empty()) return ready_task(Result<>());
    return RequestLayer::flush(*this, rq);
}

Task<Result<>> Node::preload(Request& rq, uint64_t offset, uint64_t length) {
    const uint64_t end = size();
    if (offset >= end || length == 0) return ready_task(Result<>());
    return do_preload(rq, offset, std::min(length, end - offset));
}

Task<Result<BlockStatus>> Node::block_status(Request& rq, uint64_t offset, uint64_t length) {
    return RequestLayer::block_status(*this, rq, offset, length);
}

Task<Result<size_t>> Node::block_statuses(Request& rq, uint64_t offset, uint64_t length, std::span<BlockStatus> out) {
    return RequestLayer::block_statuses(*this, rq, offset, length, out);
}

// ---- Defaults of drivers ----

Task<Result<>> Node::do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    co_return fail(ErrorKind::kReadOnly, "node '{}': driver '{}' cannot write", name_, driver_);
}

Task<Result<>> Node::do_write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' has no write-zeroes", name_, driver_);
}

Task<Result<>> Node::do_discard(Request& rq, uint64_t offset, uint64_t length) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' has no discard", name_, driver_);
}

Task<Result<>> Node::do_flush(Request& rq) { co_return Result<>(); }

Task<Result<>> Node::do_preload(Request& rq, uint64_t offset, uint64_t length) { co_return Result<>(); }

Task<Result<BlockStatus>> Node::do_block_status(Request& rq, uint64_t offset, uint64_t length) {
    BlockStatus status;
    status.length = length;
    status.data = true;
    status.allocated = true;
    status.depth = 1;
    status.file = this;
    status.host_offset = offset;
    status.has_offset = true;
    co_return status;
}

Task<Result<size_t>> Node::do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                             std::span<BlockStatus> out) {
    CO_TRY(out[0], co_await do_block_status(rq, offset, length));
    co_return size_t{1};
}

Task<Result<>> Node::do_resize(uint64_t new_size) {
    co_return fail(ErrorKind::kUnsupported, "Image format driver does not support resize; node '{}' uses driver '{}'",
                   name_, driver_);
}

// ---- State that the verbs look at ----

void Node::grow_size(uint64_t bytes) {
    uint64_t seen = size_.load(std::memory_order_relaxed);
    while (seen < bytes && !size_.compare_exchange_weak(seen, bytes, std::memory_order_acq_rel)) {
    }
}

void Node::set_read_only(bool ro) {
    read_only_.store(ro, std::memory_order_relaxed);
    update_fast_paths();
}

void Node::allow_fast_paths(bool read, bool write) {
    fast_read_allowed_ = read;
    fast_write_allowed_ = write;
    update_fast_paths();
}

void Node::track_requests() {
    track_ = true;
    update_fast_paths();
}

void Node::add_bitmap(std::shared_ptr<DirtyBitmap> bitmap) {
    bitmaps_.push_back(std::move(bitmap));
    update_fast_paths();
}

void Node::remove_bitmap(const DirtyBitmap& bitmap) {
    std::erase_if(bitmaps_, [&](const auto& held) { return held.get() == &bitmap; });
    update_fast_paths();
}

void Node::update_fast_paths() {
    const bool unaligned = limits_.request_alignment <= 1 && limits_.memory_alignment <= 1;
    fast_read_.store(fast_read_allowed_ && unaligned, std::memory_order_relaxed);
    fast_write_.store(fast_write_allowed_ && unaligned && RequestLayer::plain_write(*this, WriteFlags::kNone),
                      std::memory_order_relaxed);
}

}  // namespace gantry::block
