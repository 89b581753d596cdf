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
};

/// `directory`: exactly extension.directory_size bytes. Errors: kCorrupt.
Result<std::vector<BitmapEntry>> parse_bitmap_directory(std::span<const uint8_t> directory,
                                                        const BitmapsExtension& extension, const Geometry& geometry,
                                                        std::string_view node);

}  // namespace gantry::block::qcow2
