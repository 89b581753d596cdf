// The order in which metadata reaches the disk: the steps of a write-back (metadata.h).

#include <algorithm>
#include <cstring>
#include <iterator>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/metadata.h"
#include "runtime/check.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {
constexpr size_t kJoinedBytes = size_t{1} << 20;
}  // namespace

/// What T0 copied.
struct Metadata::Taken {
    uint64_t log_mark = 0;
    std::vector<Freed> freed;
    std::vector<std::pair<uint64_t, uint64_t>> l1;
    L2SliceCache::DirtySlices l2;
    bool has_entries() const { return !l1.empty() || !l2.slices.empty(); }
};

struct Metadata::FileWrite {
    uint64_t offset;
    std::span<const uint8_t> bytes;
};

Task<Result<>> Metadata::flush() {
    const uint64_t ticket = flushes_.ticket();
    for (;;) {
        Result<> result;
        const FlushState::Step step = flushes_.next(ticket, result);
        if (step == FlushState::Step::kDone) co_return result;
        if (step == FlushState::Step::kWait) {
            co_await flushes_.turn();
            continue;
        }
        auto guard = co_await write_back_mutex_.lock();
        result = co_await write_back_locked(true);
        guard.unlock();
        flushes_.finish(result, false);
        co_return result;
    }
}

Task<Result<>> Metadata::write_back() {
    const uint64_t ticket = write_backs_.ticket();
    for (;;) {
        Result<> result;
        const FlushState::Step step = write_backs_.next(ticket, result);
        if (step == FlushState::Step::kDone) co_return result;
        if (step == FlushState::Step::kWait) {
            co_await write_backs_.turn();
            continue;
        }
        auto guard = co_await write_back_mutex_.lock();
        result = co_await write_back_locked(many_freed());
        guard.unlock();
        write_backs_.finish(result, false);
        co_return result;
    }
}

Task<Result<>> Metadata::write_back_locked(bool final_flush) {
    Taken taken;
    co_await take(taken, final_flush);
    Result<> done = co_await put_down(taken, final_flush);
    if (!done) {
        co_await put_back(taken);
        co_return done;
    }
    l2_.written(taken.l2.slices);
    if (taken.freed.empty()) co_return Result<>();
    done = co_await apply_freed(std::move(taken.freed));
    // What was asked for is stable. Places that stay counted leak at worst, and are tried again where that may help.
    if (!done) log::warn("node '{}': {}", file_.node_name(), done.error().message());
    co_return Result<>();
}

// ---- T0 ----

/// The order matters: whoever changes an entry raises counts and says need_barrier(), stores, appends its record, frees
/// the old place - so each step here covers what the steps before it have seen.
Task<void> Metadata::take(Taken& taken, bool with_freed) {
    taken.log_mark = log_.mark();
    if (with_freed) {
        const std::lock_guard lock(pending_mutex_);
        taken.freed = std::exchange(freed_, {});
        freed_bytes_ = 0;
    }
    {
        auto guard = co_await mutex_.lock();
        taken.l1 = l1_.take_changes();
    }
    taken.l2 = l2_.take_dirty();
    if (barrier_.exchange(false, std::memory_order_acq_rel)) unflushed_ = true;
}

/// A step failed: everything is due again.
Task<void> Metadata::put_back(Taken& taken) {
    l2_.write_failed(taken.l2.slices);
    {
        auto guard = co_await mutex_.lock();
        for (const auto& [index, word] : taken.l1) l1_.mark_changed(index);
    }
    const std::lock_guard lock(pending_mutex_);
    for (const Freed& freed : taken.freed) freed_bytes_ += freed.bytes;
    freed_.insert(freed_.end(), taken.freed.begin(), taken.freed.end());
}

// ---- Steps 1 to 3 ----

Task<Result<>> Metadata::put_down(Taken& taken, bool final_flush) {
    if (taken.has_entries() || final_flush) CO_CHECK(co_await write_counts());
    if (taken.has_entries()) {
        // A file that has grown may be short again after a power cut, and no entry may name what is behind its end.
        if (unflushed_ || file_.size() > stable_size_) CO_CHECK(co_await flush_files());
        CO_CHECK(co_await write_entries(taken));
    }
    log_.clear_before(taken.log_mark);
    if (final_flush) CO_CHECK(co_await flush_files());
    co_return Result<>();
}

Task<Result<>> Metadata::write_counts() {
    if (!refcounts_.dirty()) co_return Result<>();
    // Lazily: the dirty bit says that counts are made anew after a crash.
    if (options_.lazy_refcounts && !strict_.load(std::memory_order_relaxed)) co_return Result<>();
    unflushed_ = true;
    auto guard = co_await mutex_.lock();
    co_return co_await refcounts_.write_back();
}

Task<Result<>> Metadata::flush_files() {
    if (Node* data = host_.data_file()) {
        Request rq = Request::internal();
        Result<> flushed = co_await data->flush(rq);
        if (!flushed) {
            co_return std::unexpected(std::move(flushed).error().context(
                fmt::format("Could not flush the data file; node '{}'", file_.node_name())));
        }
    }
    const uint64_t size = file_.size();
    CO_CHECK(co_await file_.flush());
    stable_size_ = size;
    unflushed_ = false;
    co_return Result<>();
}

Task<Result<>> Metadata::write_entries(const Taken& taken) {
    const uint64_t slice_bytes = l2_.slice_bytes();
    std::vector<FileWrite> writes;
    writes.reserve(taken.l2.slices.size());
    for (const L2SliceCache::Dirty& dirty : taken.l2.slices) {
        const uint64_t l1_index = dirty.slice / slices_per_table();
        const uint64_t table = l2_table_offset(l1_.get(l1_index));
        CHECK(table != 0, "a changed slice has a table");
        CO_CHECK(co_await check_l1_entry(l1_index));
        writes.push_back({table + (dirty.slice % slices_per_table()) * slice_bytes, {dirty.bytes, slice_bytes}});
    }
    CO_CHECK(co_await write_joined(std::move(writes), "L2 table"));

    // Only the entries copied at T0: their neighbours may name tables that are not in the file yet.
    std::vector<uint8_t> words(taken.l1.size() * 8);
    std::vector<FileWrite> entries;
    for (size_t i = 0; i < taken.l1.size(); i++) {
        store_be64(words.data() + i * 8, taken.l1[i].second);
        entries.push_back({image_.header.l1_table_offset + taken.l1[i].first * 8, std::span(words).subspan(i * 8, 8)});
    }
    co_return co_await write_joined(std::move(entries), "L1 table");
}

/// Adjacent ones together.
Task<Result<>> Metadata::write_joined(std::vector<FileWrite> writes, std::string_view what) {
    std::ranges::sort(writes, {}, &FileWrite::offset);
    Buffer joined;
    for (size_t i = 0; i < writes.size();) {
        const uint64_t offset = writes[i].offset;
        size_t bytes = writes[i].bytes.size(), end = i + 1;
        while (end < writes.size() && writes[end].offset == offset + bytes &&
               bytes + writes[end].bytes.size() <= kJoinedBytes)
            bytes += writes[end++].bytes.size();
        if (end == i + 1) {
            CO_CHECK(co_await file_.write(offset, writes[i].bytes, what));
        } else {
            if (joined.size() < bytes) joined = Buffer::alloc(std::max(bytes, std::min(kJoinedBytes, 2 * bytes)));
            uint8_t* to = joined.data();
            for (size_t k = i; k < end; k++) {
                std::memcpy(to, writes[k].bytes.data(), writes[k].bytes.size());
                to += writes[k].bytes.size();
            }
            CO_CHECK(co_await file_.write(offset, joined.span().first(bytes), what));
        }
        i = end;
    }
    co_return Result<>();
}

// ---- Freed places ----

bool Metadata::passes_discard(FreedBy by) const {
    switch (by) {
        case FreedBy::kRequest:
            return options_.pass_discard_request;
        case FreedBy::kSnapshot:
            return options_.pass_discard_snapshot;
        case FreedBy::kOther:
            return options_.pass_discard_other;
        case FreedBy::kNeverDiscard:
            break;
    }
    return false;
}

Task<Result<>> Metadata::apply_freed(std::vector<Freed> freed) {
    std::ranges::sort(freed,
                      [](const Freed& a, const Freed& b) { return a.by != b.by ? a.by < b.by : a.offset < b.offset; });
    // Whole clusters in a row are one call. Blobs share clusters, so each is its own.
    const uint64_t mask = cluster_size() - 1;
    size_t used = 0;
    for (size_t i = 1; i < freed.size(); i++) {
        Freed& last = freed[used];
        const bool joins = freed[i].by == last.by && freed[i].offset == last.offset + last.bytes &&
                           ((last.offset | last.bytes | freed[i].bytes) & mask) == 0;
        if (joins) {
            last.bytes += freed[i].bytes;
        } else {
            freed[++used] = freed[i];
        }
    }
    if (!freed.empty()) freed.resize(used + 1);

    Result<> result;
    std::optional<Freed> damaged;
    {
        // A place is handed out again under the mutex: until then its space goes back undisturbed.
        auto guard = co_await mutex_.lock();
        for (size_t i = 0; i < freed.size(); i++) {
            Result<std::vector<HostRun>> gone;
            // Tables of L2 are given up, too; guest data never lay on metadata, unless the entry was a bad one.
            const auto what =
                freed[i].by != FreedBy::kOther ? overlap_.what(freed[i].offset, freed[i].bytes) : std::nullopt;
            if (what) {
                gone = fail(ErrorKind::kCorrupt, "{} at {:#x}", structure_name(*what), freed[i].offset);
            } else {
                gone = co_await allocator_.free(freed[i].offset, freed[i].bytes);
            }
            if (!gone) {
                const ErrorKind kind = gone.error().kind();
                result = std::unexpected(std::move(gone).error());
                if (kind == ErrorKind::kCorrupt || kind == ErrorKind::kInvalid) {
                    damaged = freed[i];
                    continue;
                }
                for (; i < freed.size(); i++) add_freed(freed[i]);  // the medium failed: at the next flush
                break;
            }
            if (!passes_discard(freed[i].by)) continue;
            for (const HostRun& run : *gone) co_await file_.discard(run.offset, run.clusters * cluster_size());
        }
    }
    if (damaged) {
        (void)co_await host_.corrupt_on_write(
            fmt::format("freeing what is no guest data: {}", result.error().message()), damaged->offset,
            damaged->bytes);
    }
    co_return result;
}

}  // namespace gantry::block::qcow2
