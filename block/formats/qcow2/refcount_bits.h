// Counts inside a refcount block, of any width from 1 to 64 bits (spec/qcow2.md section 6). Pure.
//
// A block is a whole number of 8-byte words in aligned memory; `index` and `count` stay inside it.

#pragma once

#include <cstdint>
#include <span>

namespace gantry::block::qcow2 {

/// The largest count of a width: 2^bits - 1, but never above 2^63 - 1.
uint64_t max_refcount(uint32_t refcount_order);

/// Why counts cannot change as asked.
enum class CountFault : uint8_t { kNone, kNegative, kOverflow };
/// Whether `delta` can be added to each of `count` counts from `first` on; `at`: the first that refuses.
CountFault check_add(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t first, uint64_t count,
                     int64_t delta, uint64_t& at);
/// Adds; check_add() has said yes.
void add_to_counts(std::span<uint8_t> block, uint32_t refcount_order, uint64_t first, uint64_t count, int64_t delta);

/// First index in [from, to) with count 0 (or: above 0); `to` when there is none.
uint64_t find_zero_count(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t from, uint64_t to);
uint64_t find_nonzero_count(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t from, uint64_t to);
/// Last index of the block with a count above 0, plus one; 0 when there is none.
uint64_t end_of_counts(std::span<const uint8_t> block, uint32_t refcount_order);

}  // namespace gantry::block::qcow2
