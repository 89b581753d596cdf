#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace gantry::bench {

/// The bytes that --verify expects: a function of the position on the disk and of how often this run
/// has written that block, so that stale, displaced and torn data all differ from it.

/// Fills `to` with the pattern of the disk from `offset` on, which is a multiple of 8, as is the size.
void fill_pattern(std::span<uint8_t> to, uint64_t offset, uint32_t version);

/// The index of the first byte of `data`, found at `offset` of the disk, that is not the pattern's;
/// data.size() when all are right. Any offset and size.
size_t find_mismatch(std::span<const uint8_t> data, uint64_t offset, uint32_t version);

}  // namespace gantry::bench
