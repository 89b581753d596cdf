// Stored counts against counted references, and COPIED flags against counts (spec/qcow2.md section 17).

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check_references.h"
#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/refcount_bits.h"
#include "block/formats/qcow2/refcounts.h"
#include "runtime/buffer.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kPiece = uint64_t{1} << 20;

/// The comparison of one pass.
class Comparison {
  public:
    Comparison(CheckRun& run, CountChange change, bool keep_stored)
        : run_(run),
          order_(run.image.header.refcount_order),
          max_(max_refcount(run.image.header.refcount_order)),
          limit_(std::max(run.file_clusters, run.counts.end())),
          change_(change),
          keep_(keep_stored) {}

    uint64_t counts_per_block() const { return run_.cluster_size() * 8 >> order_; }

    /// Cluster `cluster` is stored with `stored`; returns what is stored afterwards.
    uint64_t take(uint64_t cluster, uint64_t stored, bool may_write) {
        const uint64_t counted = run_.counts.get(cluster);
        if (counted > max_ && change_ == CountChange::kNone) {
            run_.corruption(counted - max_,
                            "ERROR: overflow cluster offset={:#x}: {} references do not fit into its refcount",
                            cluster << run_.g.cluster_bits, counted);
        }
        const uint64_t expected = std::min(counted, max_);
        uint64_t now = stored;
        if (stored < expected) {
            if (change_ == CountChange::kRaise && may_write) {
                now = expected;
            } else if (change_ == CountChange::kNone) {
                run_.corruption(1, "ERROR cluster {} refcount={} reference={}", cluster, stored, expected);
            }
        } else if (stored > expected) {
            if (change_ == CountChange::kLower && may_write) {
                now = expected;
            } else if (change_ == CountChange::kNone) {
                run_.leak("Leaked cluster {} refcount={} reference={}", cluster, stored, expected);
            }
        }
        if (cluster >= limit_) return now;
        if (now != 0 || counted != 0) end_ = std::max(end_, cluster + 1);
        if (!keep_) return now;
        // After raising, the larger one: what refers to it may not have been seen.
        const uint64_t kept = change_ != CountChange::kRaise ? now : std::max(counted, may_write ? now : 0);
        if (kept != counted) run_.counts.set(cluster, kept);
        return now;
    }

    /// Nothing is stored about [first, first + count).
    void take_missing(uint64_t first, uint64_t count) {
        const uint64_t last = std::min(first + count, run_.counts.end());
        if (first >= last || !run_.counts.any(first, last - first)) return;
        run_.rebuild = true;
        for (uint64_t cluster = first; cluster < last; cluster++) take(cluster, 0, false);
    }

    /// True when counts in `block` have changed.
    bool take_block(uint64_t first, std::span<uint8_t> block, bool may_write) {
        const uint64_t count = counts_per_block();
        const uint64_t referenced = run_.counts.end() > first ? std::min(count, run_.counts.end() - first) : 0;
        bool changed = false;
        for (uint64_t i = 0; i < count; i++) {
            if (i >= referenced && i * (uint64_t{1} << order_) % 64 == 0) {
                // Beyond the last reference: nearly always empty.
                i = skip_empty(block, i);
                if (i >= count) break;
            }
            // What a block that is none says about clusters which are not there means nothing.
            if (first + i >= limit_ && !may_write) break;
            const uint64_t stored = refcount_in_block(block, order_, i);
            const uint64_t now = take(first + i, stored, may_write);
            if (now == stored) continue;
            set_refcount_in_block(block, order_, i, now);
            run_.mended++;
            changed = true;
        }
        return changed;
    }

    uint64_t end() const { return end_; }

  private:
    /// The first count of the next 8 bytes that are not all zero; `index` begins 8 bytes.
    uint64_t skip_empty(std::span<const uint8_t> block, uint64_t index) const {
        size_t at = index * (uint64_t{1} << order_) / 8;
        while (at < block.size() && load_be64(block.data() + at) == 0) at += 8;
        return at * 8 >> order_;
    }

    CheckRun& run_;
    const uint32_t order_;
    const uint64_t max_;
    const uint64_t limit_;  // what lies above is neither in the file nor referred to
    const CountChange change_;
    const bool keep_;
    uint64_t end_ = 0;
};

/// Pointers with stray bits that mean a cluster which is stored with as many references as there are with them.
void adopt(CheckRun& run, uint64_t first, uint64_t count, std::span<const uint8_t> block) {
    auto it = std::ranges::lower_bound(run.rounded, first);
    for (; it != run.rounded.end() && *it < first + count; ++it) {
        const uint64_t stored = refcount_in_block(block, run.image.header.refcount_order, *it - first);
        if (stored != 0 && run.counts.get(*it) <= stored) run.adopted.insert(*it);
    }
}

}  // namespace

Task<Result<>> load_refcount_table(CheckRun& run) {
    const Header& h = run.image.header;
    const uint64_t bytes = h.refcount_table_clusters * run.cluster_size();
    if (bytes > kMaxRefcountTableBytes) co_return fail(ErrorKind::kCorrupt, "the refcount table is too large");
    Buffer table = Buffer::alloc(bytes);
    CO_CHECK(co_await run.file.read(h.refcount_table_offset, table.span(), "refcount table"));
    run.blocks.resize(bytes / 8);
    for (size_t i = 0; i < run.blocks.size(); i++) {
        const uint64_t word = load_be64(table.data() + i * 8);
        if (word & kReservedInRefcountTable) {
            run.corruption(1, "ERROR refcount table entry {} has reserved bits set", i);
            run.rebuild = true;
        }
        run.blocks[i] = {.offset = word & ~kReservedInRefcountTable,
                         .counted = (word & kReservedInRefcountTable) == 0,
                         .readable = true,
                         .sound = (word & kReservedInRefcountTable) == 0};
    }
    co_return Result<>();
}

void count_blocks(CheckRun& run) {
    const uint64_t cs = run.cluster_size();
    for (size_t i = 0; i < run.blocks.size(); i++) {
        BlockRef& block = run.blocks[i];
        if (block.offset == 0) {
            block.counted = block.sound = block.readable = false;
            continue;
        }
        if (run.g.offset_in_cluster(block.offset) != 0) {
            run.corruption(1, "ERROR refcount block {} is not cluster aligned; refcount table entry corrupted", i);
            run.rebuild = true;
            block.counted = block.sound = block.readable = false;
            continue;
        }
        if (run.cluster_of(block.offset) >= run.file_clusters) {
            run.corruption(1, "ERROR refcount block {} is outside image", i);
            run.rebuild = true;
            block.counted = block.sound = block.readable = false;
            block.offset = 0;
            continue;
        }
        if (!block.counted) continue;
        run.count(block.offset, cs);
        const uint64_t references = run.counts.get(run.cluster_of(block.offset));
        if (references == 1) continue;
        run.corruption(1, "ERROR refcount block {} refcount={}", i, references);
        run.rebuild = true;
        block.sound = false;
    }
}

Task<Result<>> compare_counts(CheckRun& run, CountChange change, bool keep_stored) {
    const uint64_t cs = run.cluster_size();
    Comparison comparison(run, change, keep_stored);
    const uint64_t per_block = comparison.counts_per_block();
    Buffer block = Buffer::alloc(cs);
    for (uint64_t i = 0; i < run.blocks.size(); i++) run.progress.total += run.blocks[i].readable ? cs : 0;
    for (uint64_t i = 0; i < run.blocks.size(); i++) {
        const BlockRef ref = run.blocks[i];
        const uint64_t first = i * per_block;
        if (!ref.readable) {
            // A block that is named but is no block: what it says about its clusters is not known.
            if (ref.offset == 0) comparison.take_missing(first, per_block);
            continue;
        }
        Result<> read = co_await run.file.read(ref.offset, block.span(), "refcount block");
        if (!read) {
            run.error("{}", read.error().message());
            run.unreadable = run.unseen = true;
        } else {
            if (change == CountChange::kNone) adopt(run, first, per_block, block.span());
            if (comparison.take_block(first, block.span(), ref.sound))
                CO_CHECK(co_await run.file.write(ref.offset, block.span(), "refcount block"));
        }
        CO_CHECK(co_await run.progress.advance(cs));
    }
    const uint64_t known = run.blocks.size() * per_block;
    if (run.counts.end() > known) comparison.take_missing(known, run.counts.end() - known);
    run.found.image_end_offset = comparison.end() << run.g.cluster_bits;
    co_return Result<>();
}

// ---- COPIED ----

namespace {

/// The word with the flag that belongs to it; `exclusive`: the count of its cluster is 1.
uint64_t with_flag(uint64_t word, bool exclusive) { return exclusive ? word | kCopied : word & ~kCopied; }

bool flag_table(CheckRun& run, const L2Ref& table, std::span<uint8_t> bytes) {
    const Geometry& g = run.g;
    const uint32_t entry_bytes = g.l2_entry_bytes();
    bool changed = false;
    for (size_t at = 0; at < bytes.size(); at += entry_bytes) {
        const uint64_t word = load_be64(bytes.data() + at);
        if ((word & kCompressed) || !names_place(g, word)) continue;
        const uint64_t count = g.external_data ? 1 : run.counts.get((word & kOffsetMask) >> g.cluster_bits);
        const uint64_t right = with_flag(word, count == 1);
        if (right == word) continue;
        run.corruption(table.active, "ERROR OFLAG_COPIED data cluster: l2_entry={:x} refcount={}", word, count);
        if (!run.mends_flags(table.offset)) continue;
        store_be64(bytes.data() + at, right);
        run.mended++;
        changed = true;
    }
    return changed;
}

}  // namespace

Task<Result<>> check_flags(CheckRun& run) {
    const Header& h = run.image.header;
    const uint64_t end =
        h.l1_table_offset >= run.file_bytes
            ? 0
            : std::min(uint64_t{h.l1_size} * 8, (run.file_bytes - h.l1_table_offset + 7) & ~uint64_t{7});
    Buffer piece = Buffer::alloc(std::min(end, kPiece));
    for (uint64_t at = 0; at < end; at += kPiece) {
        const std::span<uint8_t> words = piece.span().first(std::min(kPiece, end - at));
        CO_CHECK(co_await run.file.read(h.l1_table_offset + at, words, "L1 table"));
        size_t first = words.size(), last = 0;
        for (size_t i = 0; i < words.size(); i += 8) {
            const uint64_t word = load_be64(words.data() + i);
            if (l2_table_offset(word) == 0) continue;
            const uint64_t count = run.counts.get(run.cluster_of(l2_table_offset(word)));
            const uint64_t right = with_flag(word, count == 1);
            if (right == word) continue;
            run.corruption(1, "ERROR OFLAG_COPIED L2 cluster: l1_index={} l1_entry={:x} refcount={}", (at + i) / 8,
                           word, count);
            if (!run.mends_flags(h.l1_table_offset)) continue;
            store_be64(words.data() + i, right);
            first = std::min(first, i);
            last = i + 8;
            run.mended++;
        }
        if (first < last) {
            CO_CHECK(co_await run.file.write(h.l1_table_offset + at + first, words.subspan(first, last - first),
                                             "L1 table"));
            run.l1_changed = true;
        }
        CO_CHECK(co_await run.progress.advance(words.size()));
    }
    co_return co_await visit_tables(
        run, true, [&run](const L2Ref& table, std::span<uint8_t> bytes) { return flag_table(run, table, bytes); });
}

}  // namespace gantry::block::qcow2
