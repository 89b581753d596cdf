#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace gantry::bench {

// NBD proto.md, "Values": the part of the protocol that a client with simple or structured replies needs.
inline constexpr uint64_t kGreetingMagic = 0x4e42444d41474943;
inline constexpr uint64_t kOptionMagic = 0x49484156454f5054;
inline constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;
inline constexpr uint32_t kRequestMagic = 0x25609513;
inline constexpr uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;

inline constexpr uint16_t kFlagFixedNewstyle = 1;
inline constexpr uint16_t kFlagNoZeroes = 2;

inline constexpr uint32_t kOptionGo = 7;
inline constexpr uint32_t kOptionStructuredReply = 8;

inline constexpr uint32_t kReplyAck = 1;
inline constexpr uint32_t kReplyInfo = 3;
inline constexpr uint32_t kReplyErrorBit = 0x80000000;

inline constexpr uint16_t kInfoExport = 0;
inline constexpr uint16_t kInfoBlockSize = 3;

inline constexpr uint16_t kTransmissionReadOnly = 2;

inline constexpr uint16_t kCommandRead = 0;
inline constexpr uint16_t kCommandWrite = 1;
inline constexpr uint16_t kCommandDisconnect = 2;

inline constexpr uint16_t kChunkFlagDone = 1;
inline constexpr uint16_t kChunkNone = 0;
inline constexpr uint16_t kChunkOffsetData = 1;
inline constexpr uint16_t kChunkOffsetHole = 2;
inline constexpr uint16_t kChunkErrorBit = 0x8000;

inline constexpr uint32_t kRequestBytes = 28;
inline constexpr uint32_t kSimpleReplyBytes = 16;
inline constexpr uint32_t kChunkHeaderBytes = 20;
inline constexpr uint32_t kMaxPayloadBytes = 32u << 20;

template <typename T>
T load_be(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return std::endian::native == std::endian::little ? std::byteswap(value) : value;
}

/// Writes `value` in network order and returns the byte after it.
template <typename T>
uint8_t* store_be(uint8_t* to, T value) {
    if (std::endian::native == std::endian::little) value = std::byteswap(value);
    std::memcpy(to, &value, sizeof value);
    return to + sizeof value;
}

/// Encodes a compact request (NBD proto.md "Request message") of kRequestBytes.
inline void encode_request(uint8_t* to, uint16_t command, uint64_t cookie, uint64_t offset, uint32_t length) {
    to = store_be(to, kRequestMagic);
    to = store_be(to, uint16_t{0});
    to = store_be(to, command);
    to = store_be(to, cookie);
    to = store_be(to, offset);
    store_be(to, length);
}

}  // namespace gantry::bench
