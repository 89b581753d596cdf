// Compressed clusters move: each blob on its own, because they share clusters and run on into the next one.

#include <algorithm>

#include "block/formats/qcow2/compaction.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kBatchBlobs = 2048;
constexpr uint64_t kSector = 512;

}  // namespace

/// Where the blob goes; false: no hole holds it. Its place in a sector stays, so that its entry keeps the number of
/// sectors; blobs that share a sector stay together.
Task<Result<bool>> Compaction::place_blob(BlobMove& move) {
    const uint64_t in_sector = move.from % kSector;
    for (;;) {
        uint64_t at = (run_at_ + kSector - 1) / kSector * kSector + in_sector;
        if (!blobs_.empty() && run_at_ != 0 && move.from < source_end_) {
            at = blobs_.back().to + (move.from - blobs_.back().from);
        }
        if (run_at_ != 0 && at + move.bytes <= run_end_) {
            Result<> counted = co_await op_.refcounts().change_bytes(at, move.bytes, static_cast<int64_t>(move.count));
            if (counted) {
                move.to = at;
                run_at_ = at + move.bytes;
                source_end_ = move.from + move.bytes;
                co_return true;
            }
            if (counted.error().kind() != ErrorKind::kInvalid || run_at_ == run_begin_) {
                co_return std::unexpected(std::move(counted).error());
            }
            run_end_ = 0;  // narrow counts: no more blobs in this cluster
        }
        // Another cluster: it continues the run, or begins one.
        CO_TRY(const uint64_t hole, co_await next_hole());
        if (hole == 0) co_return false;
        if (run_end_ == bytes(hole) && run_at_ != 0) {
            run_end_ += bytes(1);
        } else {
            run_at_ = run_begin_ = bytes(hole);
            run_end_ = run_at_ + bytes(1);
            source_end_ = 0;
        }
    }
}

Task<Result<>> Compaction::carry_out_blobs() {
    Buffer data;
    std::vector<std::pair<size_t, uint64_t>> changes;
    for (const BlobMove& move : blobs_) {
        if (data.size() < move.bytes) {
            CO_TRY(data, Buffer::try_alloc(move.bytes));
        }
        const std::span<uint8_t> blob = data.span().first(move.bytes);
        CO_CHECK(co_await op_.file().read(move.from, blob, "compressed cluster"));
        CO_CHECK(co_await op_.file().write(move.to, blob, "compressed cluster"));
        for (size_t i = 0; i < move.refs; i++) changes.emplace_back(move.first_ref + i, move.to);
    }
    CO_CHECK(co_await op_.stabilise());
    CO_CHECK(co_await change_tables(changes));
    CO_CHECK(co_await op_.file().flush());
    uint64_t moved = 0;
    for (const BlobMove& move : blobs_) {
        CO_CHECK(co_await op_.refcounts().change_bytes(move.from, move.bytes, -static_cast<int64_t>(move.count)));
        moved += move.bytes;
    }
    blobs_.clear();
    source_end_ = 0;  // the next one begins a sector
    co_return co_await step(op_.clusters_for(moved));
}

Task<Result<>> Compaction::move_blobs() {
    blobs_.clear();
    run_begin_ = run_at_ = run_end_ = source_end_ = 0;
    for (size_t first = 0; first < refs_.size();) {
        size_t end = first;
        BlobMove move{.from = refs_[first].cluster, .first_ref = first};
        while (end < refs_.size() && refs_[end].cluster == move.from) {
            move.bytes = std::max(move.bytes, refs_[end].bytes);
            move.count += refs_[end].paths;
            end++;
        }
        move.refs = end - first;
        first = end;
        CO_TRY(const bool placed, co_await place_blob(move));
        if (placed) blobs_.push_back(move);
        if ((!placed || blobs_.size() >= kBatchBlobs || first == refs_.size()) && !blobs_.empty()) {
            CO_CHECK(co_await carry_out_blobs());
        }
        if (!placed) co_return Result<>();
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
