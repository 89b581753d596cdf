// Decoding one compressed cluster (spec/qcow2.md section 4). Pure computation; may run on any thread.

#pragma once

#include <cstdint>
#include <span>

#include "runtime/error.h"

namespace gantry::block::qcow2 {

enum class Compression : uint8_t { kDeflate = 0, kZstd = 1 };

/// Fills all of `cluster` from the beginning of `blob`; what follows the cluster's data belongs to somebody else.
/// kCorrupt: not a valid stream, or it ends too early. Memory: the decoder's window, at most 8 MiB.
Result<> decompress(Compression type, std::span<const uint8_t> blob, std::span<uint8_t> cluster);

}  // namespace gantry::block::qcow2
