// How changed blocks, new blocks and a larger table reach the file.

#include <array>
#include <cstring>
#include <utility>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/overlap_map.h"
#include "block/formats/qcow2/refcounts.h"
#include "block/formats/qcow2/refusal.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {
constexpr uint64_t kTableFields = 48;  // refcount_table_offset, refcount_table_clusters
}  // namespace

/// A place that an image names is not believed: what else lies there decides.
Result<> Refcounts::check_place(uint64_t offset, uint64_t bytes, bool table) const {
    if (!overlap_) return {};
    const Structure own = table ? Structure::kRefcountTable : Structure::kRefcountBlock;
    const StructureSet others = overlap_->touched(offset, bytes) & static_cast<StructureSet>(~bit_of(own));
    if (others == 0) return {};
    return refuse_corrupt(file_.node_name(),
                          fmt::format("Preventing invalid write on {} (overlaps with {})", structure_name(own),
                                      structure_name(first_of(others))),
                          "{} bytes at {:#x}", bytes, offset);
}

Task<Result<>> Refcounts::write_back() {
    if (!dirty()) co_return Result<>();
    while (true) {
        CO_CHECK(co_await write_blocks());
        if (move_ && move_->tried) {
            CO_CHECK(co_await move_again());
            continue;
        }
        if (move_) {
            CO_CHECK(co_await switch_table());
        } else if (!unlinked_.empty()) {
            CO_CHECK(co_await link_blocks());
        }
        if (old_tables_.empty()) break;
        co_await free_old_tables();
    }
    dirty_.store(false, std::memory_order_relaxed);
    co_return Result<>();
}

Task<Result<>> Refcounts::write_blocks() {
    for (auto& [index, block] : blocks_) {
        if (!block.dirty()) continue;
        const uint64_t place = table_[index] + block.dirty_begin;
        const auto part = block.bytes.span().subspan(block.dirty_begin, block.dirty_end - block.dirty_begin);
        CO_CHECK(check_place(place, part.size(), false));
        CO_CHECK(co_await file_.write(place, part, "refcount block"));
        block.dirty_begin = block.dirty_end = 0;
    }
    co_return Result<>();
}

/// Table entries of new blocks, in rounds: first those whose clusters are counted by themselves or by a block that the
/// table names already, then those that the former count.
Task<Result<>> Refcounts::link_blocks() {
    while (!unlinked_.empty()) {
        uint32_t round = unlinked_.begin()->second;
        for (const auto& [index, its] : unlinked_) round = std::min(round, its);
        CO_CHECK(co_await file_.flush());
        for (auto i = unlinked_.begin(); i != unlinked_.end();) {
            if (i->second != round) {
                ++i;
                continue;
            }
            const uint64_t first = i->first;
            auto end = i;
            uint64_t count = 0;
            for (; end != unlinked_.end() && end->first == first + count && end->second == round; ++end) count++;
            std::vector<uint8_t> raw(count * 8);
            for (uint64_t k = 0; k < count; k++) store_be64(raw.data() + k * 8, table_[first + k]);
            const uint64_t place = table_place_.offset + first * 8;
            CO_CHECK(check_place(place, raw.size(), true));
            CO_CHECK(co_await file_.write(place, raw, "refcount table"));
            i = unlinked_.erase(i, end);
        }
    }
    co_return Result<>();
}

/// The header leaves the old table for the new one, which names everything, in one write of 12 bytes.
Task<Result<>> Refcounts::switch_table() {
    const Move to = *move_;
    std::vector<uint8_t> raw(to.clusters * cluster_size());
    for (size_t i = 0; i < table_.size(); i++) store_be64(raw.data() + i * 8, table_[i]);
    CO_CHECK(check_place(to.offset, raw.size(), true));
    CO_CHECK(co_await file_.write(to.offset, raw, "refcount table"));
    CO_CHECK(co_await file_.flush());
    std::array<uint8_t, 12> fields;
    store_be64(fields.data(), to.offset);
    store_be32(fields.data() + 8, static_cast<uint32_t>(to.clusters));
    move_->tried = true;
    CO_CHECK(co_await file_.write(kTableFields, fields, "qcow2 header"));
    CO_CHECK(co_await file_.flush());
    header_.refcount_table_offset = to.offset;
    header_.refcount_table_clusters = static_cast<uint32_t>(to.clusters);
    old_tables_.push_back(std::exchange(table_place_, to));
    move_.reset();
    unlinked_.clear();
    co_return Result<>();
}

/// After a failure nobody knows whether the header names the new table: what is there stays as it is until another one
/// has taken its place.
Task<Result<>> Refcounts::move_again() {
    const uint64_t clusters = move_->clusters;
    CO_TRY(const uint64_t first, co_await find_free(clusters, end_limit()));
    CO_CHECK(check_unused({first, clusters}, "refcount table"));
    // Blocks that this makes are named by the next table as all others.
    CO_CHECK(co_await change(first, clusters, 1));
    if (!move_->tried) co_return co_await change(first, clusters, -1);  // the table grew once more, to another place
    old_tables_.push_back(*move_);
    move_ = Move{first << header_.cluster_bits, clusters};
    if (overlap_) overlap_->add(Structure::kRefcountTable, move_->offset, clusters * cluster_size());
    co_return Result<>();
}

/// What cannot be given back leaks: check finds it.
Task<void> Refcounts::free_old_tables() {
    const std::vector<Move> old = std::exchange(old_tables_, {});
    for (const Move& table : old) {
        if (overlap_) overlap_->remove(Structure::kRefcountTable, table.offset, table.clusters * cluster_size());
        Result<> freed = co_await change(table.offset >> header_.cluster_bits, table.clusters, -1);
        if (!freed) {
            log::warn("an old refcount table stays counted node={} offset={:#x} error={}", file_.node_name(),
                      table.offset, freed.error().message());
        }
    }
}

}  // namespace gantry::block::qcow2
