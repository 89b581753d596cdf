// Places for guest clusters that nobody has written yet.

#include <algorithm>

#include "block/formats/qcow2/resize_steps.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kBufferBytes = uint64_t{2} << 20;
constexpr uint64_t kPlanBytes = uint64_t{256} << 20;  // asked of one plan; it may answer for less

/// The bytes at a plan's place read as zeroes afterwards, and lie inside the file.
Task<Result<>> make_zero(Qcow2Node& node, const WritePlan& plan, Preallocation mode) {
    const uint64_t begin = plan.host_offset - (plan.guest_offset - plan.copy_begin);
    const uint64_t bytes = plan.copy_end - plan.copy_begin;
    if (!plan.fresh_reads_zero || mode != Preallocation::kMetadata) {
        Request rq = Request::internal();
        const WriteFlags flags = mode == Preallocation::kMetadata ? WriteFlags::kMayUnmap : WriteFlags::kNone;
        co_return co_await plan.node->write_zeroes(rq, begin, bytes, flags);
    }
    if (begin + bytes <= node.image_file().size()) co_return Result<>();
    co_return co_await node.image_file().truncate(begin + bytes);
}

Task<Result<uint64_t>> preallocate_piece(Qcow2Node& node, uint64_t at, uint64_t length, Preallocation mode) {
    Request rq = Request::internal();
    CO_TRY(WritePlan plan, co_await node.plan_write(rq, at, std::min(length, kPlanBytes), WriteFlags::kNone));
    if (plan.in_place) co_return plan.length;  // zeroes that hide a longer backing file
    Result<> zeroed = co_await make_zero(node, plan, mode);
    if (!zeroed) {
        co_await node.abort_write(rq, plan);
        co_return std::unexpected(std::move(zeroed).error().context("Could not write zeros for preallocation"));
    }
    const uint64_t done = plan.length;
    CO_CHECK(co_await node.commit_write(rq, plan));
    co_return done;
}

}  // namespace

Task<Result<>> preallocate(Qcow2Node& node, uint64_t begin, uint64_t end, Preallocation mode, Progress progress) {
    const uint64_t cluster = node.geometry().cluster_size();
    // Zeroes are real bytes where they are encrypted.
    const bool write_all = mode == Preallocation::kFull || node.transforms_writes();
    CO_TRY(Buffer zeroes, Buffer::try_alloc(kBufferBytes));
    std::fill(zeroes.data(), zeroes.data() + zeroes.size(), uint8_t{0});
    Request rq = Request::internal();
    for (uint64_t at = begin; at < end;) {
        if (progress && !progress(at - begin, end - begin)) co_return fail(ErrorKind::kCancelled, "Operation canceled");
        const uint64_t in_cluster = at & (cluster - 1);
        if (!write_all && in_cluster == 0) {
            CO_TRY(const uint64_t done, co_await preallocate_piece(node, at, end - at, mode));
            at += done;
            continue;
        }
        const uint64_t most = write_all ? kBufferBytes - in_cluster % kBufferBytes : cluster - in_cluster;
        const uint64_t length = std::min({end - at, most, kBufferBytes});
        const iovec iov = zeroes.iov(0, length);
        CO_CHECK(co_await node.do_write(rq, at, IoVec(iov), WriteFlags::kNone));
        at += length;
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
