// How large an image would be (spec/qcow2.md section 15).

#pragma once

#include <cstdint>
#include <span>

#include "block/create.h"
#include "block/formats/qcow2/create_options.h"
#include "block/measure.h"

namespace gantry::block::qcow2 {

/// Pure. `data_bytes`: of the clusters that hold data, counted whole; at most the disk. `crypto_bytes`: of the
/// encryption header. The metadata is counted for the full disk in both numbers.
MeasureResult measure(const CreateOptions& options, uint64_t data_bytes, uint64_t crypto_bytes = 0);

/// Creator::measure.
Task<Result<MeasureResult>> measure_from_words(MeasureSource what, CreationWords words);

/// Bytes that the bitmaps of a disk take in an image of it: tables, directory and data, counted for bits all set.
struct MeasuredBitmap {
    size_t name_bytes = 0;
    uint64_t granularity = 65536;
};
uint64_t measure_bitmaps(std::span<const MeasuredBitmap> bitmaps, uint64_t size, uint32_t cluster_bits);

}  // namespace gantry::block::qcow2
