#include "block/formats/qcow2/tree_refcounts.h"

#include <bit>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

/// Released runs in memory before finish() is called in the middle.
constexpr size_t kReleasedAtOnce = 65536;

/// A change of one step of a walk: which steps are done, so that the same walk can take them back.
struct Steps {
    int64_t delta = 0;
    uint64_t limit = UINT64_MAX;
    uint64_t done = 0;
};

Task<Result<>> change_range(Operation& op, Reference range, Steps& steps) {
    CO_CHECK(co_await op.refcounts().change_bytes(range.offset, range.bytes, steps.delta));
    steps.done++;
    co_return Result<>();
}

Task<Result<>> change_tree(Operation& op, std::span<const uint64_t> l1, Steps& steps) {
    CO_TRY(TableWords table, TableWords::create(op.geometry()));
    const uint64_t cluster = op.geometry().cluster_size();
    for (const uint64_t word : l1) {
        const uint64_t offset = l2_table_offset(word);
        if (offset == 0) continue;
        CO_CHECK(co_await table.load(op, offset));
        CO_TRY(const std::vector<Reference> ranges, table.references(op.geometry(), 0, table.entries()));
        if (steps.done == steps.limit) co_return Result<>();
        CO_CHECK(co_await change_range(op, {offset, cluster}, steps));
        for (const Reference& range : ranges) {
            if (steps.done == steps.limit) co_return Result<>();
            CO_CHECK(co_await change_range(op, range, steps));
        }
    }
    co_return Result<>();
}

/// What the flag of a cluster must be.
Task<Result<bool>> counted_once(Operation& op, uint64_t offset, Copied how) {
    if (how == Copied::kNowhere) co_return false;
    CO_TRY(const uint64_t count, co_await op.refcounts().get(offset >> op.geometry().cluster_bits));
    co_return count == 1;
}

Task<Result<bool>> rebuild_table(Operation& op, TableWords& table, Copied how) {
    bool changed = false;
    for (uint64_t i = 0; i < table.entries(); i++) {
        const uint64_t entry = table.entry(i);
        uint64_t right = entry & ~kCopied;
        if (!(entry & kCompressed)) {
            CO_TRY(const Reference reference, reference_of(op.geometry(), entry));
            if (reference.bytes != 0) {
                CO_TRY(const bool once, co_await counted_once(op, reference.offset, how));
                if (once) right |= kCopied;
            }
        }
        if (right == entry) continue;
        table.set_entry(i, right);
        changed = true;
    }
    co_return changed;
}

}  // namespace

Result<Reference> reference_of(const Geometry& g, uint64_t entry) {
    if (!(entry & kCompressed)) {
        const uint64_t host = entry & kOffsetMask;
        if (g.external_data || host == 0) return Reference{};
        if (g.offset_in_cluster(host) != 0) {
            return fail(ErrorKind::kCorrupt, "Cluster allocation offset {:#x} unaligned", host);
        }
        return Reference{host, g.cluster_size()};
    }
    const Piece piece = describe_entry(g, entry, 0, 0);
    if (piece.damage != Damage::kNone) {
        return fail(ErrorKind::kCorrupt, "Compressed cluster entry {:#x} found in image with external data file",
                    entry);
    }
    return Reference{piece.host, piece.bytes};
}

Result<TableWords> TableWords::create(const Geometry& geometry) {
    TableWords table;
    TRY(table.bytes_, Buffer::try_alloc(geometry.cluster_size()));
    table.l2_bits_ = geometry.l2_bits();
    table.entry_shift_ = static_cast<uint32_t>(std::countr_zero(geometry.l2_entry_bytes()));
    return table;
}

uint64_t TableWords::entry(uint64_t index) const { return load_be64(bytes_.data() + (index << entry_shift_)); }

void TableWords::set_entry(uint64_t index, uint64_t entry) {
    store_be64(bytes_.data() + (index << entry_shift_), entry);
}

uint64_t TableWords::bitmap(uint64_t index) const {
    return entry_shift_ == 4 ? load_be64(bytes_.data() + (index << entry_shift_) + 8) : 0;
}

void TableWords::set_bitmap(uint64_t index, uint64_t bitmap) {
    if (entry_shift_ == 4) store_be64(bytes_.data() + (index << entry_shift_) + 8, bitmap);
}

Task<Result<>> TableWords::load(Operation& op, uint64_t offset) {
    if (op.geometry().offset_in_cluster(offset) != 0) {
        co_return refuse_corrupt(op.file().node_name(), "L2 table offset unaligned", "{:#x} is not on a cluster",
                                 offset);
    }
    co_return co_await op.file().read(offset, bytes_.span(), "L2 table");
}

Task<Result<>> TableWords::save(Operation& op, uint64_t offset) {
    CO_CHECK(op.check_table_place(offset));
    co_return co_await op.file().write(offset, bytes_.span(), "L2 table");
}

Result<std::vector<Reference>> TableWords::references(const Geometry& geometry, uint64_t first, uint64_t end) const {
    std::vector<Reference> runs;
    bool open = false;  // the last run may go on
    for (uint64_t i = first; i < end; i++) {
        const uint64_t word = entry(i);
        TRY(const Reference reference, reference_of(geometry, word));
        if (reference.bytes == 0) continue;
        const bool plain = !(word & kCompressed);
        if (plain && open && runs.back().offset + runs.back().bytes == reference.offset) {
            runs.back().bytes += reference.bytes;
        } else {
            runs.push_back(reference);
        }
        open = plain;
    }
    return runs;
}

Task<Result<>> reference_tree(Operation& op, std::span<const uint64_t> l1) {
    Steps steps{.delta = 1};
    Result<> raised = co_await change_tree(op, l1, steps);
    if (raised) co_return raised;
    Steps back{.delta = -1, .limit = steps.done};
    Result<> undone = co_await change_tree(op, l1, back);
    if (!undone) co_return std::unexpected(std::move(undone).error().context(raised.error().message()));
    co_return raised;
}

Task<Result<>> release_tree(Operation& op, std::span<const uint64_t> l1, bool discard) {
    CO_TRY(TableWords table, TableWords::create(op.geometry()));
    const uint64_t cluster = op.geometry().cluster_size();
    for (const uint64_t word : l1) {
        const uint64_t offset = l2_table_offset(word);
        if (offset == 0) continue;
        CO_CHECK(co_await table.load(op, offset));
        CO_TRY(const std::vector<Reference> ranges, table.references(op.geometry(), 0, table.entries()));
        for (const Reference& range : ranges) CO_CHECK(co_await op.release(range.offset, range.bytes));
        CO_CHECK(co_await op.release(offset, cluster));
        if (op.released_runs() >= kReleasedAtOnce) CO_CHECK(co_await op.finish(discard));
    }
    co_return Result<>();
}

Task<Result<bool>> rebuild_copied(Operation& op, std::span<uint64_t> l1, Copied how) {
    CO_TRY(TableWords table, TableWords::create(op.geometry()));
    bool l1_changed = false;
    for (uint64_t& word : l1) {
        const uint64_t offset = l2_table_offset(word);
        if (offset == 0) continue;
        CO_CHECK(co_await table.load(op, offset));
        CO_TRY(const bool changed, co_await rebuild_table(op, table, how));
        if (changed) CO_CHECK(co_await table.save(op, offset));
        CO_TRY(const bool once, co_await counted_once(op, offset, how));
        const uint64_t right = (word & ~kCopied) | (once ? kCopied : 0);
        if (right != word) l1_changed = true;
        word = right;
    }
    co_return l1_changed;
}

void mark_tables(OverlapMap& overlap, Structure structure, std::span<const uint64_t> l1, uint64_t cluster_size,
                 bool add) {
    if (!(overlap.checked() & bit_of(structure))) return;
    for (const uint64_t word : l1) {
        const uint64_t offset = l2_table_offset(word);
        if (offset == 0) continue;
        if (add) {
            overlap.add(structure, offset, cluster_size);
        } else {
            overlap.remove(structure, offset, cluster_size);
        }
    }
}

}  // namespace gantry::block::qcow2
