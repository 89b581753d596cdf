// How large an image would be, before it is made.

#pragma once

#include <cstdint>
#include <optional>

#include "block/create.h"

namespace gantry::block {

class Node;

/// BlockMeasureInfo of the QMP schema: bytes of the new file.
struct MeasureResult {
    uint64_t required = 0;            // with the data that there is
    uint64_t fully_allocated = 0;     // when everything has been written
    std::optional<uint64_t> bitmaps;  // in addition, for the source's persistent ones
};

/// What is to be measured: a disk of `size` bytes without data, or the contents of `source`.
struct MeasureSource {
    uint64_t size = 0;
    /// Open for reading, kept by a user; null: none.
    Node* source = nullptr;
};

/// `gantry image measure -O FORMAT -o WORDS`: a `size` among the words is not used. Main loop. kInvalid for words;
/// kUnsupported "Block driver 'X' does not support size measurement".
Task<Result<MeasureResult>> measure_image(Graph& graph, std::string format, MeasureSource what, CreationWords words);

/// Bytes of the units of `unit` bytes in which `source` (its backing files included) has data that does not read as
/// zeroes.
Task<Result<uint64_t>> count_data(Node& source, uint64_t unit);

}  // namespace gantry::block
