// A disk becomes larger or smaller (spec/qcow2.md section 16).

#include <algorithm>

#include "block/bitmap.h"
#include "block/formats/qcow2/compaction.h"
#include "block/formats/qcow2/refusal.h"
#include "block/formats/qcow2/resize_steps.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) & ~(unit - 1); }

Result<> follow_bitmaps(Qcow2Node& node, uint64_t size) {
    for (const auto& bitmap : node.bitmaps()) {
        if (bitmap->size() != size) CHECK_OK(bitmap->resize(size));
    }
    return {};
}

/// What is above the old end must read as zeroes: the rest of the last cluster, and what a longer backing file has
/// there.
Task<Result<>> hide_old_contents(Qcow2Node& node, uint64_t old_size, uint64_t new_size) {
    uint64_t end = std::min(new_size, round_up(old_size, node.geometry().cluster_size()));
    if (node.backing()) end = std::max(end, std::min(new_size, node.backing()->size()));
    Request rq = Request::internal();
    for (uint64_t at = old_size; at < end;) {
        CO_TRY(const BlockStatus status, co_await node.block_status(rq, at, end - at));
        if (!status.zero) CO_CHECK(co_await node.write_zeroes(rq, at, status.length, WriteFlags::kMayUnmap));
        at += status.length;
    }
    co_return Result<>();
}

/// An external data file has the length of the disk.
Task<Result<>> resize_data_file(Qcow2Node& node, uint64_t size) {
    if (!node.geometry().external_data || node.data().size() == size) co_return Result<>();
    const ImageFile data(node.name(), node.data());
    Result<> resized = co_await data.truncate(size);
    // Only a raw data file must have the length of the disk; another one grows when it is written to.
    if (!resized && node.geometry().raw_external_data) co_return resized;
    if (!resized)
        log::debug("node '{}': its data file stays as long as it is: {}", node.name(), resized.error().message());
    co_return Result<>();
}

/// With the new size in memory only: what a failure leaves above the old end is dropped by the next growth.
Task<Result<>> fill_growth(Qcow2Node& node, uint64_t old_size, Preallocation preallocation, Progress progress) {
    const uint64_t new_size = node.size();
    CO_CHECK(follow_bitmaps(node, new_size));
    CO_CHECK(co_await resize_data_file(node, new_size));
    CO_CHECK(co_await hide_old_contents(node, old_size, new_size));
    if (preallocation != Preallocation::kOff) {
        CO_CHECK(co_await preallocate(node, old_size, new_size, preallocation, std::move(progress)));
    }
    co_return co_await node.metadata()->flush();
}

Task<Result<>> grow(Qcow2Node& node, uint64_t new_size, Preallocation preallocation, Progress progress) {
    Operation op(node);
    CO_CHECK(co_await op.begin());
    const uint64_t old_size = op.header().size;
    const uint64_t entries = std::max<uint64_t>(op.header().l1_size, op.geometry().l1_entries_for(new_size));
    // The state of a virtual machine may lie above the disk; it would show in what is added.
    Result<> ready = co_await cut_mappings(op, old_size, entries, old_size);
    if (!ready) {
        co_await op.give_back();
        co_return ready;
    }
    op.unlock();

    op.image().disk_size = new_size;
    node.take_size(new_size);
    Result<> grown = co_await fill_growth(node, old_size, preallocation, std::move(progress));
    if (grown) {
        co_await op.lock();
        grown = co_await op.switch_mapping(new_size, op.header().l1_size, op.header().l1_table_offset);
    }
    if (grown) co_return grown;
    op.image().disk_size = old_size;
    node.take_size(old_size);
    (void)follow_bitmaps(node, old_size);
    co_return grown;
}

Task<Result<>> shrink(Qcow2Node& node, uint64_t new_size) {
    Operation op(node);
    CO_CHECK(co_await op.begin());
    Result<> cut = co_await cut_mappings(op, new_size, op.geometry().l1_entries_for(new_size), new_size);
    if (!cut) {
        co_await op.give_back();
        co_return cut;
    }
    CO_CHECK(follow_bitmaps(node, new_size));
    CO_CHECK(co_await resize_data_file(node, new_size));
    // The new tables were made while the old ones filled the file.
    Compaction compaction(op, {});
    Result<> moved = co_await compaction.run_metadata();
    if (!moved) co_await op.give_back();
    co_return moved;
}

}  // namespace

Task<Result<>> Qcow2Node::do_resize(uint64_t new_size) { return resize(new_size, Preallocation::kOff, true, {}); }

Task<Result<>> Qcow2Node::resize(uint64_t new_size, Preallocation preallocation, bool allow_shrink, Progress progress) {
    CO_CHECK(check_writable());
    const Header& h = image_.header;
    if (new_size % 512 != 0) co_return fail(ErrorKind::kInvalid, "The new size must be a multiple of 512");
    if (new_size == h.size) co_return Result<>();
    if (h.version < 3 && !image_.snapshots.empty()) {
        co_return refuse(ErrorKind::kUnsupported, name(), "Can't resize a v2 image which has snapshots",
                         "{} snapshots of a version 2 image do not know their disk size", image_.snapshots.size());
    }
    if (new_size > kMaxOffset || geometry().l1_entries_for(new_size) > kMaxL1Entries) {
        co_return refuse(ErrorKind::kTooLarge, name(), "Failed to grow the L1 table: File too large",
                         "clusters of {} bytes cannot hold a disk of {} bytes", cluster_size(), new_size);
    }
    if (new_size > h.size) {
        Result<> grown = co_await grow(*this, new_size, preallocation, std::move(progress));
        fit_caches();
        co_return grown;
    }
    if (preallocation != Preallocation::kOff) {
        co_return fail(ErrorKind::kInvalid, "Preallocation can't be used for shrinking an image");
    }
    if (!allow_shrink) {
        co_return fail(ErrorKind::kInvalid,
                       "Use the --shrink option to perform a shrink operation.; node '{}': from {} to {} bytes", name(),
                       h.size, new_size);
    }
    Result<> shrunk = co_await shrink(*this, new_size);
    fit_caches();
    co_return shrunk;
}

}  // namespace gantry::block::qcow2
