// New refcount structures beside the old ones (spec/qcow2.md sections 6, 12 and 16).

#include <algorithm>
#include <unordered_set>

#include "block/formats/qcow2/amend_steps.h"
#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refcount_bits.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

/// Tries to find a row that holds the structures which describe that row, too.
constexpr int kLayoutTries = 16;
constexpr uint64_t kFixedAt = 48, kFixedEnd = 100;  // header bytes from the refcount table to the width of counts

/// What is to be written: a table, then the blocks of `indices`, in one row.
struct Layout {
    uint64_t offset = 0;
    uint64_t clusters = 0;
    std::vector<uint64_t> indices;  // ascending
    uint64_t table_clusters() const { return clusters - indices.size(); }
};

/// The old structures, whose own clusters will not be counted any more.
struct Old {
    std::unordered_set<uint64_t> clusters;
    std::vector<uint64_t> blocks;  // table indices that exist
    uint64_t per_block = 0;
};

class Rewrite {
  public:
    Rewrite(Operation& op, uint32_t order, Progress progress)
        : op_(op),
          order_(order),
          per_block_((op.geometry().cluster_size() * 8) >> order),
          most_(max_refcount(order)),
          progress_(std::move(progress)) {}

    /// Nothing is done when the new structures would not end before cluster `limit`.
    Task<Result<>> run(uint64_t limit) {
        CO_CHECK(co_await place());
        if ((layout_.offset >> cluster_bits()) + layout_.clusters >= limit) {
            co_await op_.give_back();
            co_return Result<>();
        }
        CO_CHECK(co_await write());
        CO_CHECK(co_await switch_header());
        co_return co_await op_.refcounts().reload();
    }

  private:
    uint64_t cluster_bits() const { return op_.geometry().cluster_bits; }

    void look_at_old() {
        const Header& h = op_.header();
        old_ = {};
        old_.per_block = op_.refcounts().clusters_per_block();
        const uint64_t first = h.refcount_table_offset >> cluster_bits();
        for (uint64_t i = 0; i < h.refcount_table_clusters; i++) old_.clusters.insert(first + i);
        const std::vector<uint64_t>& table = op_.refcounts().table();
        for (uint64_t i = 0; i < table.size(); i++) {
            if (table[i] == 0) continue;
            old_.blocks.push_back(i);
            old_.clusters.insert(table[i] >> cluster_bits());
        }
    }

    /// The count that a cluster will have.
    Task<Result<uint64_t>> count_of(uint64_t cluster) {
        CO_TRY(uint64_t count, co_await op_.refcounts().get(cluster));
        if (count != 0 && old_.clusters.contains(cluster)) count--;
        if (count > most_) {
            co_return refuse(ErrorKind::kInvalid, op_.file().node_name(),
                             fmt::format("Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has "
                                         "a refcount of {}",
                                         1u << order_, cluster << cluster_bits(), count),
                             "such counts go up to {}", most_);
        }
        co_return count;
    }

    /// Indices of the blocks that are needed for what is counted now.
    Task<Result<std::vector<uint64_t>>> needed() {
        std::vector<uint64_t> indices;
        for (size_t k = 0; k < old_.blocks.size(); k++) {
            if (progress_ && !progress_(k, old_.blocks.size() * 2)) {
                co_return fail(ErrorKind::kCancelled, "Operation canceled");
            }
            const uint64_t begin = old_.blocks[k] * old_.per_block;
            for (uint64_t c = begin; c < begin + old_.per_block; c++) {
                const uint64_t index = c / per_block_;
                if (!indices.empty() && indices.back() == index && cannot_overflow()) continue;
                CO_TRY(const uint64_t count, co_await count_of(c));
                if (count != 0 && (indices.empty() || indices.back() != index)) indices.push_back(index);
            }
        }
        co_return indices;
    }
    /// Counts must be looked at even where the block is known to be needed, unless none can be too large.
    bool cannot_overflow() const { return most_ >= op_.refcounts().max_count(); }

    Task<Result<>> place() {
        uint64_t clusters = 2;
        for (int i = 0; i < kLayoutTries; i++) {
            CO_TRY(const uint64_t offset, co_await op_.allocate(clusters << cluster_bits()));
            CO_CHECK(co_await op_.refcounts().write_back());
            look_at_old();
            CO_TRY(std::vector<uint64_t> indices, co_await needed());
            const uint64_t entries = indices.empty() ? 1 : indices.back() + 1;
            if (entries * 8 > kMaxRefcountTableBytes) {
                co_return refuse(ErrorKind::kTooLarge, op_.file().node_name(), "Reference count table too large",
                                 "{} blocks would be needed", entries);
            }
            const uint64_t total = op_.clusters_for(entries * 8) + indices.size();
            // Room to spare becomes part of the table, which has a limit.
            if (total <= clusters && ((clusters - indices.size()) << cluster_bits()) <= kMaxRefcountTableBytes) {
                layout_ = {offset, clusters, std::move(indices)};
                co_return Result<>();
            }
            co_await op_.give_back();
            clusters = total;
        }
        co_return refuse(ErrorKind::kNoSpace, op_.file().node_name(), "No room for new refcount structures",
                         "{} clusters were tried last", clusters);
    }

    Task<Result<>> write() {
        CO_TRY(Buffer block, Buffer::try_alloc(op_.geometry().cluster_size()));
        std::vector<uint8_t> table(layout_.table_clusters() << cluster_bits());
        for (size_t k = 0; k < layout_.indices.size(); k++) {
            if (progress_ && !progress_(layout_.indices.size() + k, layout_.indices.size() * 2)) {
                co_return fail(ErrorKind::kCancelled, "Operation canceled");
            }
            const uint64_t index = layout_.indices[k];
            std::ranges::fill(block.span(), uint8_t{0});
            for (uint64_t i = 0; i < per_block_; i++) {
                CO_TRY(const uint64_t count, co_await count_of(index * per_block_ + i));
                if (count != 0) add_to_counts(block.span(), order_, i, 1, static_cast<int64_t>(count));
            }
            const uint64_t place = layout_.offset + ((layout_.table_clusters() + k) << cluster_bits());
            CO_CHECK(co_await op_.file().write(place, block.span(), "refcount block"));
            store_be64(table.data() + index * 8, place);
        }
        co_return co_await op_.file().write(layout_.offset, table, "refcount table");
    }

    /// Table and width change with one write inside the first sector.
    Task<Result<>> switch_header() {
        CO_CHECK(co_await op_.stabilise());
        Header& h = op_.header();
        uint8_t bytes[kFixedEnd - kFixedAt];
        store_be64(bytes, layout_.offset);
        store_be32(bytes + 8, static_cast<uint32_t>(layout_.table_clusters()));
        store_be32(bytes + 12, h.nb_snapshots);
        store_be64(bytes + 16, h.snapshots_offset);
        store_be64(bytes + 24, h.incompatible_features);
        store_be64(bytes + 32, h.compatible_features);
        store_be64(bytes + 40, h.autoclear_features);
        store_be32(bytes + 48, order_);
        // Version 2 has nothing behind the snapshot table's offset.
        const size_t length = h.version < 3 ? 12 : sizeof bytes;
        CO_CHECK(co_await op_.switch_header(kFixedAt, std::span(bytes, length)));
        h.refcount_table_offset = layout_.offset;
        h.refcount_table_clusters = static_cast<uint32_t>(layout_.table_clusters());
        h.refcount_order = order_;
        co_return Result<>();
    }

    Operation& op_;
    const uint32_t order_;
    const uint64_t per_block_, most_;
    Progress progress_;
    Old old_;
    Layout layout_;
};

}  // namespace

Task<Result<>> rewrite_refcounts(Operation& op, uint32_t refcount_order, Progress progress) {
    Rewrite rewrite(op, refcount_order, std::move(progress));
    co_return co_await rewrite.run(UINT64_MAX);
}

Task<Result<>> lower_refcounts(Operation& op) {
    CO_TRY(const uint64_t end, co_await op.refcounts().end_of_use());
    const Header& h = op.header();
    const uint32_t bits = op.geometry().cluster_bits;
    uint64_t highest = (h.refcount_table_offset >> bits) + h.refcount_table_clusters;
    for (const uint64_t block : op.refcounts().table()) highest = std::max(highest, (block >> bits) + 1);
    if (highest != end) co_return Result<>();
    Rewrite rewrite(op, h.refcount_order, {});
    co_return co_await rewrite.run(end);
}

}  // namespace gantry::block::qcow2
