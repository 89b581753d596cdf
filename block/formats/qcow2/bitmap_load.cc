// From the image to memory: bitmaps are loaded when it is opened, and marked in use before it may be written.

#include <algorithm>
#include <unordered_set>

#include "block/bitmap_serialise.h"
#include "block/formats/qcow2/bitmap_table.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

/// Memory for the bitmaps of one image: a directory of a few pages must not make us take terabytes.
constexpr uint64_t kMaxLoadedBytes = uint64_t{1} << 30;

bool believed(const Image& image, const BitmapEntry& entry) {
    return image.bitmaps_trusted && entry.consistent(image.geometry, image.disk_size);
}

/// Memory it will take.
uint64_t loaded_bytes(const Image& image, const BitmapEntry& entry) {
    return believed(image, entry) ? (image.disk_size >> entry.granularity_bits) / 8 : 0;
}

/// Reads what `table` says into `bitmap`, which is clean. kCorrupt: data lies beyond the end of the file.
Task<Result<>> read_bits(const ImageFile& file, const std::vector<BitmapCluster>& table, DirtyBitmap& bitmap,
                         Geometry geometry) {
    const uint64_t cluster = geometry.cluster_size();
    const uint64_t total = serialised_bytes(bitmap);
    Buffer data;
    for (uint64_t i = 0; i < table.size();) {
        const uint64_t at = i * cluster;
        if (table[i].offset() == 0) {
            if (table[i].all_ones()) deserialise_ones(bitmap, at, cluster);
            i++;
            continue;
        }
        const uint64_t count = adjacent_clusters(table, i, geometry);
        const uint64_t bytes = std::min(count * cluster, total - std::min(at, total));
        const uint64_t offset = table[i].offset();
        if (offset > file.size() || bytes > file.size() - offset) {
            co_return fail(ErrorKind::kCorrupt, "its data at {:#x} runs past the end of the file {:#x}", offset,
                           file.size());
        }
        if (!data) {
            CO_TRY(data, Buffer::try_alloc(std::max(cluster, kBitmapTransferBytes)));
        }
        CO_CHECK(co_await file.read(offset, data.span().first(bytes), "bitmap data"));
        deserialise_piece(bitmap, at, data.span().first(bytes));
        i += count;
    }
    co_return Result<>();
}

Task<Result<std::shared_ptr<DirtyBitmap>>> read_bitmap(const ImageFile& file, const BitmapEntry& entry,
                                                       uint64_t disk_size, Geometry geometry) {
    CO_TRY(const std::vector<BitmapCluster> table, co_await read_bitmap_table(file, entry, geometry));
    CO_TRY(std::shared_ptr<DirtyBitmap> bitmap,
           DirtyBitmap::create(entry.name, disk_size, static_cast<uint32_t>(entry.granularity())));
    CO_CHECK(co_await read_bits(file, table, *bitmap, geometry));
    bitmap->persistent = true;
    bitmap->set_recording((entry.flags & BitmapEntry::kAuto) != 0);
    co_return bitmap;
}

/// Whether a bitmap may not be believed once somebody has written without keeping it.
bool goes_stale(const BitmapEntry& entry) {
    const bool untouchable = !entry.extra.empty() && !(entry.flags & BitmapEntry::kExtraCompatible);
    return !untouchable || (entry.flags & BitmapEntry::kAuto);
}

Task<Result<>> mark_in_use(Qcow2Node& node) {
    Image& image = node.mutable_image();
    std::vector<BitmapEntry> marked = image.bitmaps;
    bool changed = false;
    for (BitmapEntry& entry : marked) {
        if ((entry.flags & BitmapEntry::kInUse) || !goes_stale(entry)) continue;
        entry.flags |= BitmapEntry::kInUse;
        changed = true;
    }
    if (!changed) co_return Result<>();
    // One bit of each entry changes, in place: whatever part of this reaches the disk is right, for nothing else is
    // written before it is all there.
    const std::vector<uint8_t> directory = encode_bitmap_directory(marked);
    const std::optional<BitmapsExtension> place = image.extensions.bitmaps;
    if (!place || place->directory_size != directory.size()) {
        co_return fail(ErrorKind::kIo,
                       "node '{}': it is not known where its bitmap directory is, because writing it failed before",
                       node.name());
    }
    CO_CHECK(co_await node.image_file().write(place->directory_offset, directory, "bitmap directory"));
    CO_CHECK(co_await node.image_file().flush());
    image.bitmaps = std::move(marked);
    co_return Result<>();
}

/// Null: inconsistent, as the log says. Errors are those of the file.
Task<Result<std::shared_ptr<DirtyBitmap>>> load_one(Qcow2Node& node, const BitmapEntry& entry) {
    const Image& image = node.image();
    std::shared_ptr<DirtyBitmap> none;
    if (!believed(image, entry)) co_return none;
    auto read = co_await read_bitmap(node.image_file(), entry, image.disk_size, image.geometry);
    if (read) co_return std::move(*read);
    if (read.error().kind() != ErrorKind::kCorrupt) {
        co_return std::unexpected(
            std::move(read).error().context(fmt::format("Could not load bitmap '{}'", entry.name)));
    }
    log::warn("node '{}': bitmap '{}' is inconsistent: {}", node.name(), entry.name, read.error().message());
    co_return none;
}

}  // namespace

Task<Result<>> Qcow2Node::load_bitmaps(bool writable) {
    // A snapshot is another disk than the one the bitmaps tell about.
    if (image_.opened_snapshot) co_return Result<>();
    // Those loaded earlier are as they were: the image could not be written since.
    std::unordered_set<std::string> known;
    for (const auto& bitmap : bitmaps()) known.insert(bitmap->name());
    uint64_t bytes = 0;
    const std::vector<BitmapEntry> entries = image_.bitmaps;
    for (const BitmapEntry& entry : entries) {
        bytes += loaded_bytes(image_, entry);
        if (bytes > kMaxLoadedBytes) {
            co_return fail(ErrorKind::kTooLarge,
                           "The persistent bitmaps of node '{}' need more than {} MiB of memory; remove some with "
                           "'qemu-img bitmap --remove'",
                           name(), kMaxLoadedBytes >> 20);
        }
        if (known.contains(entry.name)) continue;
        CO_TRY(std::shared_ptr<DirtyBitmap> bitmap, co_await load_one(*this, entry));
        if (!bitmap) bitmap = DirtyBitmap::create_inconsistent(entry.name, static_cast<uint32_t>(entry.granularity()));
        bitmap->set_read_only(true);
        add_bitmap(std::move(bitmap));
    }
    if (!writable) co_return Result<>();
    CO_CHECK(co_await mark_in_use(*this));
    for (const auto& bitmap : bitmaps()) {
        if (bitmap->persistent) bitmap->set_read_only(false);
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
