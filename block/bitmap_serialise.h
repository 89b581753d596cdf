// Dirty bitmaps as bytes: bit b of the bitmap is bit b % 8 of byte b / 8, as images store them.

#pragma once

#include <cstdint>
#include <span>

#include "block/bitmap.h"

namespace gantry::block {

/// Bytes of the whole bitmap.
uint64_t serialised_bytes(const DirtyBitmap& bitmap);

/// What a piece of the serialised form holds; bits beyond the end of the bitmap fit either.
enum class BitmapPiece : uint8_t { kZeroes, kOnes, kMixed };
/// Bytes [offset, offset + bytes) of the serialised form, clipped to it; `offset` multiple of 8.
BitmapPiece classify_piece(const DirtyBitmap& bitmap, uint64_t offset, uint64_t bytes);
/// Fills `out` with the bytes from `offset` (multiple of 8) on; beyond the end zeroes.
void serialise_piece(const DirtyBitmap& bitmap, uint64_t offset, std::span<uint8_t> out);
/// ORs bytes that stand at `offset` (multiple of 8) in; what lies beyond the end is dropped.
void deserialise_piece(DirtyBitmap& bitmap, uint64_t offset, std::span<const uint8_t> in);
/// Sets every bit of bytes [offset, offset + bytes), clipped; `offset` multiple of 8.
void deserialise_ones(DirtyBitmap& bitmap, uint64_t offset, uint64_t bytes);

}  // namespace gantry::block
