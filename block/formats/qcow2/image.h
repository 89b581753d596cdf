// Image: what the metadata of an image file says.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "block/formats/qcow2/bitmap_directory.h"
#include "block/formats/qcow2/cache_options.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/snapshot_table.h"

namespace gantry::block::qcow2 {

/// What open() learned from the file; all of it validated.
struct Image {
    Header header;
    Extensions extensions;
    std::string backing_name;       // as stored; empty: none
    std::string full_backing_name;  // resolved against the image's directory
    std::vector<Snapshot> snapshots;
    std::vector<BitmapEntry> bitmaps;
    bool bitmaps_trusted = false;             // the autoclear bit was set
    std::optional<Snapshot> opened_snapshot;  // option `snapshot`
    uint64_t disk_size = 0;                   // of the image, or of the opened snapshot
    std::vector<uint64_t> l1;  // host byte order; what lies beyond the end of the file (zeroes) is left out
    CacheSizes caches;
    Geometry geometry;
};

}  // namespace gantry::block::qcow2
