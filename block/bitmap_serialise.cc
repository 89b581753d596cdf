#include "block/bitmap_serialise.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "runtime/check.h"

namespace gantry::block {

namespace {

uint64_t to_little_endian(uint64_t v) { return std::endian::native == std::endian::little ? v : std::byteswap(v); }

/// Words [first, last), those that [offset, offset + bytes) touches.
struct Words {
    uint64_t first, last;
};

Words words_of(const DirtyBitmap& bitmap, uint64_t offset, uint64_t bytes) {
    CHECK(offset % 8 == 0, "pieces of a bitmap begin with a word");
    const uint64_t first = std::min(offset / 8, bitmap.word_count());
    const uint64_t count = bytes / 8 + (bytes % 8 != 0);
    return {first, first + std::min(count, bitmap.word_count() - first)};
}

/// The bits of word `index` that lie inside bytes [offset, offset + bytes).
uint64_t bits_inside(uint64_t index, uint64_t offset, uint64_t bytes) {
    const uint64_t inside = bytes - (index * 8 - offset);
    return inside >= 8 ? ~uint64_t{0} : (uint64_t{1} << (inside * 8)) - 1;
}

}  // namespace

uint64_t serialised_bytes(const DirtyBitmap& bitmap) {
    const uint64_t bits = bitmap.size() / bitmap.granularity() + (bitmap.size() % bitmap.granularity() != 0);
    return bits / 8 + (bits % 8 != 0);
}

BitmapPiece classify_piece(const DirtyBitmap& bitmap, uint64_t offset, uint64_t bytes) {
    const Words words = words_of(bitmap, offset, bytes);
    if (bitmap.next_used_word(words.first) >= words.last) return BitmapPiece::kZeroes;
    bool zeroes = true, ones = true;
    for (uint64_t i = words.first; i < words.last && (zeroes || ones); i++) {
        const uint64_t wanted = bitmap.valid_bits(i) & bits_inside(i, offset, bytes);
        const uint64_t bits = bitmap.word(i) & wanted;
        zeroes = zeroes && bits == 0;
        ones = ones && bits == wanted;
    }
    return zeroes ? BitmapPiece::kZeroes : ones ? BitmapPiece::kOnes : BitmapPiece::kMixed;
}

void serialise_piece(const DirtyBitmap& bitmap, uint64_t offset, std::span<uint8_t> out) {
    const Words words = words_of(bitmap, offset, out.size());
    uint64_t at = 0;
    for (uint64_t i = words.first; i < words.last; i++) {
        const uint64_t bits = to_little_endian(bitmap.word(i) & bitmap.valid_bits(i));
        const uint64_t part = std::min<uint64_t>(8, out.size() - at);
        std::memcpy(out.data() + at, &bits, part);
        at += part;
    }
    std::fill(out.begin() + static_cast<ptrdiff_t>(at), out.end(), uint8_t{0});
}

void deserialise_piece(DirtyBitmap& bitmap, uint64_t offset, std::span<const uint8_t> in) {
    const Words words = words_of(bitmap, offset, in.size());
    uint64_t at = 0;
    for (uint64_t i = words.first; i < words.last; i++) {
        uint64_t bits = 0;
        const uint64_t part = std::min<uint64_t>(8, in.size() - at);
        std::memcpy(&bits, in.data() + at, part);
        bitmap.or_word(i, to_little_endian(bits));
        at += part;
    }
}

void deserialise_ones(DirtyBitmap& bitmap, uint64_t offset, uint64_t bytes) {
    const Words words = words_of(bitmap, offset, bytes);
    for (uint64_t i = words.first; i < words.last; i++) bitmap.or_word(i, bits_inside(i, offset, bytes));
}

}  // namespace gantry::block
