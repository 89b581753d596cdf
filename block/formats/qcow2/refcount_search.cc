// Looking for free clusters, and for the last one in use.

#include <utility>

#include "block/align.h"
#include "block/formats/qcow2/refcount_bits.h"
#include "block/formats/qcow2/refcounts.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

/// A first-fit search: it is told, in order, which stretches are free.
struct Refcounts::RunSearch {
    uint64_t least, most;
    ClusterRun avoid;
    ClusterRun run;                  // the one in progress; it ends where the search stands
    uint64_t first_free = kNothing;  // also in `avoid`
    bool done = false;

    /// [begin, end) is free.
    void free(uint64_t begin, uint64_t end) {
        if (first_free == kNothing) first_free = begin;
        if (avoid.count == 0 || end <= avoid.first || begin >= avoid.end()) return extend(begin, end);
        if (begin < avoid.first) extend(begin, avoid.first);
        used();
        if (!done && end > avoid.end()) extend(avoid.end(), end);
    }
    /// What follows is not free.
    void used() {
        if (done) return;
        if (run.count >= least) {
            done = true;
        } else {
            run = {};
        }
    }

  private:
    void extend(uint64_t begin, uint64_t end) {
        if (done) return;
        if (run.count == 0) run.first = begin;
        run.count = std::min(end - run.first, most);
        done = run.count == most;
    }
};

Refcounts::Room Refcounts::room_of(uint64_t index) const {
    if (!absent(index)) return room_[index];
    const auto all = static_cast<uint32_t>(clusters_per_block());
    return {all, all};
}

/// Whether no run that is long enough begins, passes or ends in the block.
bool Refcounts::skip_block(const RunSearch& search, uint64_t index) const {
    const Room here = room_[index];
    if (here.total == 0) return true;
    if (here.total == Room::kUnknown) return false;
    const uint64_t reach = search.run.count + here.longest;
    if (reach >= search.least) return false;
    const Room next = room_of(index + 1);
    return next.longest < clusters_per_block() && reach + next.longest < search.least;
}

Task<Result<>> Refcounts::scan_block(RunSearch& search, uint64_t index, uint64_t begin, uint64_t end) {
    CO_TRY(Block * found, co_await block(index));
    const auto bytes = found->bytes.span();
    const uint32_t order = header_.refcount_order;
    const uint64_t start = index * clusters_per_block();
    uint64_t total = 0, longest = 0;
    for (uint64_t pos = begin - start; pos < end - start;) {
        const uint64_t free = find_zero_count(bytes, order, pos, end - start);
        if (free != pos) search.used();
        if (search.done) co_return Result<>();
        if (free == end - start) break;
        // What ends the search need not be looked at to its end.
        const uint64_t enough = search.avoid.count == 0 ? search.most - search.run.count : kNothing;
        pos = find_nonzero_count(bytes, order, free, free + std::min(end - start - free, enough));
        search.free(start + free, start + pos);
        if (search.done) co_return Result<>();
        total += pos - free;
        longest = std::max(longest, pos - free);
    }
    if (begin <= std::max(start, hint_) && end == start + clusters_per_block()) {
        room_[index] = {static_cast<uint32_t>(total), static_cast<uint32_t>(longest)};
    }
    co_return Result<>();
}

Task<Result<ClusterRun>> Refcounts::find_run(uint64_t from, uint64_t before, uint64_t least, uint64_t most,
                                             ClusterRun avoid) {
    RunSearch search{least, std::max(least, most), avoid, {}};
    const bool moves_hint = from <= hint_;
    const uint64_t per_block = clusters_per_block();
    for (uint64_t pos = std::max({from, hint_, uint64_t{1}}); pos < before && !search.done;) {
        if (pos >= avoid.first && pos < avoid.end()) {
            search.first_free = std::min(search.first_free, pos);
            search.used();
            pos = avoid.end();
            continue;
        }
        const uint64_t index = index_of(pos);
        const uint64_t end = index >= table_.size() ? before : std::min(before, (index + 1) * per_block);
        if (absent(index)) {
            search.free(pos, end);
        } else if (bad_[index] || !skip_block(search, index)) {
            CO_CHECK(co_await scan_block(search, index, pos, end));
        } else {
            if (search.first_free == kNothing && room_[index].total != 0) search.first_free = pos;
            search.used();
        }
        pos = end;
    }
    if (moves_hint) hint_ = std::max(hint_, std::min(search.first_free, before));
    if (search.run.count < least) search.run = {};
    co_return search.run;
}

Task<Result<uint64_t>> Refcounts::find_free(uint64_t count, uint64_t grow_from) {
    const uint64_t from = grow_from ? 0 : align_up(file_.size(), cluster_size()) >> header_.cluster_bits;
    CO_TRY(const ClusterRun found, co_await find_run(from, end_limit(), count, count, {}));
    if (found.count >= count && count != 0) co_return found.first;
    if (!file_.node().limits().can_grow_by_write) {
        co_return refuse(ErrorKind::kNoSpace, file_.node_name(), "No space left in the image file",
                         "{} clusters in a row; it ends at {:#x} and cannot grow", count, file_.size());
    }
    co_return refuse(ErrorKind::kTooLarge, file_.node_name(), "Image too large", "{} clusters more", count);
}

Task<Result<uint64_t>> Refcounts::count_free(uint64_t end) {
    const uint64_t per_block = clusters_per_block();
    uint64_t free = 0;
    for (uint64_t i = index_of(hint_); i < end / per_block; i++) {
        const Room room = room_of(i);
        if (room.total != Room::kUnknown) free += room.total;
    }
    CO_TRY(const auto runs, co_await free_within(align_down(end, per_block), end % per_block));
    for (const ClusterRun& run : runs) free += run.count;
    co_return free;
}

Task<Result<std::vector<ClusterRun>>> Refcounts::free_within(uint64_t first, uint64_t count) {
    const uint64_t per_block = clusters_per_block();
    std::vector<ClusterRun> runs;
    const uint64_t end = first + count;
    for (uint64_t pos = first; pos < end;) {
        const uint64_t index = index_of(pos);
        const uint64_t start = index * per_block;
        const uint64_t stop = std::min(end, start + per_block);
        uint64_t from = pos, to = stop;
        if (!absent(index)) {
            CO_TRY(Block * found, co_await block(index));
            const auto bytes = found->bytes.span();
            from = start + find_zero_count(bytes, header_.refcount_order, pos - start, stop - start);
            to = start + find_nonzero_count(bytes, header_.refcount_order, from - start, stop - start);
        }
        if (from < to) {
            if (!runs.empty() && runs.back().end() == from) {
                runs.back().count += to - from;
            } else {
                runs.push_back({from, to - from});
            }
        }
        pos = std::max(to, from);
    }
    co_return runs;
}

Task<Result<uint64_t>> Refcounts::end_of_use() {
    for (uint64_t i = table_.size(); i-- > 0;) {
        if (absent(i)) continue;
        CO_TRY(Block * found, co_await block(i));
        const uint64_t end = end_of_counts(found->bytes.span(), header_.refcount_order);
        if (end != 0) co_return i* clusters_per_block() + end;
    }
    co_return uint64_t{0};
}

}  // namespace gantry::block::qcow2
