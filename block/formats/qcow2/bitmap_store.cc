// From memory to the image: bitmaps are stored when it is closed or becomes read-only, and taken out by name.
//
// What is new is written to new places and made stable; then the header switches to the new directory; then what is old
// is let go. Until the switch the image has the old directory, whose bitmaps are marked in use; so a crash leaves
// either that or the new state.

#include <algorithm>
#include <bit>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "block/bitmap_serialise.h"
#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/bitmap_table.h"
#include "block/formats/qcow2/header_writer.h"
#include "block/formats/qcow2/operation.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kSectorBytes = 512;

/// Writes the clusters `pieces` of the bitmap's bytes to a row of their own; `table` learns where.
Task<Result<>> write_pieces(Operation& op, const DirtyBitmap& bitmap, std::vector<uint64_t> pieces,
                            std::vector<BitmapCluster>& table) {
    const uint64_t cluster = op.geometry().cluster_size();
    const uint64_t bytes = pieces.size() * cluster;
    CO_TRY(const uint64_t offset, co_await op.allocate(bytes));
    CO_TRY(Buffer data, Buffer::try_alloc(bytes));
    for (size_t i = 0; i < pieces.size(); i++) {
        serialise_piece(bitmap, pieces[i] * cluster, data.span().subspan(i * cluster, cluster));
        table[pieces[i]].word = offset + i * cluster;
    }
    co_return co_await op.file().write(offset, data.span(), "bitmap data");
}

/// Data and table of `bitmap`; `entry` learns place and length of the table. Not flushed.
Task<Result<>> write_bitmap(Operation& op, const DirtyBitmap& bitmap, BitmapEntry& entry) {
    const uint64_t cluster = op.geometry().cluster_size();
    const uint64_t most = std::max<uint64_t>(1, kBitmapTransferBytes / cluster);
    std::vector<BitmapCluster> table(bitmap_table_entries(op.geometry(), bitmap.size(), entry.granularity_bits));
    std::vector<uint64_t> pieces;
    for (uint64_t i = 0; i < table.size(); i++) {
        const BitmapPiece kind = classify_piece(bitmap, i * cluster, cluster);
        if (kind == BitmapPiece::kOnes) table[i].word = BitmapCluster::kOnes;
        if (kind == BitmapPiece::kMixed) pieces.push_back(i);
        if (pieces.size() == most) {
            CO_CHECK(co_await write_pieces(op, bitmap, std::move(pieces), table));
            pieces.clear();
        }
    }
    if (!pieces.empty()) CO_CHECK(co_await write_pieces(op, bitmap, std::move(pieces), table));

    std::vector<uint8_t> bytes(table.size() * 8);
    for (size_t i = 0; i < table.size(); i++) store_be64(bytes.data() + i * 8, table[i].word);
    CO_TRY(entry.table_offset, co_await op.allocate(bytes.size()));
    entry.table_entries = static_cast<uint32_t>(table.size());
    co_return co_await op.write_padded(entry.table_offset, bytes, "bitmap table");
}

/// Whether the header with `next` differs from the one in the file in more than one sector: then a power cut may leave
/// a mixture of both.
bool tears(const Image& image, const std::optional<BitmapsExtension>& next) {
    Image head;  // what the first cluster is made of
    head.header = image.header;
    head.extensions = image.extensions;
    head.backing_name = image.backing_name;
    const auto before = encode_header_cluster(head);
    head.extensions.bitmaps = next;
    const auto after = encode_header_cluster(head);
    if (!before || !after) return true;
    const auto [first, _] = std::ranges::mismatch(*before, *after);
    if (first == before->end()) return false;
    const auto last = std::mismatch(before->rbegin(), before->rend(), after->rbegin()).first;
    const auto first_at = static_cast<uint64_t>(first - before->begin());
    const auto last_at = static_cast<uint64_t>(before->rend() - last) - 1;
    return first_at / kSectorBytes != last_at / kSectorBytes;
}

Task<Result<>> set_bitmaps_bit(Operation& op, bool on) {
    uint64_t& features = op.header().autoclear_features;
    const uint64_t before = features;
    features = on ? features | kAutoclearBitmaps : features & ~kAutoclearBitmaps;
    Result<> written = co_await op.metadata().write_features();
    if (!written) features = before;
    co_return written;
}

/// The header names `next` afterwards. While the bit is off no bitmap is believed: so it is off where the extension
/// comes, goes or could be torn.
Task<Result<>> switch_extension(Operation& op, std::optional<BitmapsExtension> next) {
    const std::optional<BitmapsExtension> before = op.image().extensions.bitmaps;
    if (op.header().has_autoclear(kAutoclearBitmaps) && (!next || tears(op.image(), next))) {
        CO_CHECK(co_await set_bitmaps_bit(op, false));
    }
    op.image().extensions.bitmaps = next;
    Result<> written = co_await op.metadata().write_header();
    if (!written) {
        op.image().extensions.bitmaps = before;
        co_return written;
    }
    if (next && !op.header().has_autoclear(kAutoclearBitmaps)) CO_CHECK(co_await set_bitmaps_bit(op, true));
    co_return Result<>();
}

/// Writes the directory and switches to it; everything that `entries` name is written. On an error before the switch
/// the rows of the operation are given back.
Task<Result<>> switch_directory(Operation& op, std::vector<BitmapEntry> entries) {
    std::optional<BitmapsExtension> next;
    if (!entries.empty()) {
        const std::vector<uint8_t> directory = encode_bitmap_directory(entries);
        CO_TRY(const uint64_t offset, co_await op.allocate(directory.size()));
        CO_CHECK(co_await op.write_padded(offset, directory, "bitmap directory"));
        next = BitmapsExtension{static_cast<uint32_t>(entries.size()), directory.size(), offset};
    }
    CO_CHECK(co_await op.stabilise());
    OverlapMap& overlap = op.metadata().overlap();
    const std::optional<BitmapsExtension> old = op.image().extensions.bitmaps;
    Result<> switched = co_await switch_extension(op, next);
    if (!switched) {
        // Only a header that was never written certainly says what it said before.
        if (switched.error().kind() != ErrorKind::kTooLarge) op.keep();
        co_return switched;
    }
    op.keep();
    if (old) overlap.remove(Structure::kBitmapDirectory, old->directory_offset, old->directory_size);
    if (next) overlap.add(Structure::kBitmapDirectory, next->directory_offset, next->directory_size);
    op.image().bitmaps = std::move(entries);
    op.image().bitmaps_trusted = true;
    co_return Result<>();
}

/// A place that an old directory or table names: not where other metadata lies, whatever the image says.
Task<Result<>> release_place(Operation& op, uint64_t offset, uint64_t bytes) {
    if (op.metadata().overlap().hits(offset, bytes)) {
        co_return fail(ErrorKind::kCorrupt, "{} bytes at {:#x} belong to other metadata", bytes, offset);
    }
    co_return co_await op.release(offset, bytes);
}

Task<Result<>> release_bitmap(Operation& op, const BitmapEntry& entry) {
    CO_TRY(const std::vector<BitmapCluster> table, co_await read_bitmap_table(op.file(), entry, op.geometry()));
    for (uint64_t i = 0; i < table.size();) {
        if (table[i].offset() == 0) {
            i++;
            continue;
        }
        const uint64_t count = adjacent_clusters(table, i, op.geometry());
        CO_CHECK(co_await release_place(op, table[i].offset(), count << op.geometry().cluster_bits));
        i += count;
    }
    co_return co_await release_place(op, entry.table_offset, table.size() * 8);
}

/// What the switch has made useless. What cannot be let go leaks, and check finds it.
Task<void> release_old(Operation& op, std::vector<BitmapEntry> entries, std::optional<BitmapsExtension> directory) {
    Result<> done;
    for (const BitmapEntry& entry : entries) {
        done = co_await release_bitmap(op, entry);
        if (!done) {
            log::warn("node '{}': the clusters of bitmap '{}' are not freed: {}", op.node().name(), entry.name,
                      done.error().message());
        }
    }
    if (directory) done = co_await release_place(op, directory->directory_offset, directory->directory_size);
    Result<> finished = co_await op.finish(op.metadata().options().pass_discard_other);
    if (done && !finished) done = std::move(finished);
    if (!done) log::warn("node '{}': freeing old bitmaps: {}", op.node().name(), done.error().message());
}

/// What becomes of `bitmap` in the new directory; nullopt: nothing. `stored`: its entry in the old one, or null.
Task<Result<std::optional<BitmapEntry>>> store_one(Operation& op, const DirtyBitmap& bitmap,
                                                   const BitmapEntry* stored) {
    std::optional<BitmapEntry> entry;
    if (stored) entry = *stored;
    // Contents that nobody believes stay as they are.
    if (bitmap.inconsistent) co_return entry;
    if (!entry) entry.emplace();
    entry->name = bitmap.name();
    entry->granularity_bits = static_cast<uint8_t>(std::countr_zero(bitmap.granularity()));
    entry->flags = (entry->flags & BitmapEntry::kExtraCompatible) | (bitmap.enabled() ? BitmapEntry::kAuto : 0);
    Result<> written = co_await write_bitmap(op, bitmap, *entry);
    if (!written) {
        co_return std::unexpected(
            std::move(written).error().context(fmt::format("Failed to store bitmap '{}'", bitmap.name())));
    }
    co_return std::move(entry);
}

/// The new directory is that of the bitmaps in memory.
Task<Result<>> store_all(Operation& op) {
    const std::vector<BitmapEntry> before = op.image().bitmaps;
    std::unordered_map<std::string_view, const BitmapEntry*> stored;
    for (const BitmapEntry& entry : before) stored[entry.name] = &entry;
    std::vector<BitmapEntry> entries;
    std::unordered_set<uint64_t> tables;
    const std::vector<std::shared_ptr<DirtyBitmap>> all = op.node().bitmaps();
    for (const auto& bitmap : all) {
        if (!bitmap->persistent) continue;
        const auto found = stored.find(bitmap->name());
        CO_TRY(std::optional<BitmapEntry> entry,
               co_await store_one(op, *bitmap, found == stored.end() ? nullptr : found->second));
        if (!entry) continue;
        tables.insert(entry->table_offset);
        entries.push_back(std::move(*entry));
    }
    std::vector<BitmapEntry> replaced;
    for (const BitmapEntry& entry : before) {
        if (!tables.contains(entry.table_offset)) replaced.push_back(entry);
    }
    const std::optional<BitmapsExtension> directory = op.image().extensions.bitmaps;
    CO_CHECK(co_await switch_directory(op, std::move(entries)));
    co_await release_old(op, std::move(replaced), directory);
    co_return Result<>();
}

/// The image says something else than memory: a bitmap may have changed, or was removed.
bool worth_storing(const Qcow2Node& node) {
    uint64_t persistent = 0;
    for (const auto& bitmap : node.bitmaps()) {
        if (!bitmap->persistent) continue;
        if (!bitmap->read_only()) return true;
        persistent++;
    }
    return persistent != node.image().bitmaps.size();
}

}  // namespace

Result<> Qcow2Node::can_store_bitmap(const std::string& bitmap, uint32_t granularity) {
    const auto refused = [&](std::string_view why) {
        return fail(ErrorKind::kInvalid, "Can't make bitmap '{}' persistent in '{}': {}", bitmap, name(), why);
    };
    if (image_.header.version < 3) return refused("Cannot store dirty bitmaps in qcow2 v2 files");
    if (image_.opened_snapshot) return refused("an internal snapshot is open");
    if (bitmap.empty() || bitmap.size() > kMaxBitmapNameBytes) {
        return refused(fmt::format("Name length exceeds maximum ({} characters)", kMaxBitmapNameBytes));
    }
    const uint64_t least = uint64_t{1} << kMinBitmapGranularityBits;
    const uint64_t most = uint64_t{1} << kMaxBitmapGranularityBits;
    if (granularity < least) return refused(fmt::format("Granularity is under minimum ({} bytes)", least));
    if (granularity > most) return refused(fmt::format("Granularity exceeds maximum ({} bytes)", most));
    const auto bits = static_cast<uint32_t>(std::countr_zero(granularity));
    if (bitmap_table_entries(geometry(), size(), bits) > kMaxBitmapBytes >> geometry().cluster_bits) {
        return refused("Too much space will be occupied by the bitmap. Use larger granularity");
    }
    // Those in memory that are not in the image yet will want room too.
    uint64_t count = 0, bytes = 0;
    for (const auto& other : bitmaps()) {
        if (!other->persistent) continue;
        BitmapEntry entry;
        entry.name = other->name();
        count++;
        bytes += entry.directory_bytes();
    }
    for (const BitmapEntry& stored : image_.bitmaps) bytes += stored.extra.size() + 8;
    if (count >= kMaxBitmaps) return refused("Maximum number of persistent bitmaps is already reached");
    BitmapEntry entry;
    entry.name = bitmap;
    if (bytes + entry.directory_bytes() > kMaxBitmapDirectoryBytes) {
        return refused("Not enough space in the bitmap directory");
    }
    return {};
}

Task<Result<>> Qcow2Node::remove_stored_bitmap(const std::string& bitmap) {
    std::vector<BitmapEntry> left = image_.bitmaps;
    const auto found = std::ranges::find(left, bitmap, &BitmapEntry::name);
    if (found == left.end()) co_return Result<>();  // never stored
    std::vector<BitmapEntry> removed;
    removed.push_back(std::move(*found));
    left.erase(found);
    Operation op(*this);
    CO_CHECK(co_await op.begin());
    const std::optional<BitmapsExtension> old = image_.extensions.bitmaps;
    Result<> switched = co_await switch_directory(op, std::move(left));
    if (!switched) {
        co_await op.give_back();
        co_return std::unexpected(
            std::move(switched).error().context(fmt::format("Failed to remove bitmap '{}' from file", bitmap)));
    }
    co_await release_old(op, std::move(removed), old);
    co_return Result<>();
}

Task<Result<>> Qcow2Node::store_bitmaps() {
    if (!metadata_ || image_.opened_snapshot || !worth_storing(*this)) co_return Result<>();
    const auto set_read_only = [this](bool on) {
        for (const auto& bitmap : bitmaps()) {
            if (bitmap->persistent) bitmap->set_read_only(on);
        }
    };
    set_read_only(true);
    Operation op(*this);
    Result<> stored = co_await op.begin();
    if (stored) {
        stored = co_await store_all(op);
        if (!stored) co_await op.give_back();
    }
    if (!stored) set_read_only(false);
    co_return stored;
}

}  // namespace gantry::block::qcow2
