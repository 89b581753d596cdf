#include "block/formats/qcow2/bitmap_directory.h"

#include <algorithm>
#include <unordered_set>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kFixedBytes = 24;
constexpr uint8_t kTypeDirtyTracking = 1;
constexpr uint32_t kKnownFlags = BitmapEntry::kInUse | BitmapEntry::kAuto | BitmapEntry::kExtraCompatible;

uint64_t padded(uint64_t bytes) { return (bytes + 7) & ~uint64_t{7}; }

Result<> check(const BitmapEntry& e, uint8_t type, size_t name_bytes, uint32_t index, const Geometry& g,
               std::string_view node) {
    const auto refused = [&](std::string_view what, uint64_t value) -> Result<> {
        return refuse_corrupt(node, fmt::format("Bitmap '{}' doesn't satisfy the constraints", e.name),
                              "entry {} of the bitmap directory has {} {:#x}", index, what, value);
    };
    if (type != kTypeDirtyTracking) return refused("type", type);
    if (e.flags & ~kKnownFlags) return refused("unknown flags", e.flags);
    if (name_bytes == 0 || name_bytes > kMaxBitmapNameBytes) return refused("name length", name_bytes);
    if (e.granularity_bits < kMinBitmapGranularityBits || e.granularity_bits > kMaxBitmapGranularityBits) {
        return refused("granularity bits", e.granularity_bits);
    }
    const uint64_t bytes = uint64_t{e.table_entries} << g.cluster_bits;
    if (e.table_entries == 0 || e.table_entries > kMaxBitmapTableEntries || bytes > kMaxBitmapBytes) {
        return refused("table entries", e.table_entries);
    }
    if (e.table_offset == 0 || e.table_offset % g.cluster_size() != 0 ||
        wraps(e.table_offset, uint64_t{e.table_entries} * 8)) {
        return refused("table offset", e.table_offset);
    }
    return {};
}

}  // namespace

bool BitmapEntry::consistent(const Geometry& g, uint64_t disk_size) const {
    if (flags & kInUse) return false;
    if (!extra.empty() && !(flags & kExtraCompatible)) return false;
    return bitmap_table_entries(g, disk_size, granularity_bits) == table_entries;
}

uint64_t BitmapEntry::directory_bytes() const { return padded(kFixedBytes + extra.size() + name.size()); }

uint64_t bitmap_table_entries(const Geometry& g, uint64_t disk_size, uint32_t granularity_bits) {
    const uint64_t granule = uint64_t{1} << granularity_bits;
    const uint64_t bits = (disk_size >> granularity_bits) + ((disk_size & (granule - 1)) != 0);
    const uint64_t bytes = bits / 8 + (bits % 8 != 0);
    return std::max<uint64_t>(1, (bytes + g.cluster_size() - 1) >> g.cluster_bits);
}

bool BitmapCluster::valid(const Geometry& g) const {
    if (word & kReserved || offset() % g.cluster_size() != 0) return false;
    return offset() == 0 || !(word & kOnes);
}

Result<std::vector<BitmapEntry>> parse_bitmap_directory(std::span<const uint8_t> directory,
                                                        const BitmapsExtension& extension, const Geometry& g,
                                                        std::string_view node) {
    std::vector<BitmapEntry> entries;
    std::unordered_set<std::string> names;
    size_t at = 0;
    for (uint32_t i = 0; i < extension.count; i++) {
        const auto cut = [&]() -> Result<std::vector<BitmapEntry>> {
            return refuse_corrupt(node, "Broken bitmap directory",
                                  "entry {} of {} at byte {} runs past the directory's {} bytes at offset {:#x}", i,
                                  extension.count, at, directory.size(), extension.directory_offset);
        };
        if (at > directory.size() || directory.size() - at < kFixedBytes) return cut();
        const uint8_t* p = directory.data() + at;
        const size_t name_bytes = load_be16(p + 18);
        const uint64_t extra_bytes = load_be32(p + 20);
        const uint64_t bytes = padded(kFixedBytes + extra_bytes + name_bytes);
        if (directory.size() - at < bytes) return cut();
        BitmapEntry e;
        e.table_offset = load_be64(p);
        e.table_entries = load_be32(p + 8);
        e.flags = load_be32(p + 12);
        e.granularity_bits = p[17];
        e.extra.assign(p + kFixedBytes, p + kFixedBytes + extra_bytes);
        e.name.assign(reinterpret_cast<const char*>(p + kFixedBytes + extra_bytes), name_bytes);
        CHECK_OK(check(e, p[16], name_bytes, i, g, node));
        if (!names.insert(e.name).second) {
            return refuse_corrupt(node, fmt::format("Bitmap '{}' appears twice", e.name),
                                  "entry {} of the bitmap directory repeats a name", i);
        }
        entries.push_back(std::move(e));
        at += bytes;
    }
    if (at != directory.size()) {
        return refuse_corrupt(node, "Broken bitmap directory", "{} entries end at byte {}, the directory has {} bytes",
                              extension.count, at, directory.size());
    }
    return entries;
}

std::vector<uint8_t> encode_bitmap_directory(std::span<const BitmapEntry> entries) {
    uint64_t bytes = 0;
    for (const BitmapEntry& e : entries) bytes += e.directory_bytes();
    std::vector<uint8_t> directory(bytes);
    uint8_t* p = directory.data();
    for (const BitmapEntry& e : entries) {
        store_be64(p, e.table_offset);
        store_be32(p + 8, e.table_entries);
        store_be32(p + 12, e.flags);
        p[16] = kTypeDirtyTracking;
        p[17] = e.granularity_bits;
        store_be16(p + 18, static_cast<uint16_t>(e.name.size()));
        store_be32(p + 20, static_cast<uint32_t>(e.extra.size()));
        std::ranges::copy(e.extra, p + kFixedBytes);
        std::ranges::copy(e.name, p + kFixedBytes + e.extra.size());
        p += e.directory_bytes();
    }
    return directory;
}

}  // namespace gantry::block::qcow2
