// Encoding one compressed cluster (spec/qcow2.md section 4). Pure computation; may run on any thread.

#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "block/formats/qcow2/decompress.h"

namespace gantry::block::qcow2 {

/// Writes the encoded `cluster` to `blob` and returns its length; nullopt when it does not fit there (or the encoder
/// has no memory): then the cluster is stored as it is. Deflate with a window of 4 KiB, which is what readers count on.
std::optional<size_t> compress(Compression type, std::span<const uint8_t> cluster, std::span<uint8_t> blob);

}  // namespace gantry::block::qcow2
