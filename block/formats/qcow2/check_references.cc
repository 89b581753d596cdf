// The roots of all references: header, L1 tables, encryption header (spec/qcow2.md section 17).

#include "block/formats/qcow2/check_references.h"
#include "block/formats/qcow2/check_roots.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/entries.h"
#include "runtime/buffer.h"
#include "runtime/timer.h"

namespace gantry::block::qcow2 {

namespace {

/// 512 TiB in clusters of 64 KiB.
constexpr uint64_t kMaxClusters = uint64_t{1} << 33;
constexpr uint64_t kPiece = uint64_t{1} << 20;
constexpr uint64_t kReadThrough = 64 * 1024;  // gaps that are cheaper to read than to skip
constexpr size_t kMaxRounded = 64 * 1024;

uint64_t clusters_of(const ImageFile& file, const Geometry& g) {
    const uint64_t size = file.size();
    return (size >> g.cluster_bits) + (g.offset_in_cluster(size) != 0);
}

/// Collects L1 entries; those that name the same table become one.
class TableList {
  public:
    void add(uint64_t offset, bool active, uint64_t times, uint64_t l1_index) {
        refs_.push_back({offset, active ? times : 0, active ? 0 : times, l1_index});
        if (refs_.size() >= merge_at_) merge();
    }
    std::vector<L2Ref> take() {
        merge();
        return std::move(refs_);
    }

  private:
    void merge() {
        std::ranges::sort(refs_, {}, &L2Ref::offset);
        size_t kept = 0;
        for (size_t i = 0; i < refs_.size(); i++) {
            if (kept > 0 && refs_[kept - 1].offset == refs_[i].offset) {
                refs_[kept - 1].active += refs_[i].active;
                refs_[kept - 1].inactive += refs_[i].inactive;
            } else {
                refs_[kept++] = refs_[i];
            }
        }
        refs_.resize(kept);
        merge_at_ = std::max<size_t>(kept * 2, 64 * 1024);
    }

    std::vector<L2Ref> refs_;
    size_t merge_at_ = 64 * 1024;
};

/// One entry; the word it should be.
uint64_t take_l1_entry(CheckRun& run, const Roots& roots, const L1Root& root, uint64_t index, uint64_t word,
                       TableList& list) {
    const uint64_t cs = run.cluster_size();
    const bool mends = run.mends(root.place.offset);
    if (word & kReservedInL1) {
        run.corruption(root.times, "ERROR found L1 entry with reserved bits set: {:x}", word);
        if (mends) word &= ~kReservedInL1;
    }
    uint64_t l2 = l2_table_offset(word);
    if (l2 == 0) {
        if (word & kCopied) run.corruption(root.times, "ERROR L1 entry {} is {:x}: flags without a table", index, word);
        return mends ? 0 : word;
    }
    if (run.g.offset_in_cluster(l2) != 0) {
        run.corruption(root.times, "ERROR l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted", l2);
        const uint64_t rounded = l2 & ~(cs - 1);
        if (!mends) {
            if (run.rounded.size() < kMaxRounded) run.rounded.push_back(run.cluster_of(rounded));
            run.count(l2, cs, root.times);
            run.unseen = true;
            return word;
        }
        if (!run.adopted.contains(run.cluster_of(rounded))) return 0;
        l2 = rounded;
        word = (word & kCopied) | l2;
    }
    const bool elsewhere = std::ranges::any_of(roots.fixed, [&](const MetadataRange& r) { return r.touches(l2, cs); });
    if (mends && (elsewhere || run.outside(l2, cs))) return 0;
    if (!run.count(l2, cs, root.times)) return word;
    list.add(l2, root.active, root.times, index);
    return word;
}

Task<Result<>> take_l1(CheckRun& run, const Roots& roots, L1Root root, TableList& list) {
    if (root.place.bytes == 0) co_return Result<>();
    if (run.outside(root.place.offset, root.place.bytes)) {
        run.corruption(root.times, "ERROR {} l1_offset={:#x}: the L1 table of {} bytes lies beyond the end of the file",
                       root.active ? "active" : "snapshot", root.place.offset, root.place.bytes);
        run.unseen = true;
        // Nothing can be made anew for a disk of which nothing is known.
        if (root.active) run.unreadable = true;
        co_return Result<>();
    }
    run.count(root.place.offset, root.place.bytes, root.times);
    if (root.place.offset >= run.file_bytes) co_return Result<>();
    // An entry that the end of the file cuts goes on with zeroes.
    const uint64_t bytes = std::min(root.place.bytes, (run.file_bytes - root.place.offset + 7) & ~uint64_t{7});
    run.progress.total += bytes;
    Buffer piece = Buffer::alloc(std::min(bytes, kPiece));
    for (uint64_t at = 0; at < bytes; at += kPiece) {
        const std::span<uint8_t> words = piece.span().first(std::min(kPiece, bytes - at));
        Result<> read = co_await run.file.read(root.place.offset + at, words, "L1 table");
        if (!read) {
            if (root.active) co_return read;
            run.error("{}", read.error().message());
            run.unseen = run.unreadable = true;
            co_return Result<>();
        }
        size_t first = words.size(), last = 0;  // changed
        for (size_t i = 0; i < words.size(); i += 8) {
            const uint64_t word = load_be64(words.data() + i);
            if (word == 0) continue;
            const uint64_t kept = take_l1_entry(run, roots, root, (at + i) / 8, word, list);
            if (kept == word || !run.mends(root.place.offset)) continue;
            store_be64(words.data() + i, kept);
            first = std::min(first, i);
            last = i + 8;
            run.mended++;
        }
        if (first < last) {
            CO_CHECK(co_await run.file.write(root.place.offset + at + first, words.subspan(first, last - first),
                                             "L1 table"));
            run.l1_changed |= root.active;
        }
        CO_CHECK(co_await run.progress.advance(words.size()));
    }
    co_return Result<>();
}

}  // namespace

CheckRun::CheckRun(ImageFile& f, Image& i, CheckProgress& p)
    : file(f),
      image(i),
      progress(p),
      g(i.geometry),
      file_bytes(f.size()),
      file_clusters(clusters_of(f, i.geometry)),
      counts(file_clusters + 2) {}

Result<> check_file_size(const ImageFile& file, const Geometry& g) {
    const uint64_t clusters = clusters_of(file, g);
    if (clusters <= kMaxClusters) return {};
    return fail(ErrorKind::kTooLarge, "node '{}': the image file has {} clusters, more than the {} that can be checked",
                file.node_name(), clusters, kMaxClusters);
}

Task<Result<>> CheckProgress::advance(uint64_t bytes) {
    done += bytes;
    total = std::max(total, done);
    co_await yield_turn();
    if (tell && !tell(done, total)) co_return fail(ErrorKind::kCancelled, "The check was cancelled");
    co_return Result<>();
}

bool CheckRun::count(uint64_t offset, uint64_t bytes, uint64_t times) {
    if (bytes == 0) return true;
    if (outside(offset, bytes)) {
        corruption(times,
                   "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset "
                   "{:#x} size {:#x}",
                   offset, bytes);
        return false;
    }
    const uint64_t last = cluster_of(offset + bytes - 1);
    for (uint64_t cluster = cluster_of(offset); cluster <= last; cluster++) counts.add(cluster, times);
    return true;
}

bool names_place(const Geometry& g, uint64_t entry) {
    if (entry & kOffsetMask) return true;
    return g.external_data && (entry & kCopied) && (g.extended_l2 || !(entry & kReadsAsZero));
}

Task<Result<>> visit_tables(CheckRun& run, bool active_only,
                            std::function<bool(const L2Ref&, std::span<uint8_t>)> visit) {
    const uint64_t cs = run.cluster_size();
    const uint64_t limit = std::max(kPiece, cs);
    run.progress.total += run.tables.size() * cs;
    Buffer piece = Buffer::alloc(limit);
    for (size_t i = 0; i < run.tables.size();) {
        if (active_only && run.tables[i].active == 0) {
            CO_CHECK(co_await run.progress.advance(cs));
            i++;
            continue;
        }
        const uint64_t begin = run.tables[i].offset;
        size_t next = i + 1;
        while (next < run.tables.size() && run.tables[next].offset + cs - begin <= limit &&
               run.tables[next].offset - run.tables[next - 1].offset <= cs + kReadThrough) {
            next++;
        }
        const uint64_t bytes = run.tables[next - 1].offset + cs - begin;
        Result<> read = co_await run.file.read(begin, piece.span().first(bytes), "L2 table");
        if (!read && next > i + 1) {  // as much as can be read
            next = i + 1;
            read = co_await run.file.read(begin, piece.span().first(cs), "L2 table");
        }
        if (!read) {
            run.error("{}", read.error().message());
            run.unseen = run.unreadable = true;
        }
        for (size_t k = i; read && k < next; k++) {
            const L2Ref& table = run.tables[k];
            if (active_only && table.active == 0) continue;
            const std::span<uint8_t> words = piece.span().subspan(table.offset - begin, cs);
            if (!visit(table, words)) continue;
            CO_CHECK(co_await run.file.write(table.offset, words, "L2 table"));
        }
        CO_CHECK(co_await run.progress.advance((next - i) * cs));
        i = next;
    }
    co_return Result<>();
}

Task<Result<>> count_references(CheckRun& run) {
    const Header& h = run.image.header;
    run.found.total_clusters = (h.size >> h.cluster_bits) + (run.g.offset_in_cluster(h.size) != 0);
    run.found.allocated_clusters = run.found.fragmented_clusters = run.found.compressed_clusters = 0;

    CO_CHECK(co_await load_refcount_table(run));
    Roots roots;
    roots.tables.push_back({.place = {h.l1_table_offset, uint64_t{h.l1_size} * 8, true}, .active = true});
    roots.fixed.push_back({0, run.cluster_size(), false});
    run.count(0, run.cluster_size());
    CO_CHECK(co_await take_snapshots(run, roots));
    if (run.image.extensions.crypto && h.crypt_method == 2) {
        const CryptoExtension& crypto = *run.image.extensions.crypto;
        run.count(crypto.offset, crypto.length);
        roots.fixed.push_back({crypto.offset, crypto.length, false});
    }
    std::vector<MetadataRange> sure = roots.fixed;
    roots.fixed.push_back(roots.tables.front().place);
    TableList list;
    for (const L1Root& root : roots.tables) CO_CHECK(co_await take_l1(run, roots, root, list));
    run.tables = list.take();
    if (!run.fix) {
        std::vector<MetadataRange> ranges = std::move(sure);
        for (const L1Root& root : roots.tables) ranges.push_back(root.place);
        find_contested(run, std::move(ranges));
    }
    CO_CHECK(co_await visit_tables(
        run, false, [&run](const L2Ref& table, std::span<uint8_t> bytes) { return count_table(run, table, bytes); }));
    CO_CHECK(co_await count_bitmaps(run));
    const uint64_t table_bytes = h.refcount_table_clusters * run.cluster_size();
    if (!run.count(h.refcount_table_offset, table_bytes)) {
        run.rebuild = true;
    } else if (run.fix) {
        // What is written in place is nothing else.
        for (uint64_t at = 0; at < table_bytes; at += run.cluster_size())
            run.rebuild |= run.counts.get(run.cluster_of(h.refcount_table_offset + at)) != 1;
    }
    count_blocks(run);
    std::ranges::sort(run.rounded);
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
