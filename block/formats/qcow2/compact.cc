// Moving what lies high into holes further down, and cutting the file.

#include <algorithm>

#include "block/formats/qcow2/compaction.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/resize_steps.h"

namespace gantry::block::qcow2 {

namespace {

/// Clusters whose references are collected at once.
constexpr uint64_t kWindow = uint64_t{1} << 18;

/// Moves an L1 table to a lower place; 0: there is none.
Task<Result<uint64_t>> lower_copy(Operation& op, uint64_t offset, const std::vector<uint64_t>& words) {
    CO_TRY(const uint64_t place, co_await op.allocate(words.size() * 8));
    if (place < offset) {
        CO_CHECK(co_await op.write_l1(place, words));
        co_return place;
    }
    co_await op.give_back();
    co_return 0;
}

/// Tables that were moved carry their marks already.
void publish_tables(Operation& op, const std::vector<uint64_t>& words) {
    mark_tables(op.metadata().overlap(), Structure::kActiveL2, words, op.geometry().cluster_size(), false);
    op.publish_mapping(words);
}

uint64_t l1_bytes(uint64_t entries) { return entries * 8; }

Task<Result<>> lower_active_l1(Operation& op, const std::vector<uint64_t>& words) {
    const uint64_t old = op.header().l1_table_offset;
    CO_TRY(const uint64_t place, co_await lower_copy(op, old, words));
    if (place == 0) co_return Result<>();
    CO_CHECK(co_await op.stabilise());
    CO_CHECK(co_await op.switch_mapping(op.header().size, words.size(), place));
    publish_tables(op, words);
    CO_CHECK(co_await op.release(old, l1_bytes(words.size())));
    co_return co_await op.finish(false);
}

/// L1 tables of snapshots from `target` on, and the table that names them: one at a time, so that what one leaves is
/// there for the next.
Task<Result<>> lower_snapshot(Operation& op, size_t index, uint64_t target) {
    std::vector<Snapshot> snapshots = op.image().snapshots;
    const Snapshot old = snapshots[index];
    const uint64_t old_table = op.header().snapshots_offset;
    const uint64_t old_table_bytes = stored_bytes(snapshots);
    uint64_t place = 0;
    if (old.l1_table_offset >= target) {
        CO_TRY(const std::vector<uint64_t> words, co_await op.read_l1(old.l1_table_offset, old.l1_size));
        CO_TRY(place, co_await lower_copy(op, old.l1_table_offset, words));
    }
    if (place != 0) snapshots[index].l1_table_offset = place;
    const std::vector<uint8_t> bytes = encode_snapshot_table(snapshots, op.header().size);
    if (bytes.size() > kMaxSnapshotTableBytes) co_return Result<>();
    CO_TRY(const uint64_t table, co_await op.allocate(bytes.size()));
    if (place == 0 && table >= old_table) {
        co_await op.give_back();
        co_return Result<>();
    }
    CO_CHECK(co_await op.write_padded(table, bytes, "snapshot table"));
    CO_CHECK(co_await op.stabilise());
    CO_CHECK(co_await op.switch_snapshots(std::move(snapshots), table));
    CO_CHECK(co_await op.release(old_table, old_table_bytes));
    if (place != 0) {
        OverlapMap& overlap = op.metadata().overlap();
        overlap.remove(Structure::kInactiveL1, old.l1_table_offset, l1_bytes(old.l1_size));
        overlap.add(Structure::kInactiveL1, place, l1_bytes(old.l1_size));
        CO_CHECK(co_await op.release(old.l1_table_offset, l1_bytes(old.l1_size)));
    }
    co_return co_await op.finish(false);
}

}  // namespace

Compaction::Compaction(Operation& op, Progress progress) : op_(op), progress_(std::move(progress)) {}

/// What is in use, and how far down it could end.
Task<Result<>> Compaction::look() {
    CO_TRY(const uint64_t end, co_await op_.refcounts().end_of_use());
    used_.assign(end, false);
    target_ = 0;
    for (uint64_t c = 0; c < end; c++) {
        CO_TRY(const uint64_t count, co_await op_.refcounts().get(c));
        if (count == 0) continue;
        used_[c] = true;
        target_++;
    }
    total_ = 0;
    for (uint64_t c = target_; c < end; c++) total_ += used_[c];
    CO_TRY(cluster_, Buffer::try_alloc(op_.geometry().cluster_size()));
    CO_TRY(active_l1_, co_await op_.read_l1(op_.header().l1_table_offset, op_.header().l1_size));
    co_return Result<>();
}

Task<Result<>> Compaction::step(uint64_t clusters) {
    done_ = std::min(total_, done_ + clusters);
    if (progress_ && !progress_(done_, total_)) co_return fail(ErrorKind::kCancelled, "Operation canceled");
    co_return Result<>();
}

Task<Result<>> Compaction::move_all(What what) {
    if (what != What::kTables && op_.geometry().external_data) co_return Result<>();
    for (uint64_t begin = target_; begin < used_.size();) {
        uint64_t end = begin;
        for (uint64_t found = 0; end < used_.size() && found < kWindow; end++) found += used_[end];
        CO_CHECK(co_await collect(what, begin, end));
        if (what == What::kBlobs) {
            CO_CHECK(co_await move_blobs());
        } else {
            CO_CHECK(co_await move_clusters(what));
        }
        begin = end;
    }
    co_return Result<>();
}

Task<Result<>> Compaction::move_pointers() {
    const uint64_t target = bytes(target_);
    if (op_.header().l1_table_offset >= target) CO_CHECK(co_await lower_active_l1(op_, active_l1_));
    for (size_t i = 0; i < op_.image().snapshots.size(); i++) {
        const bool l1_high = op_.image().snapshots[i].l1_table_offset >= target;
        const bool table_high = i == 0 && op_.header().snapshots_offset >= target;
        if (l1_high || table_high) CO_CHECK(co_await lower_snapshot(op_, i, target));
    }
    co_return Result<>();
}

/// Holes that are left give their space back.
Task<Result<>> Compaction::return_holes() {
    CO_TRY(const uint64_t end, co_await op_.refcounts().end_of_use());
    uint64_t begin = 0;
    for (uint64_t c = 0; c <= end; c++) {
        uint64_t count = 1;
        if (c < end) {
            CO_TRY(count, co_await op_.refcounts().get(c));
        }
        if (count == 0) continue;
        if (c > begin) co_await op_.file().discard(bytes(begin), bytes(c - begin));
        begin = c + 1;
    }
    co_return Result<>();
}

/// Entries that may still name an old table in the file are written again before anything is written through them.
void Compaction::publish() {
    publish_tables(op_, active_l1_);
    for (const uint64_t index : unsure_l1_) op_.metadata().l1().set(index, active_l1_[index]);
}

Task<Result<>> Compaction::move_metadata() {
    CO_CHECK(co_await move_all(What::kTables));
    co_return co_await move_pointers();
}

Task<Result<>> Compaction::run() {
    CO_CHECK(co_await look());
    Result<> moved = co_await step(0);
    if (moved) moved = co_await move_all(What::kData);
    if (moved) moved = co_await move_all(What::kBlobs);
    if (moved) moved = co_await move_metadata();
    publish();
    CO_CHECK(co_await op_.stabilise());
    CO_CHECK(std::move(moved));
    CO_CHECK(co_await cut_file(op_));
    CO_CHECK(co_await return_holes());
    co_return co_await step(total_);
}

Task<Result<>> Compaction::run_metadata() {
    CO_CHECK(co_await look());
    Result<> moved = co_await move_metadata();
    publish();
    CO_CHECK(co_await op_.stabilise());
    CO_CHECK(std::move(moved));
    co_return co_await cut_file(op_);
}

Task<Result<>> Qcow2Node::compact(Progress progress) {
    CO_CHECK(check_writable());
    Operation op(*this);
    CO_CHECK(co_await op.begin());
    Compaction compaction(op, std::move(progress));
    Result<> done = co_await compaction.run();
    decoded_.forget_all();  // they are known by their old places
    if (!done) co_await op.give_back();
    co_return done;
}

}  // namespace gantry::block::qcow2
