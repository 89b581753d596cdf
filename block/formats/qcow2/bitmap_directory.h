// The directory of persistent dirty bitmaps (spec/qcow2.md section 8). Pure; no I/O.

#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/extensions.h"
#include "block/formats/qcow2/layout.h"
#include "runtime/error.h"

namespace gantry::block::qcow2 {

struct BitmapEntry {
    uint64_t table_offset = 0;
    uint32_t table_entries = 0;
    uint32_t flags = 0;
    uint8_t granularity_bits = 0;
    std::string name;
    std::vector<uint8_t> extra;

    static constexpr uint32_t kInUse = 1;
    static constexpr uint32_t kAuto = 2;
    static constexpr uint32_t kExtraCompatible = 4;

    uint64_t granularity() const { return uint64_t{1} << granularity_bits; }
    /// Its contents may be believed: closed properly, of the right length, and nothing in it that we do not know.
    bool consistent(const Geometry& geometry, uint64_t disk_size) const;
    /// Bytes in the directory, with padding.
    uint64_t directory_bytes() const;
};

/// Entries of the table of a bitmap over `disk_size` bytes; at least one.
uint64_t bitmap_table_entries(const Geometry& geometry, uint64_t disk_size, uint32_t granularity_bits);

/// An entry of a bitmap table: one cluster of the bitmap's bytes.
struct BitmapCluster {
    static constexpr uint64_t kOnes = 1;
    static constexpr uint64_t kOffsetMask = 0x00fffffffffffe00;
    static constexpr uint64_t kReserved = 0xff000000000001fe;

    uint64_t word = 0;
    /// 0: none; the bits are all alike.
    uint64_t offset() const { return word & kOffsetMask; }
    bool all_ones() const { return offset() == 0 && (word & kOnes); }
    /// Nothing reserved is set and the offset is that of a cluster.
    bool valid(const Geometry& geometry) const;
};

/// `directory`: exactly extension.directory_size bytes. Errors: kCorrupt.
Result<std::vector<BitmapEntry>> parse_bitmap_directory(std::span<const uint8_t> directory,
                                                        const BitmapsExtension& extension, const Geometry& geometry,
                                                        std::string_view node);

/// The bytes of the directory. What parse_bitmap_directory() accepts comes out as it was.
std::vector<uint8_t> encode_bitmap_directory(std::span<const BitmapEntry> entries);

}  // namespace gantry::block::qcow2
