// Big-endian loads and stores: every number of the format is stored that way.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace gantry::block::qcow2 {

inline uint16_t load_be16(const uint8_t* p) {
    uint16_t v;
    std::memcpy(&v, p, sizeof v);
    return std::byteswap(v);
}
inline uint32_t load_be32(const uint8_t* p) {
    uint32_t v;
    std::memcpy(&v, p, sizeof v);
    return std::byteswap(v);
}
inline uint64_t load_be64(const uint8_t* p) {
    uint64_t v;
    std::memcpy(&v, p, sizeof v);
    return std::byteswap(v);
}

inline void store_be16(uint8_t* p, uint16_t v) {
    v = std::byteswap(v);
    std::memcpy(p, &v, sizeof v);
}
inline void store_be32(uint8_t* p, uint32_t v) {
    v = std::byteswap(v);
    std::memcpy(p, &v, sizeof v);
}
inline void store_be64(uint8_t* p, uint64_t v) {
    v = std::byteswap(v);
    std::memcpy(p, &v, sizeof v);
}

}  // namespace gantry::block::qcow2
