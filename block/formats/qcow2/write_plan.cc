// Writes that change the mapping: where the bytes go, and what the entries say afterwards (spec/qcow2.md section 11).

#include <algorithm>

#include "block/align.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/write_words.h"

namespace gantry::block::qcow2 {

struct Qcow2Node::Plan : PlanState {
    L2SliceCache::Pin pin;
    uint64_t first = 0;  // guest offset of the first cluster
    uint64_t clusters = 1;
    uint64_t host = 0;       // place of the first cluster; the others follow
    HostRun run;             // to be given back when nothing comes of it
    bool new_place = false;  // the entries name another place afterwards
    bool fresh = false;
};

uint32_t Qcow2Node::write_unit(uint64_t offset) {
    const Geometry& g = geometry();
    if (!g.extended_l2 || l2_table_offset(l1_entry(offset)) == 0) return cluster_size();
    const auto view = l2_cache_->find(slice_of(offset));
    if (!view) return cluster_size();
    const Entry entry{.word = view->word(index_in_slice(offset) * 2)};
    return view->still_valid() && has_own_place(g, entry) ? uint32_t{1} << g.subcluster_bits() : cluster_size();
}

Entry Qcow2Node::entry_in(const L2SliceCache::Pin& pin, uint64_t offset) const {
    const uint32_t at = index_in_slice(offset) * entry_words();
    return {.word = pin.word(at), .bitmap = geometry().extended_l2 ? pin.word(at + 1) : 0};
}

bool Qcow2Node::unallocated_is_zero(uint64_t offset) const {
    if (geometry().raw_external_data) return false;
    return !backing() || offset >= backing()->size();
}

Task<Result<L2SliceCache::Pin>> Qcow2Node::pin_for_change(uint64_t offset) {
    Metadata& m = *metadata_;
    if (!m.in_session()) CO_CHECK(co_await m.begin_session());
    const uint64_t l1 = l1_entry(offset);
    if (l2_table_offset(l1) == 0 || !(l1 & kCopied)) {
        CO_CHECK(co_await m.own_l2_table(offset >> geometry().l1_shift()));
    }
    if (L2SliceCache::Pin pin = l2_cache_->pin(slice_of(offset))) co_return std::move(pin);
    co_return co_await m.pin_slice(slice_of(offset));
}

Task<Error> Qcow2Node::damaged_for_write(uint64_t offset, Entry entry, Damage damage) {
    const Geometry& g = geometry();
    const uint64_t index = (offset >> g.cluster_bits) & ((uint64_t{1} << g.l2_bits()) - 1);
    const uint64_t table = l2_table_offset(l1_entry(offset));
    co_return co_await corrupt_on_write(damage_text(damage, entry.word, entry.bitmap, table, index), place_of(entry),
                                        g.cluster_size());
}

Task<Result<WritePlan>> Qcow2Node::plan_write(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    CO_CHECK(check_writable());
    const Geometry& g = geometry();
    length = std::min(length, slice_end(offset) - offset);
    auto state = std::make_unique<Plan>();
    CO_TRY(state->pin, co_await pin_for_change(offset));
    const Entry entry = entry_in(state->pin, offset);
    const Piece piece = describe_entry(g, entry.word, entry.bitmap, offset);
    if (piece.damage != Damage::kNone) {
        co_return std::unexpected(co_await damaged_for_write(offset, entry, piece.damage));
    }
    WritePlan plan;
    plan.guest_offset = offset;
    plan.node = &data();
    if (piece.kind == Extent::Kind::kData && !piece.must_copy) {
        plan.in_place = true;
        plan.length = std::min(length, piece.length);
        plan.host_offset = piece.host;
        plan.copy_begin = offset;
        plan.copy_end = offset + plan.length;
        CO_CHECK(co_await check_place(plan.host_offset, plan.length));
        co_return plan;
    }
    state->first = offset - g.offset_in_cluster(offset);
    if (has_own_place(g, entry)) {
        plan_kept_place(plan, *state, length);
    } else {
        CO_CHECK(co_await plan_new_place(plan, *state, length));
    }
    const uint64_t head = offset - plan.copy_begin;
    Result<> allowed = co_await check_place(plan.host_offset - head, plan.copy_end - plan.copy_begin);
    if (!allowed) {
        // Counts are wrong when a new place is somebody else's: it stays taken.
        co_return std::unexpected(std::move(allowed).error());
    }
    plan.state = std::move(state);
    co_return plan;
}

/// A write must not touch metadata.
Task<Result<>> Qcow2Node::check_place(uint64_t host, uint64_t length) {
    if (broken_.load(std::memory_order_relaxed)) return ready_task(check_writable());
    if (geometry().external_data || !metadata_->overlap().hits(host, length)) return ready_task(Result<>());
    return refuse_place(host, length);
}

Task<Result<>> Qcow2Node::refuse_place(uint64_t host, uint64_t length) {
    Request rq = Request::internal();
    co_return std::unexpected(co_await write_refused(rq, host, length));
}

/// Clusters without a place of their own, as many as are asked for and to be had in a row.
Task<Result<>> Qcow2Node::plan_new_place(WritePlan& plan, Plan& state, uint64_t length) {
    const Geometry& g = geometry();
    const uint64_t cs = g.cluster_size();
    const uint64_t offset = plan.guest_offset;
    const auto needs_place = [&](uint64_t at) {
        const Entry e = entry_in(state.pin, at);
        return describe_entry(g, e.word, e.bitmap, at).damage == Damage::kNone && !has_own_place(g, e);
    };
    uint64_t count = 1;
    while (state.first + count * cs < offset + length && needs_place(state.first + count * cs)) count++;

    state.new_place = true;
    if (g.external_data) {
        state.host = state.first;
        state.clusters = count;
    } else {
        uint64_t near = 0;
        if (index_in_slice(state.first) > 0) {
            const Entry before = entry_in(state.pin, state.first - cs);
            if (has_place(g, before)) near = place_of(before) + cs;
        }
        CO_TRY(state.run, co_await metadata_->allocate(count, near));
        state.host = state.run.offset;
        state.clusters = state.run.clusters;
        state.fresh = state.run.fresh;
    }
    const uint64_t end = state.first + state.clusters * cs;
    plan.length = std::min(length, end - offset);
    plan.host_offset = state.host + (offset - state.first);
    plan.fresh_reads_zero = state.fresh;
    plan.copy_begin = edge_of(entry_in(state.pin, state.first), state.first, offset, true);
    plan.copy_end = edge_of(entry_in(state.pin, end - cs), end - cs, offset + plan.length, false);
    co_return Result<>();
}

/// Where copying begins (or ends) in the cluster at `cluster`, whose old entry is `old`, for a write that begins (ends)
/// at `limit`: what the new place must hold besides.
uint64_t Qcow2Node::edge_of(const Entry& old, uint64_t cluster, uint64_t limit, bool is_begin) const {
    const Geometry& g = geometry();
    const uint64_t cluster_end = cluster + g.cluster_size();
    // The data file is the disk where no entry says otherwise: the bytes are there.
    if (g.raw_external_data && !has_place(g, old) && !old.zero() && !(old.word & kReadsAsZero)) return limit;
    if (!g.extended_l2 || old.is_compressed()) return is_begin ? cluster : cluster_end;
    const uint64_t sub = uint64_t{1} << g.subcluster_bits();
    uint64_t edge = is_begin ? align_down(limit, sub) : align_up(limit, sub);
    if (old.allocated()) {
        const auto first = static_cast<uint64_t>(std::countr_zero(old.allocated()));
        const auto last = static_cast<uint64_t>(31 - std::countl_zero(old.allocated()));
        edge = is_begin ? std::min(edge, cluster + first * sub) : std::max(edge, cluster + (last + 1) * sub);
    }
    return edge;
}

/// A place of our own that holds nothing (of this subcluster) yet.
void Qcow2Node::plan_kept_place(WritePlan& plan, Plan& state, uint64_t length) const {
    const Geometry& g = geometry();
    const uint64_t cs = g.cluster_size();
    const uint64_t offset = plan.guest_offset;
    const Entry entry = entry_in(state.pin, state.first);
    state.host = place_of(entry);
    plan.host_offset = state.host + (offset - state.first);
    if (!g.extended_l2) {
        const auto continues = [&](uint64_t count) {
            const uint64_t at = state.first + count * cs;
            if (at >= offset + length) return false;
            const Entry e = entry_in(state.pin, at);
            return has_own_place(g, e) && (e.word & kReadsAsZero) && place_of(e) == state.host + count * cs;
        };
        while (continues(state.clusters)) state.clusters++;
        const uint64_t end = state.first + state.clusters * cs;
        plan.length = std::min(length, end - offset);
        plan.copy_begin = state.first;
        plan.copy_end = end;
        return;
    }
    plan.length = std::min(length, state.first + cs - offset);
    const uint64_t sub = uint64_t{1} << g.subcluster_bits();
    const uint64_t end = offset + plan.length;
    const auto holds = [&](uint64_t at) {
        const uint32_t bit = subclusters_touched(g, state.first, at, at + 1);
        return (entry.allocated() & bit) || (g.raw_external_data && !(entry.zero() & bit));
    };
    plan.copy_begin = holds(offset) ? offset : align_down(offset, sub);
    plan.copy_end = holds(end - 1) ? end : align_up(end, sub);
}

Entry Qcow2Node::entry_after(const Plan& state, const WritePlan& plan, uint64_t cluster, const Entry& old,
                             uint64_t host) const {
    const Geometry& g = geometry();
    Entry entry{.word = host | kCopied};
    if (!g.extended_l2) return entry;
    const uint32_t written = subclusters_touched(g, cluster, plan.copy_begin, plan.copy_end);
    const uint64_t before = state.new_place && old.is_compressed() ? 0 : old.bitmap;
    entry.bitmap = Entry::bits(static_cast<uint32_t>(before) | written, static_cast<uint32_t>(before >> 32) & ~written);
    return entry;
}

/// Everything of a commit that must not be interrupted. False: the mapping log has no room; the entries are stored.
bool Qcow2Node::commit_plan(WritePlan& plan) {
    auto& state = static_cast<Plan&>(*plan.state);
    const Geometry& g = geometry();
    const uint64_t cs = g.cluster_size();
    Words words(state.clusters * entry_words());
    std::unique_lock<std::mutex> lock;
    if (g.extended_l2 && !state.new_place) {
        lock = std::unique_lock(entry_mutexes_[(state.first >> g.cluster_bits) % entry_mutexes_.size()]);
    }
    bool old_is_zero = true;
    bool frees = false;
    for (uint64_t i = 0; i < state.clusters; i++) {
        const uint64_t cluster = state.first + i * cs;
        const Entry old = entry_in(state.pin, cluster);
        words.push(entry_after(state, plan, cluster, old, state.host + i * cs), g.extended_l2);
        const bool has_data = has_place(g, old) || old.is_compressed();
        if (has_data) {
            frees = state.new_place;
            old_is_zero = false;
        } else if (!(old.word & kReadsAsZero) && !(g.extended_l2 && old.zero() == UINT32_MAX)) {
            old_is_zero = old_is_zero && unallocated_is_zero(cluster);
        }
    }
    // After a power cut every sector shows old bytes or new ones: what a place held before must not show, nor may
    // copied bytes be missing. What was never written is zeroes only where it is not deciphered.
    if (!state.fresh || !old_is_zero || plan.copied || cipher_) metadata_->need_barrier();

    std::vector<Entry> old_entries;
    if (frees) {
        for (uint64_t i = 0; i < state.clusters; i++) old_entries.push_back(entry_in(state.pin, state.first + i * cs));
    }
    const bool logged = store_entries(state.pin, state.first, words.span());
    for (const Entry& old : old_entries) free_place(old, FreedBy::kNeverDiscard);
    return logged;
}

Task<Result<>> Qcow2Node::commit_write(Request& rq, WritePlan& plan) {
    auto& state = static_cast<Plan&>(*plan.state);
    if (broken_.load(std::memory_order_relaxed)) {
        metadata_->give_back(state.run, true);
        co_return check_writable();
    }
    const bool logged = commit_plan(plan);
    state.pin.release();
    if (!logged) CO_CHECK(co_await metadata_->write_back());
    kick_write_back();
    co_return Result<>();
}

Task<void> Qcow2Node::abort_write(Request& rq, WritePlan& plan) {
    const auto& state = static_cast<const Plan&>(*plan.state);
    if (state.run.clusters) metadata_->give_back(state.run, true);
    co_return;
}

// ---- Entries ----

/// Stores first, then logs: a write-back that takes the slices before the words are in them finds the record in the
/// half of the log that it does not clear.
bool Qcow2Node::store_entries(L2SliceCache::Pin& pin, uint64_t offset, std::span<const uint64_t> words) {
    pin.store(index_in_slice(offset) * entry_words(), words);
    MappingLog& log = metadata_->log();
    if (!log.attached()) return true;
    const uint32_t step = entry_words();
    std::array<MappingRecord, 64> records;
    uint64_t cluster = offset >> geometry().cluster_bits;
    for (size_t i = 0; i < words.size();) {
        size_t count = 0;
        for (; i < words.size() && count < records.size(); i += step, cluster++) {
            records[count++] = {.kind = MappingRecord::Kind::kL2,
                                .index = cluster,
                                .word = words[i],
                                .bitmap = step == 2 ? words[i + 1] : 0};
        }
        if (!log.append(std::span(records).first(count))) return false;
    }
    return true;
}

void Qcow2Node::free_place(const Entry& old, FreedBy by) {
    const Geometry& g = geometry();
    if (g.external_data) return;  // places are where they are; discards of the data file are the caller's
    if (old.is_compressed()) {
        const Blob blob = blob_of(g, old);
        metadata_->free_later(blob.host, blob.bytes, by);
    } else if (has_place(g, old)) {
        metadata_->free_later(place_of(old), g.cluster_size(), by);
    }
}

}  // namespace gantry::block::qcow2
