// Which entries name the clusters of a window.

#include <algorithm>

#include "block/formats/qcow2/compaction.h"

namespace gantry::block::qcow2 {

void Compaction::collect_table(What what, const TableWords& table, uint64_t offset, uint64_t paths, uint64_t guest,
                               uint64_t begin, uint64_t end) {
    const Geometry& g = op_.geometry();
    for (uint64_t i = 0; i < table.entries(); i++) {
        const uint64_t entry = table.entry(i);
        if (((entry & kCompressed) != 0) != (what == What::kBlobs)) continue;
        const Result<Reference> reference = reference_of(g, entry);
        if (!reference || reference->bytes == 0) continue;
        const uint64_t last = (reference->offset + reference->bytes - 1) >> g.cluster_bits;
        if (last < begin || last >= end) continue;
        Ref ref;
        ref.cluster = what == What::kBlobs ? reference->offset : last;
        ref.table = offset;
        ref.guest = guest + (i << g.cluster_bits);
        ref.bytes = reference->bytes;
        ref.index = static_cast<uint32_t>(i);
        ref.paths = paths;
        refs_.push_back(ref);
    }
}

Task<Result<>> Compaction::collect_tree(What what, uint64_t l1_offset, const std::vector<uint64_t>& l1, uint64_t begin,
                                        uint64_t end) {
    const Geometry& g = op_.geometry();
    CO_TRY(TableWords table, TableWords::create(g));
    for (size_t i = 0; i < l1.size(); i++) {
        const uint64_t offset = l2_table_offset(l1[i]);
        if (offset == 0) continue;
        const uint64_t cluster = offset >> g.cluster_bits;
        if (what == What::kTables) {
            if (g.offset_in_cluster(offset) != 0 || cluster < begin || cluster >= end) continue;
            refs_.push_back({.cluster = cluster, .table = l1_offset, .index = static_cast<uint32_t>(i)});
            continue;
        }
        if (!seen_tables_.insert(offset).second) continue;
        CO_CHECK(co_await table.load(op_, offset));
        CO_TRY(const uint64_t paths, co_await op_.refcounts().get(cluster));
        collect_table(what, table, offset, paths, uint64_t{i} << g.l1_shift(), begin, end);
    }
    co_return Result<>();
}

Task<Result<>> Compaction::collect(What what, uint64_t begin, uint64_t end) {
    refs_.clear();
    seen_tables_.clear();
    CO_CHECK(co_await collect_tree(what, op_.header().l1_table_offset, active_l1_, begin, end));
    const std::vector<Snapshot> snapshots = op_.image().snapshots;
    for (const Snapshot& s : snapshots) {
        CO_TRY(const std::vector<uint64_t> l1, co_await op_.read_l1(s.l1_table_offset, s.l1_size));
        CO_CHECK(co_await collect_tree(what, s.l1_table_offset, l1, begin, end));
    }
    std::ranges::sort(refs_, {}, [](const Ref& r) { return std::pair(r.cluster, r.table); });
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
