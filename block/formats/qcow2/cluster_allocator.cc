#include "block/formats/qcow2/cluster_allocator.h"

#include <algorithm>
#include <utility>

#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kFirstBytes = uint64_t{1} << 20;
constexpr uint64_t kFirstClusters = 16;
constexpr uint64_t kMostBytes = uint64_t{64} << 20;
constexpr uint64_t kFileShare = 16;
/// Holes shorter than that (or than a 64th of a small file) are left alone while they are below kFragmented-th of it.
constexpr uint64_t kUsefulBytes = uint64_t{1} << 20;
constexpr uint64_t kUsefulShare = 64;
constexpr uint64_t kFragmented = 8;

}  // namespace

ClusterAllocator::ClusterAllocator(Refcounts& refcounts, ImageFile& file, uint32_t cluster_bits)
    : refcounts_(refcounts), file_(file), cluster_bits_(cluster_bits) {}

uint64_t ClusterAllocator::fresh_line() const { return std::max(fresh_from_, to_clusters(file_.size())); }

uint64_t ClusterAllocator::fresh_from() const {
    std::lock_guard lock(mutex_);
    return fresh_line() << cluster_bits_;
}

uint64_t ClusterAllocator::reserved() const {
    std::lock_guard lock(mutex_);
    uint64_t sum = 0;
    for (const HostRun& run : reserved_) sum += run.clusters;
    return sum;
}

// ---- The reservation ----

HostRun ClusterAllocator::take(uint64_t clusters, uint64_t near) {
    std::lock_guard lock(mutex_);
    if (reserved_.empty() || clusters == 0) return {};
    size_t at = reserved_.size() - 1;
    for (size_t i = 0; near != 0 && i < reserved_.size(); i++) {
        if (reserved_[i].offset == near) at = i;
    }
    HostRun& run = reserved_[at];
    const HostRun taken{run.offset, std::min(clusters, run.clusters), run.fresh};
    run.offset += taken.clusters << cluster_bits_;
    run.clusters -= taken.clusters;
    if (run.clusters == 0) reserved_.erase(reserved_.begin() + static_cast<ptrdiff_t>(at));
    return taken;
}

void ClusterAllocator::give_back(HostRun run, bool written) {
    if (run.clusters == 0) return;
    run.fresh = run.fresh && !written;
    std::lock_guard lock(mutex_);
    put(run);
}

/// Joins what adjoins and is as fresh; else it is the next to be taken. Under mutex_.
void ClusterAllocator::put(HostRun run) {
    for (size_t i = 0; i < reserved_.size(); i++) {
        HostRun& other = reserved_[i];
        if (other.fresh != run.fresh) continue;
        if (run.offset + (run.clusters << cluster_bits_) == other.offset) {
            other.offset = run.offset;
        } else if (other.offset + (other.clusters << cluster_bits_) != run.offset) {
            continue;
        }
        other.clusters += run.clusters;
        return;
    }
    reserved_.push_back(run);
}

bool ClusterAllocator::take_at(uint64_t offset) {
    {
        std::lock_guard lock(mutex_);
        if (std::none_of(reserved_.begin(), reserved_.end(), [&](const HostRun& r) { return r.offset == offset; })) {
            return false;
        }
    }
    HostRun run = take(1, offset);
    if (run.offset == offset && run.clusters == 1) return true;
    give_back(run, false);  // somebody was faster
    return false;
}

Error ClusterAllocator::no_space(uint64_t clusters) const {
    return Error(ErrorKind::kNoSpace,
                 fmt::format("No space left in the image file; node '{}': {} clusters more; it ends at {:#x}",
                             file_.node_name(), clusters, file_.size()));
}

/// The run to use next, as long as it is free and not above `want`; it may be shorter than `clusters`. Count 0: there
/// is none.
Task<Result<ClusterRun>> ClusterAllocator::choose(uint64_t clusters, uint64_t want) {
    uint64_t end = 0;
    {
        std::lock_guard lock(mutex_);
        end = fresh_line();
    }
    const uint64_t limit = refcounts_.end_limit();
    end = std::min(end, limit);
    const uint64_t useful =
        std::max(clusters, std::min({want, kUsefulBytes >> cluster_bits_, end / kUsefulShare, uint64_t{1} << 32}));
    CO_TRY(ClusterRun run, co_await refcounts_.find_run(0, end, useful, want, {}));
    if (run.count != 0) co_return run;
    CO_TRY(const uint64_t free, co_await refcounts_.count_free(end));
    for (uint64_t least = useful / 2; least != 0 && free != 0 && free >= end / kFragmented; least /= 2) {
        CO_TRY(run, co_await refcounts_.find_run(0, end, least, want, {}));
        if (run.count != 0) co_return run;
    }
    // None of them passes for useful: the first run that does begins at the end of the file. A device has no such end.
    for (uint64_t least = useful; least != 0; least /= 2) {
        CO_TRY(run, co_await refcounts_.find_run(0, limit, least, want, {}));
        if (run.count != 0) co_return run;
    }
    co_return run;
}

Task<Result<std::vector<HostRun>>> ClusterAllocator::claim(ClusterRun run, std::string_view what) {
    CO_CHECK(refcounts_.check_unused(run, what));
    CO_CHECK(co_await refcounts_.change(run.first, run.count, 1));
    std::lock_guard lock(mutex_);
    const uint64_t line = std::clamp(fresh_line(), run.first, run.end());
    fresh_from_ = std::max(fresh_from_, run.end());
    std::vector<HostRun> parts;
    if (line > run.first) parts.push_back({run.first << cluster_bits_, line - run.first, false});
    if (line < run.end()) parts.push_back({line << cluster_bits_, run.end() - line, true});
    co_return parts;
}

Task<Result<>> ClusterAllocator::refill(uint64_t clusters) {
    clusters = std::max(clusters, uint64_t{1});
    const uint64_t first = std::max(kFirstBytes >> cluster_bits_, kFirstClusters);
    const uint64_t share = to_clusters(file_.size()) / kFileShare;
    const uint64_t most = std::max(first, std::min(kMostBytes >> cluster_bits_, share));
    next_refill_ = std::clamp(next_refill_ * 2, first, most);
    co_return co_await reserve(clusters);
}

Task<Result<>> ClusterAllocator::reserve(uint64_t clusters) {
    std::vector<HostRun> got;
    Result<> outcome;
    for (uint64_t have = 0; have < clusters;) {
        Result<ClusterRun> run = co_await choose(clusters - have, std::max(clusters - have, next_refill_));
        if (run && run->count == 0) {
            // Less than asked is something: the caller asks again for the rest.
            if (have == 0) outcome = std::unexpected(no_space(clusters));
            break;
        }
        Result<std::vector<HostRun>> parts = std::unexpected(no_space(0));
        if (run) parts = co_await claim(*run, "guest data");
        if (!run || !parts) {
            outcome = std::unexpected(run ? std::move(parts).error() : std::move(run).error());
            break;
        }
        have += run->count;
        got.insert(got.end(), parts->begin(), parts->end());
    }
    // The lowest one becomes the current run.
    std::lock_guard lock(mutex_);
    for (size_t i = got.size(); i-- > 0;) put(got[i]);
    if (!got.empty()) co_return Result<>();
    co_return outcome;
}

Task<Result<HostRun>> ClusterAllocator::allocate_row(uint64_t clusters) {
    for (bool again = false;; again = true) {
        uint64_t end = 0;
        {
            std::lock_guard lock(mutex_);
            end = fresh_line();
        }
        Result<uint64_t> first = co_await refcounts_.find_free(clusters, std::max(end, uint64_t{1}));
        if (first) {
            CO_TRY(auto parts, co_await claim({*first, clusters}, "metadata"));
            co_return HostRun{*first << cluster_bits_, clusters, parts.size() == 1 && parts.front().fresh};
        }
        // A device that is full but for what is reserved.
        if (first.error().kind() != ErrorKind::kNoSpace || again || reserved() == 0) {
            co_return std::unexpected(std::move(first).error());
        }
        CO_CHECK(co_await settle());
    }
}

Task<Result<std::vector<HostRun>>> ClusterAllocator::free(uint64_t offset, uint64_t bytes) {
    std::vector<HostRun> freed;
    if (bytes == 0) co_return freed;
    CO_CHECK(co_await refcounts_.change_bytes(offset, bytes, -1));
    const uint64_t first = offset >> cluster_bits_;
    const uint64_t last = (offset + bytes - 1) >> cluster_bits_;
    CO_TRY(const auto runs, co_await refcounts_.free_within(first, last - first + 1));
    for (const ClusterRun& run : runs) freed.push_back({run.first << cluster_bits_, run.count, false});
    co_return freed;
}

Task<Result<>> ClusterAllocator::settle() {
    std::vector<HostRun> runs;
    {
        std::lock_guard lock(mutex_);
        runs = std::exchange(reserved_, {});
    }
    next_refill_ = 0;
    std::sort(runs.begin(), runs.end(), [](const HostRun& a, const HostRun& b) { return a.offset < b.offset; });
    while (!runs.empty()) {
        const HostRun run = runs.back();
        Result<> returned = co_await refcounts_.change(run.offset >> cluster_bits_, run.clusters, -1);
        std::lock_guard lock(mutex_);
        if (!returned) {
            for (const HostRun& rest : runs) put(rest);
            co_return returned;
        }
        // What was never written is fresh again when nothing behind it was used.
        if (run.fresh && fresh_from_ == (run.offset >> cluster_bits_) + run.clusters) {
            fresh_from_ = run.offset >> cluster_bits_;
        }
        runs.pop_back();
    }
    co_return Result<>();
}

// ---- Compressed clusters ----

void ClusterAllocator::move_cursor(uint64_t end) {
    const bool inside = (end & (cluster_size() - 1)) != 0;
    byte_cursor_ = inside ? end : 0;
    refcounts_.watch(inside ? end >> cluster_bits_ : Refcounts::kNothing);
}

/// Behind the blob before; false: it has to begin a cluster of its own.
Task<Result<bool>> ClusterAllocator::append(uint64_t bytes) {
    const uint64_t cluster = byte_cursor_ >> cluster_bits_;
    if (byte_cursor_ == 0 || refcounts_.watched() != cluster) co_return false;
    const uint64_t room = cluster_size() - (byte_cursor_ & (cluster_size() - 1));
    uint64_t clusters = 1;
    bool reserved = false;
    if (bytes > room) {
        // It may run on into the next cluster when that is ours or free.
        reserved = take_at((cluster + 1) << cluster_bits_);
        if (!reserved) {
            if (cluster + 1 >= refcounts_.end_limit()) co_return false;
            CO_TRY(const uint64_t count, co_await refcounts_.get(cluster + 1));
            if (count != 0) co_return false;
            CO_CHECK(refcounts_.check_unused({cluster + 1, 1}, "compressed data"));
            clusters = 2;
        }
    }
    Result<> raised = co_await refcounts_.change(cluster, clusters, 1);
    if (raised) {
        std::lock_guard lock(mutex_);
        fresh_from_ = std::max(fresh_from_, cluster + clusters);
        co_return true;
    }
    if (reserved) give_back({(cluster + 1) << cluster_bits_, 1, false}, true);
    // The count of the cluster is at its limit: another one then.
    if (raised.error().kind() == ErrorKind::kInvalid) co_return false;
    co_return std::unexpected(std::move(raised).error());
}

Task<Result<uint64_t>> ClusterAllocator::allocate_bytes(uint64_t bytes) {
    GANTRY_CHECK(bytes > 0 && bytes <= cluster_size(), "a compressed blob is not longer than a cluster");
    CO_TRY(const bool appended, co_await append(bytes));
    if (appended) {
        const uint64_t at = byte_cursor_;
        move_cursor(at + bytes);
        co_return at;
    }
    HostRun run = take(1, 0);
    while (run.clusters == 0) {
        CO_CHECK(co_await refill(1));
        run = take(1, 0);
    }
    move_cursor(run.offset + bytes);
    co_return run.offset;
}

}  // namespace gantry::block::qcow2
