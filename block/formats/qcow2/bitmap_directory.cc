#include "block/formats/qcow2/bitmap_directory.h"

#include <unordered_set>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kFixedBytes = 24;
constexpr uint32_t kKnownFlags = BitmapEntry::kInUse | BitmapEntry::kAuto | BitmapEntry::kExtraCompatible;

Result<> check(const BitmapEntry& e, uint8_t type, size_t name_bytes, uint32_t index, const Geometry& g,
               std::string_view node) {
    const auto refused = [&](std::string_view what, uint64_t value) -> Result<> {
        return refuse_corrupt(node, fmt::format("Bitmap '{}' doesn't satisfy the constraints", e.name),
                              "entry {} of the bitmap directory has {} {:#x}", index, what, value);
    };
    if (type != 1) return refused("type", type);
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
    const uint64_t bits = (disk_size >> granularity_bits) + ((disk_size & (granularity() - 1)) != 0);
    const uint64_t bytes = bits / 8 + (bits % 8 != 0);
    return (bytes + g.cluster_size() - 1) >> g.cluster_bits == table_entries;
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
        const uint64_t bytes = (kFixedBytes + extra_bytes + name_bytes + 7) & ~uint64_t{7};
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

}  // namespace gantry::block::qcow2
