// The table of a stored bitmap: where each cluster of its bytes is (spec/qcow2.md section 8).

#pragma once

#include <string>
#include <vector>

#include "block/formats/qcow2/bitmap_directory.h"
#include "block/formats/qcow2/image_file.h"
#include "runtime/error.h"
#include "runtime/task.h"

namespace gantry::block::qcow2 {

/// Data of adjacent clusters is moved at once, up to this much.
constexpr uint64_t kBitmapTransferBytes = uint64_t{1} << 20;

/// The whole table of `entry`, each word valid. kCorrupt: it is not all in the file, or a word makes no sense; kIo.
Task<Result<std::vector<BitmapCluster>>> read_bitmap_table(const ImageFile& file, const BitmapEntry& entry,
                                                           Geometry geometry);

/// Number of clusters from `first` on that lie one behind the other in the file, at most kBitmapTransferBytes; at least
/// one. table[first] has an offset.
uint64_t adjacent_clusters(const std::vector<BitmapCluster>& table, uint64_t first, const Geometry& geometry);

}  // namespace gantry::block::qcow2
