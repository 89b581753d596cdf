// Whole clusters move: data and L2 tables.

#include <algorithm>
#include <map>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/compaction.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kBatchBytes = uint64_t{64} << 20;
constexpr size_t kBatchMoves = 4096;

}  // namespace

Task<Result<uint64_t>> Compaction::next_hole() {
    while (hole_ < target_) {
        const uint64_t cluster = hole_++;
        if (used_[cluster]) continue;
        // A refcount block may have been put there meanwhile.
        CO_TRY(const uint64_t count, co_await op_.refcounts().get(cluster));
        used_[cluster] = true;
        if (count == 0) co_return cluster;
    }
    co_return 0;
}

/// False: there is no hole left.
Task<Result<bool>> Compaction::plan_move(What what, size_t first, size_t refs) {
    const uint64_t from = refs_[first].cluster;
    uint64_t found = 0;
    for (size_t i = first; i < first + refs; i++) found += refs_[i].paths;
    CO_TRY(const uint64_t count, co_await op_.refcounts().get(from));
    // More counted than found: something else refers to it, or it leaks. Fewer: the image is damaged.
    if (count != found) co_return true;
    if (what == What::kTables && !op_.check_table_place(bytes(from))) co_return true;
    CO_TRY(const uint64_t to, co_await next_hole());
    if (to == 0) co_return false;
    CO_CHECK(op_.refcounts().check_unused({to, 1}, "moved clusters"));
    CO_CHECK(co_await op_.refcounts().change(to, 1, static_cast<int64_t>(count)));
    moves_.push_back({from, to, count, first, refs});
    co_return true;
}

Task<Result<>> Compaction::copy_cluster(What what, const Move& move) {
    ImageFile& file = op_.file();
    CO_CHECK(co_await file.read(bytes(move.from), cluster_.span(), "cluster to be moved"));
    if (what == What::kData && op_.header().crypt_method == 2) {  // its place is part of the encryption
        Request rq = Request::internal();
        const iovec iov = cluster_.iov();
        const uint64_t guest = refs_[move.first_ref].guest;
        CO_CHECK(co_await op_.node().decode_in_place(rq, guest, bytes(move.from), IoVec(iov)));
        CO_CHECK(co_await op_.node().encode_in_place(rq, guest, bytes(move.to), IoVec(iov)));
    }
    co_return co_await file.write(bytes(move.to), cluster_.span(), "moved cluster");
}

/// `changes`: a reference and where what it names lies now (host offset); each table is written once.
Task<Result<>> Compaction::change_tables(const std::vector<std::pair<size_t, uint64_t>>& changes) {
    std::map<uint64_t, std::vector<std::pair<size_t, uint64_t>>> by_table;
    for (const auto& change : changes) by_table[refs_[change.first].table].push_back(change);
    CO_TRY(TableWords table, TableWords::create(op_.geometry()));
    const uint64_t low_bits = (uint64_t{1} << (62 - (op_.geometry().cluster_bits - 8))) - 1;
    for (const auto& [offset, entries] : by_table) {
        CO_CHECK(co_await table.load(op_, offset));
        for (const auto& [ref, place] : entries) {
            const uint64_t entry = table.entry(refs_[ref].index);
            const uint64_t mask = entry & kCompressed ? low_bits : kOffsetMask;
            table.set_entry(refs_[ref].index, (entry & ~mask) | place);
        }
        CO_CHECK(co_await table.save(op_, offset));
    }
    co_return Result<>();
}

Task<Result<>> Compaction::change_l1(const std::vector<std::pair<size_t, uint64_t>>& changes) {
    for (const auto& [ref, place] : changes) {
        const uint64_t at = refs_[ref].table + uint64_t{refs_[ref].index} * 8;
        uint8_t word[8];
        CO_CHECK(co_await op_.file().read(at, word, "L1 table"));
        const uint64_t changed = (load_be64(word) & ~kOffsetMask) | place;
        store_be64(word, changed);
        // Memory first: what is written next must not go to the old table.
        if (refs_[ref].table == op_.header().l1_table_offset) {
            active_l1_[refs_[ref].index] = changed;
            unsure_l1_.push_back(refs_[ref].index);
        }
        CO_CHECK(co_await op_.file().write(at, word, "L1 table"));
    }
    co_return Result<>();
}

Task<Result<>> Compaction::carry_out(What what) {
    std::vector<std::pair<size_t, uint64_t>> changes;
    for (const Move& move : moves_) {
        CO_CHECK(co_await copy_cluster(what, move));
        for (size_t i = 0; i < move.refs; i++) changes.emplace_back(move.first_ref + i, bytes(move.to));
    }
    CO_CHECK(co_await op_.stabilise());
    if (what == What::kTables) {
        CO_CHECK(co_await change_l1(changes));
    } else {
        CO_CHECK(co_await change_tables(changes));
    }
    CO_CHECK(co_await op_.file().flush());
    unsure_l1_.clear();
    OverlapMap& overlap = op_.metadata().overlap();
    for (const Move& move : moves_) {
        CO_CHECK(co_await op_.refcounts().change(move.from, 1, -static_cast<int64_t>(move.count)));
        used_[move.from] = false;
        if (what != What::kTables) continue;
        // At once, because the place left is free for what is allocated next.
        for (const Structure s : {Structure::kActiveL2, Structure::kInactiveL2}) {
            if (!(overlap.touched(bytes(move.from), 1) & bit_of(s))) continue;
            overlap.remove(s, bytes(move.from), 1);
            overlap.add(s, bytes(move.to), 1);
        }
    }
    const size_t moved = moves_.size();
    moves_.clear();
    co_return co_await step(moved);
}

Task<Result<>> Compaction::move_clusters(What what) {
    for (size_t first = 0; first < refs_.size();) {
        size_t end = first;
        while (end < refs_.size() && refs_[end].cluster == refs_[first].cluster) end++;
        Result<bool> planned = co_await plan_move(what, first, end - first);
        first = end;
        const bool go_on = planned && *planned;
        if (!go_on || moves_.size() >= kBatchMoves || bytes(moves_.size()) >= kBatchBytes || first == refs_.size()) {
            Result<> moved = co_await carry_out(what);
            if (!moved) co_return moved;
        }
        if (!planned) co_return std::unexpected(std::move(planned).error());
        if (!*planned) co_return Result<>();
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
