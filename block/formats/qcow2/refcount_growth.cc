// New refcount blocks, and a larger table. In memory: write_back() brings them to the file.

#include <cstring>
#include <utility>

#include "block/align.h"
#include "block/formats/qcow2/overlap_map.h"
#include "block/formats/qcow2/refcount_bits.h"
#include "block/formats/qcow2/refcounts.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

Result<> Refcounts::check_unused(ClusterRun run, std::string_view what) const {
    if (!overlap_) return {};
    const uint64_t offset = run.first << header_.cluster_bits;
    const StructureSet there = overlap_->touched(offset, run.count << header_.cluster_bits);
    if (there == 0) return {};
    return refuse_corrupt(
        file_.node_name(),
        fmt::format("Preventing invalid write on {} (overlaps with {})", what, structure_name(first_of(there))),
        "{} clusters at {:#x} are counted as free", run.count, offset);
}

Task<Result<>> Refcounts::make_blocks(uint64_t first_index, uint64_t last_index, ClusterRun avoid) {
    if (last_index >= table_.size()) CO_CHECK(grow_table(last_index + 1, avoid));
    for (uint64_t i = first_index; i <= last_index; i++) {
        if (absent(i)) CO_CHECK(co_await place_block(i, avoid));
    }
    co_return Result<>();
}

/// In the first free cluster. When nothing counts that cluster yet, it becomes the block that does, and the search goes
/// on.
Task<Result<>> Refcounts::place_block(uint64_t index, ClusterRun avoid) {
    while (absent(index)) {
        CO_TRY(const ClusterRun found, co_await find_run(hint_, end_limit(), 1, 1, avoid));
        if (found.count == 0) {
            co_return refuse(ErrorKind::kNoSpace, file_.node_name(), "No space left for a refcount block",
                             "the file ends at {:#x}", end_limit() << header_.cluster_bits);
        }
        CO_CHECK(check_unused(found, "refcount block"));
        const uint64_t describer = index_of(found.first);
        if (describer >= table_.size()) {
            CO_CHECK(grow_table(describer + 1, avoid));
        } else if (absent(describer)) {
            install(describer, found.first);
        } else {
            CO_CHECK(co_await block(describer));
            install(index, found.first);
        }
    }
    co_return Result<>();
}

/// An empty block; what counts `cluster` is the caller's.
void Refcounts::create(uint64_t index, uint64_t cluster, uint32_t round) {
    Block made;
    made.bytes = Buffer::alloc(cluster_size());
    std::memset(made.bytes.data(), 0, made.bytes.size());
    made.dirty_end = made.bytes.size();
    made.last_use = ++uses_;
    blocks_.insert_or_assign(index, std::move(made));
    table_[index] = cluster << header_.cluster_bits;
    bad_[index] = false;
    room_[index] = Room();
    unlinked_[index] = round;
    dirty_.store(true, std::memory_order_relaxed);
    if (overlap_) overlap_->add(Structure::kRefcountBlock, table_[index], cluster_size());
}

/// An empty block in a free cluster, which is counted by this block or by one that is in memory.
void Refcounts::install(uint64_t index, uint64_t cluster) {
    const uint64_t describer = index_of(cluster);
    uint32_t round = 0;
    if (auto also_new = unlinked_.find(describer); also_new != unlinked_.end()) round = also_new->second + 1;
    create(index, cluster, round);
    Block& counting = blocks_.at(describer);
    const uint64_t at = cluster % clusters_per_block();
    add_to_counts(counting.bytes.span(), header_.refcount_order, at, 1, 1);
    touched(counting, at, at + 1);
}

/// The new table lies behind everything that the old one can count, followed by the blocks that count it and
/// themselves; so nothing has to be read.
Result<> Refcounts::grow_table(uint64_t entries, ClusterRun avoid) {
    const uint64_t per_block = clusters_per_block();
    const uint64_t per_cluster = cluster_size() / 8;
    const uint64_t limit = kMaxRefcountTableBytes / 8;
    const uint64_t old_entries = table_.size();
    const ClusterRun old_place{table_place_.offset >> header_.cluster_bits, table_place_.clusters};
    entries = std::max(entries, std::min(old_entries + old_entries / 2, limit));

    ClusterRun place;
    uint64_t blocks = 0;
    while (true) {
        entries = align_up(entries, per_cluster);
        const uint64_t clusters = entries / per_cluster;
        place = {std::max({old_entries * per_block, avoid.end(), old_place.end()}), clusters};
        const uint64_t first = place.first / per_block;
        blocks = 1;
        while ((place.end() + blocks - 1) / per_block - first + 1 > blocks) blocks++;
        place.count = clusters + blocks;
        if (entries > limit) {
            return refuse(ErrorKind::kTooLarge, file_.node_name(), "Image too large",
                          "its refcount table would need {} entries, {} is the most", entries, limit);
        }
        const uint64_t needed = (place.end() - 1) / per_block + 1;
        if (needed <= entries) break;
        entries = needed;
    }
    if (place.end() > end_limit()) {
        return refuse(ErrorKind::kNoSpace, file_.node_name(), "No space left for a larger refcount table",
                      "{} clusters behind {:#x}", place.count, place.first << header_.cluster_bits);
    }
    CHECK_OK(check_unused(place, "refcount table"));

    table_.resize(entries, 0);
    bad_.resize(entries, false);
    room_.resize(entries);
    if (move_) old_tables_.push_back(*move_);  // made in memory, never used
    const uint64_t table_clusters = place.count - blocks;
    move_ = {place.first << header_.cluster_bits, table_clusters};
    if (overlap_) overlap_->add(Structure::kRefcountTable, move_->offset, table_clusters * cluster_size());
    // Their rounds do not matter: the whole table becomes valid at once.
    const uint64_t first = place.first / per_block;
    for (uint64_t k = 0; k < blocks; k++) create(first + k, place.first + table_clusters + k, 0);
    for (uint64_t k = 0; k < blocks; k++) {
        Block& block = blocks_.at(first + k);
        const uint64_t start = (first + k) * per_block;
        const uint64_t from = std::max(place.first, start) - start;
        const uint64_t to = std::min(place.end(), start + per_block) - start;
        add_to_counts(block.bytes.span(), header_.refcount_order, from, to - from, 1);
    }
    return {};
}

}  // namespace gantry::block::qcow2
