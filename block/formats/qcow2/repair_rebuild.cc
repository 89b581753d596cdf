// Refcount blocks and table made anew from counted references (spec/qcow2.md section 17).

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check_references.h"
#include "block/formats/qcow2/refcount_bits.h"
#include "block/formats/qcow2/refcounts.h"
#include "runtime/buffer.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

/// Where the new structures go: blocks, the table, the snapshot table, behind everything that is in use or in the file.
struct Plan {
    uint64_t base = 0;  // first cluster
    uint64_t table_clusters = 0;
    uint64_t snapshot_clusters = 0;  // 0: that table stays where it is
    std::vector<uint64_t> indexes;   // of the blocks that are not all zero

    uint64_t table_at() const { return base + indexes.size(); }
    uint64_t snapshots_at() const { return table_at() + table_clusters; }
    uint64_t end() const { return snapshots_at() + snapshot_clusters; }
};

/// The old structures are no references any more.
void forget_old(CheckRun& run) {
    const Header& h = run.image.header;
    const auto drop = [&run](uint64_t cluster) {
        const uint64_t count = run.counts.get(cluster);
        if (count > 0) run.counts.set(cluster, count - 1);
    };
    const uint64_t bytes = h.refcount_table_clusters * run.cluster_size();
    if (!run.outside(h.refcount_table_offset, bytes)) {
        for (uint64_t i = 0; i < h.refcount_table_clusters; i++) drop(run.cluster_of(h.refcount_table_offset) + i);
    }
    for (uint64_t at = 0; !run.mended_snapshots.empty() && at < run.snapshot_bytes; at += run.cluster_size())
        drop(run.cluster_of(h.snapshots_offset + at));
    for (const BlockRef& block : run.blocks) {
        if (block.counted) drop(run.cluster_of(block.offset));
    }
}

Result<Plan> plan_places(const CheckRun& run, uint64_t per_block) {
    Plan plan;
    plan.base = std::max(run.file_clusters, run.counts.end());
    plan.snapshot_clusters = (run.mended_snapshots.size() + run.cluster_size() - 1) >> run.g.cluster_bits;
    std::vector<uint64_t> used;
    for (uint64_t first = 0; first < plan.base; first += per_block) {
        if (run.counts.any(first, per_block)) used.push_back(first / per_block);
    }
    plan.indexes = used;
    // The structures describe themselves too, so each round may need more of them.
    for (;;) {
        const uint64_t table_clusters = ((plan.indexes.back() + 1) * 8 + run.cluster_size() - 1) >> run.g.cluster_bits;
        std::vector<uint64_t> indexes = used;
        const uint64_t end = plan.base + plan.indexes.size() + table_clusters + plan.snapshot_clusters;
        const uint64_t first = plan.base / per_block, last = (end - 1) / per_block;
        for (uint64_t i = first; i <= last; i++) {
            if (indexes.back() != i) indexes.push_back(i);
        }
        const bool settled = indexes.size() == plan.indexes.size() && table_clusters == plan.table_clusters;
        plan.indexes = std::move(indexes);
        plan.table_clusters = table_clusters;
        if (plan.table_clusters * run.cluster_size() > kMaxRefcountTableBytes) {
            return fail(ErrorKind::kTooLarge, "node '{}': a refcount table for {} clusters would be too large",
                        run.file.node_name(), plan.end());
        }
        if (settled) return plan;
    }
}

Task<Result<>> write_blocks(CheckRun& run, const Plan& plan, uint64_t per_block) {
    const uint32_t order = run.image.header.refcount_order;
    const uint64_t max = max_refcount(order);
    Buffer block = Buffer::alloc(run.cluster_size());
    run.progress.total += plan.indexes.size() * run.cluster_size();
    for (size_t k = 0; k < plan.indexes.size(); k++) {
        std::ranges::fill(block.span(), 0);
        const uint64_t first = plan.indexes[k] * per_block;
        const uint64_t last = std::min(first + per_block, plan.end());
        for (uint64_t cluster = first; cluster < last; cluster++) {
            const uint64_t count = cluster >= plan.base ? 1 : std::min(run.counts.get(cluster), max);
            if (count != 0) set_refcount_in_block(block.span(), order, cluster - first, count);
        }
        CO_CHECK(co_await run.file.write((plan.base + k) << run.g.cluster_bits, block.span(), "refcount block"));
        CO_CHECK(co_await run.progress.advance(run.cluster_size()));
    }
    co_return Result<>();
}

Task<Result<>> write_table(CheckRun& run, const Plan& plan) {
    Buffer table = Buffer::alloc(plan.table_clusters << run.g.cluster_bits);
    std::ranges::fill(table.span(), 0);
    for (size_t k = 0; k < plan.indexes.size(); k++)
        store_be64(table.data() + plan.indexes[k] * 8, (plan.base + k) << run.g.cluster_bits);
    co_return co_await run.file.write(plan.table_at() << run.g.cluster_bits, table.span(), "refcount table");
}

}  // namespace

Task<Result<>> rebuild_refcounts(CheckRun& run) {
    Header& h = run.image.header;
    const uint64_t per_block = run.cluster_size() * 8 >> h.refcount_order;
    forget_old(run);
    CO_TRY(const Plan plan, plan_places(run, per_block));
    CO_CHECK(co_await write_blocks(run, plan, per_block));
    CO_CHECK(co_await write_table(run, plan));
    CO_CHECK(
        co_await run.file.write(plan.snapshots_at() << run.g.cluster_bits, run.mended_snapshots, "snapshot table"));
    CO_CHECK(co_await run.file.flush());

    Header header = h;
    header.refcount_table_offset = plan.table_at() << run.g.cluster_bits;
    header.refcount_table_clusters = static_cast<uint32_t>(plan.table_clusters);
    if (plan.snapshot_clusters > 0) header.snapshots_offset = plan.snapshots_at() << run.g.cluster_bits;
    uint8_t fields[24];  // refcount table and snapshot table lie side by side in the header
    store_be64(fields, header.refcount_table_offset);
    store_be32(fields + 8, header.refcount_table_clusters);
    store_be32(fields + 12, header.nb_snapshots);
    store_be64(fields + 16, header.snapshots_offset);
    CO_CHECK(co_await run.file.write(48, fields, "header"));
    CO_CHECK(co_await run.file.flush());
    h = header;
    if (plan.snapshot_clusters > 0) {
        for (Snapshot& snapshot : run.image.snapshots) {
            if (snapshot.disk_size) continue;
            snapshot.disk_size = h.size;
            snapshot.stored_bytes = (56 + snapshot.id.size() + snapshot.name.size() + 7) & ~size_t{7};
        }
    }
    run.mended++;
    log::warn("node '{}': the refcounts of the image were made anew at {:#x}", run.file.node_name(),
              h.refcount_table_offset);
    co_return Result<>();
}

Task<Result<>> write_feature_words(ImageFile& file, const Header& header) {
    uint8_t words[24];
    store_be64(words, header.incompatible_features);
    store_be64(words + 8, header.compatible_features);
    store_be64(words + 16, header.autoclear_features);
    CO_CHECK(co_await file.write(72, words, "header"));
    co_return co_await file.flush();
}

Task<Result<>> drop_bitmaps(ImageFile& file, Image& image) {
    Header header = image.header;
    header.autoclear_features &= ~kAutoclearBitmaps;
    CO_CHECK(co_await write_feature_words(file, header));
    image.header = header;
    image.extensions.bitmaps.reset();
    image.bitmaps.clear();
    image.bitmaps_trusted = false;
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
