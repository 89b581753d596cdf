// Zeroes and discards: entries change, data is not written (spec/qcow2.md section 11).

#include <algorithm>

#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/write_words.h"
#include "runtime/timer.h"

namespace gantry::block::qcow2 {

namespace {

constexpr unsigned kSlicesPerTurn = 32;

}  // namespace

/// Whole clusters, or whole subclusters with extended L2; the last one may end at the end of the disk.
struct Qcow2Node::ZeroRequest {
    uint64_t offset = 0, length = 0;
    bool may_unmap = false;
    Request* rq = nullptr;

    uint64_t end() const { return offset + length; }
};

Task<Result<>> Qcow2Node::zero_mapped(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    CO_CHECK(check_writable());
    const Geometry& g = geometry();
    const ZeroRequest z{.offset = offset, .length = length, .may_unmap = has(flags, WriteFlags::kMayUnmap), .rq = &rq};
    if (!g.zero_flag && (!z.may_unmap || !nothing_below())) {
        co_return fail(ErrorKind::kUnsupported, "node '{}': images of version 2 have no zero clusters", name());
    }
    CO_CHECK(co_await check_zeroable(z));
    if (g.raw_external_data) CO_CHECK(co_await zero_raw_data(z));
    co_return co_await change_to_zero(z);
}

Task<Result<>> Qcow2Node::discard_mapped(Request& rq, uint64_t offset, uint64_t length) {
    CO_CHECK(check_writable());
    const Geometry& g = geometry();
    // Without a zero state the backing file would show again.
    if (!g.zero_flag && !nothing_below()) {
        co_return fail(ErrorKind::kUnsupported, "node '{}': images of version 2 over a backing file keep their data",
                       name());
    }
    const ZeroRequest z{.offset = offset, .length = length, .may_unmap = true, .rq = &rq};
    if (g.raw_external_data) CO_CHECK(co_await zero_raw_data(z));
    co_return co_await change_to_zero(z);
}

/// The data file alone is a faithful image: it is zeroed, too.
Task<Result<>> Qcow2Node::zero_raw_data(ZeroRequest z) {
    const uint64_t end = std::min(z.end(), size());
    if (z.offset >= end) co_return Result<>();
    co_return co_await data().write_zeroes(*z.rq, z.offset, end - z.offset,
                                           z.may_unmap ? WriteFlags::kMayUnmap : WriteFlags::kNone);
}

/// No backing file, not even one that only the header knows.
bool Qcow2Node::nothing_below() const { return !backing() && image_.backing_name.empty(); }

/// A part of a compressed cluster cannot be zeroed by its entry. Only the two ends can be parts.
Task<Result<>> Qcow2Node::check_zeroable(ZeroRequest z) {
    const Geometry& g = geometry();
    if (!g.extended_l2) co_return Result<>();
    const uint64_t disk_end = size();
    for (const uint64_t at : {z.offset, z.end() - 1}) {
        const uint64_t cluster = at - g.offset_in_cluster(at);
        const bool whole =
            z.offset <= cluster && z.end() >= std::min(cluster + g.cluster_size(), std::max(disk_end, z.end()));
        if (whole) continue;
        Extent extent;
        if (map(cluster, 1, extent) != MapResult::kHit) {
            CO_TRY(extent, co_await load_map(*z.rq, cluster, 1));
        }
        if (extent.kind != Extent::Kind::kEncoded) continue;
        co_return fail(ErrorKind::kUnsupported, "node '{}': a part of the compressed cluster at {} cannot be zeroed",
                       name(), cluster);
    }
    co_return Result<>();
}

/// Nothing has to change where no table is: the range reads as zeroes by its absence.
bool Qcow2Node::needs_no_table(uint64_t offset) const {
    return l2_table_offset(l1_entry(offset)) == 0 && nothing_below();
}

Task<Result<>> Qcow2Node::change_to_zero(ZeroRequest z) {
    unsigned slices = 0;
    for (uint64_t pos = z.offset; pos < z.end();) {
        if (needs_no_table(pos)) {
            const uint32_t shift = geometry().l1_shift();
            pos = ((pos >> shift) + 1) << shift;
            continue;
        }
        const uint64_t end = std::min(z.end(), slice_end(pos));
        CO_CHECK(co_await change_slice(z, pos, end));
        pos = end;
        if (++slices % kSlicesPerTurn == 0) co_await yield_turn();
    }
    kick_write_back();
    co_return Result<>();
}

/// What the entry `old` of the cluster at `cluster` becomes.
Entry Qcow2Node::zeroed(const ZeroRequest& z, uint64_t cluster, const Entry& old) const {
    const Geometry& g = geometry();
    const bool unmap = z.may_unmap && !metadata_->options().discard_no_unref;
    if (!g.extended_l2) {
        const Entry plain{.word = g.zero_flag ? kReadsAsZero : 0};
        if (old.is_compressed()) return plain;
        if (has_place(g, old)) return unmap ? plain : Entry{.word = old.word | kReadsAsZero};
        if (old.word == 0 && nothing_below() && !g.raw_external_data) return old;
        return plain;
    }
    const uint64_t end = z.end() >= size() ? cluster + g.cluster_size() : z.end();
    const uint32_t mask = subclusters_touched(g, cluster, z.offset, end);
    if (old.is_compressed()) return {.word = 0, .bitmap = Entry::bits(0, UINT32_MAX)};
    const uint32_t allocated = old.allocated() & ~mask;
    // What is unallocated over nothing reads as zeroes already.
    const bool as_it_is = nothing_below() && !g.raw_external_data && !(old.allocated() & mask);
    const uint32_t zero = as_it_is ? old.zero() : old.zero() | mask;
    Entry entry{.word = old.word, .bitmap = Entry::bits(allocated, zero)};
    if (has_place(g, old) && allocated == 0 && unmap) entry.word = 0;
    return entry;
}

/// [begin, end) lies in one slice.
Task<Result<>> Qcow2Node::change_slice(ZeroRequest z, uint64_t begin, uint64_t end) {
    const Geometry& g = geometry();
    const uint64_t cs = g.cluster_size();
    const uint64_t first = begin - g.offset_in_cluster(begin);
    CO_TRY(L2SliceCache::Pin pin, co_await pin_for_change(begin));
    Words words(((end - first + cs - 1) >> g.cluster_bits) * entry_words());
    std::vector<Entry> freed, emptied;
    std::vector<std::pair<uint64_t, uint64_t>> holes;  // guest ranges of an external data file
    bool changed = false;
    for (uint64_t cluster = first; cluster < end; cluster += cs) {
        const Entry old = entry_in(pin, cluster);
        const Damage damage = describe_entry(g, old.word, old.bitmap, cluster).damage;
        if (damage != Damage::kNone) co_return std::unexpected(co_await damaged_for_write(cluster, old, damage));
        const Entry next = zeroed(z, cluster, old);
        words.push(next, g.extended_l2);
        if (next == old) continue;
        changed = true;
        // Its space may go back to the host at once.
        if (has_place(g, next)) CO_CHECK(co_await check_place(place_of(next), cs));
        const bool loses_place = has_place(g, old) && !has_place(g, next);
        if (old.is_compressed() || loses_place) freed.push_back(old);
        if (g.external_data && loses_place) {
            if (holes.empty() || holes.back().second != cluster) holes.emplace_back(cluster, cluster);
            holes.back().second = cluster + cs;
        }
        const bool without_data = !g.extended_l2 || next.allocated() == 0;
        if (z.may_unmap && has_own_place(g, next) && without_data) emptied.push_back(next);
    }
    if (!changed) co_return Result<>();
    const bool logged = store_entries(pin, first, words.span());
    for (const Entry& old : freed) free_place(old, FreedBy::kRequest);
    pin.release();
    if (!logged) CO_CHECK(co_await metadata_->write_back());
    // What is discarded before the loss of its entry is stable may show through that entry: as zeroes, but deciphered
    // zeroes are garbage.
    if (!metadata_->options().pass_discard_request || cipher_) co_return Result<>();

    // Kept places go on being ours, and no request waits for them: their space may go at once.
    for (const Entry& entry : emptied) {
        if (!g.external_data) co_await image_file_.discard(place_of(entry), cs);
    }
    const uint64_t disk_end = size();
    for (const auto& [from, to] : holes) {
        if (g.raw_external_data || from >= disk_end) continue;
        (void)co_await data().discard(*z.rq, from, std::min(to, disk_end) - from);
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
