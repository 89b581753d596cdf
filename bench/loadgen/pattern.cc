#include "bench/loadgen/pattern.h"

#include <bit>
#include <cstring>

namespace gantry::bench {

static_assert(std::endian::native == std::endian::little, "byte_at() takes the lowest byte of a word first");

namespace {

uint64_t word_at(uint64_t offset, uint32_t version) {
    uint64_t x = (offset / 8 + 1) * 0x9e3779b97f4a7c15 + (uint64_t{version} << 40 | version);
    x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9;
    return x ^ (x >> 32);
}

uint8_t byte_at(uint64_t offset, uint32_t version) {
    return static_cast<uint8_t>(word_at(offset, version) >> (8 * (offset % 8)));
}

}  // namespace

void fill_pattern(std::span<uint8_t> to, uint64_t offset, uint32_t version) {
    for (size_t i = 0; i + 8 <= to.size(); i += 8) {
        const uint64_t word = word_at(offset + i, version);
        std::memcpy(to.data() + i, &word, sizeof word);
    }
}

size_t find_mismatch(std::span<const uint8_t> data, uint64_t offset, uint32_t version) {
    size_t i = 0;
    while (i < data.size()) {
        if ((offset + i) % 8 == 0 && data.size() - i >= 8) {
            uint64_t word;
            std::memcpy(&word, data.data() + i, sizeof word);
            if (word == word_at(offset + i, version)) {
                i += 8;
                continue;
            }
        }
        if (data[i] != byte_at(offset + i, version)) return i;
        i++;
    }
    return i;
}

}  // namespace gantry::bench
