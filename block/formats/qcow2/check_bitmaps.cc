// What stored bitmaps refer to, and how damaged tables of theirs are mended (spec/qcow2.md section 17).

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/bitmap_directory.h"
#include "block/formats/qcow2/check_references.h"
#include "block/formats/qcow2/entries.h"
#include "runtime/buffer.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kPiece = uint64_t{1} << 20;
constexpr uint64_t kAllOnes = 1;  // a table entry without a cluster: every bit is set

struct BitmapTable {
    uint64_t offset = 0, bytes = 0;
};

/// Whether the tables lie in places of their own, so that their entries may be changed.
bool tables_apart(const CheckRun& run, std::vector<BitmapTable> tables) {
    std::vector<uint64_t> blocks;
    for (const BlockRef& block : run.blocks) {
        if (block.offset != 0) blocks.push_back(block.offset);
    }
    std::ranges::sort(blocks);
    std::ranges::sort(tables, {}, &BitmapTable::offset);
    const Header& h = run.image.header;
    const uint64_t cs = run.cluster_size(), refcount_end = h.refcount_table_offset + h.refcount_table_clusters * cs;
    uint64_t end = 0;
    for (const BitmapTable& table : tables) {
        if (run.outside(table.offset, table.bytes) || table.offset < end) return false;
        const uint64_t clusters = (table.bytes + cs - 1) >> run.g.cluster_bits;
        end = table.offset + clusters * cs;
        if (run.counts.any(run.cluster_of(table.offset), clusters)) return false;
        if (table.offset < refcount_end && h.refcount_table_offset < end) return false;
        const auto block = std::ranges::lower_bound(blocks, table.offset);
        if (block != blocks.end() && *block < end) return false;
    }
    return true;
}

bool sound_bitmap_entry(const CheckRun& run, uint64_t word) {
    const uint64_t host = word & kOffsetMask;
    if (word & kReservedInBitmapTable) return false;
    return host == 0 || (!(word & kAllOnes) && run.g.offset_in_cluster(host) == 0);
}

Task<Result<>> take_bitmap_table(CheckRun& run, BitmapTable table) {
    if (!run.count(table.offset, table.bytes) || table.offset >= run.file_bytes) co_return Result<>();
    const uint64_t bytes = std::min(table.bytes, (run.file_bytes - table.offset + 7) & ~uint64_t{7});
    Buffer piece = Buffer::alloc(std::min(bytes, kPiece));
    for (uint64_t at = 0; at < bytes; at += kPiece) {
        const std::span<uint8_t> words = piece.span().first(std::min(kPiece, bytes - at));
        Result<> read = co_await run.file.read(table.offset + at, words, "bitmap table");
        if (!read) {
            run.error("{}", read.error().message());
            run.unseen = run.unreadable = true;
            co_return Result<>();
        }
        bool changed = false;
        for (size_t i = 0; i < words.size(); i += 8) {
            const uint64_t word = load_be64(words.data() + i);
            const uint64_t host = word & kOffsetMask;
            const bool sound = sound_bitmap_entry(run, word);
            if (!sound && !run.fix) {
                run.corruption(1, "ERROR bitmap table entry {} at {:#x} is corrupted: {:x}", (at + i) / 8, table.offset,
                               word);
                run.unseen = true;
            }
            if (run.fix && (!sound || (host != 0 && run.outside(host, run.cluster_size())))) {
                // Too many dirty bits cost time, too few cost data.
                store_be64(words.data() + i, kAllOnes);
                run.mended++;
                changed = true;
            } else if (sound && host != 0) {
                run.count(host, run.cluster_size());
            }
        }
        if (changed) CO_CHECK(co_await run.file.write(table.offset + at, words, "bitmap table"));
        CO_CHECK(co_await run.progress.advance(words.size()));
    }
    co_return Result<>();
}

}  // namespace

Task<Result<>> count_bitmaps(CheckRun& run) {
    if (!run.image.extensions.bitmaps) co_return Result<>();
    const BitmapsExtension extension = *run.image.extensions.bitmaps;
    bool usable = !run.outside(extension.directory_offset, extension.directory_size);
    std::vector<BitmapTable> tables{{extension.directory_offset, extension.directory_size}};
    std::string why = "its directory lies outside the file";
    if (usable) {
        Buffer directory = Buffer::alloc(extension.directory_size);
        CO_CHECK(co_await run.file.read(extension.directory_offset, directory.span(), "bitmap directory"));
        auto entries = parse_bitmap_directory(directory.span(), extension, run.g, run.file.node_name());
        usable = entries.has_value();
        if (!entries) why = entries.error().message();
        for (size_t i = 0; entries && i < entries->size(); i++)
            tables.push_back({(*entries)[i].table_offset, uint64_t{(*entries)[i].table_entries} * 8});
    }
    if (run.fix && (!usable || !tables_apart(run, tables))) {
        log::warn("node '{}': the stored bitmaps are given up: their tables are damaged", run.file.node_name());
        CO_CHECK(co_await drop_bitmaps(run.file, run.image));
        run.mended++;
        co_return Result<>();
    }
    if (!usable) {
        run.corruption(1, "ERROR the bitmap directory at {:#x} is corrupted: {}", extension.directory_offset, why);
        run.unseen = true;
        co_return Result<>();
    }
    run.count(tables.front().offset, tables.front().bytes);
    for (size_t i = 1; i < tables.size(); i++) CO_CHECK(co_await take_bitmap_table(run, tables[i]));
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
