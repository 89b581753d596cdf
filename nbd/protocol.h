// NBD on the wire: constants, and encoding and decoding of headers. Nothing else. All integers are big-endian.

#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace gantry::nbd {

inline constexpr uint64_t kNbdMagic = 0x4e42444d41474943;     // "NBDMAGIC"
inline constexpr uint64_t kOptionMagic = 0x49484156454f5054;  // "IHAVEOPT"
inline constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;
inline constexpr uint32_t kRequestMagic = 0x25609513;
inline constexpr uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;
inline constexpr uint32_t kExtendedRequestMagic = 0x21e41c71;
inline constexpr uint32_t kExtendedReplyMagic = 0x6e8a278c;

inline constexpr uint16_t kDefaultPort = 10809;

/// Names, descriptions, queries and error texts.
inline constexpr size_t kMaxString = 4096;
/// The payload a peer may send or ask for.
inline constexpr uint32_t kMaxPayload = 32u << 20;
/// Option payload that is parsed; longer ones are skipped.
inline constexpr uint32_t kMaxOptionPayload = (64u << 10) + 2 * kMaxString;
/// Option payload that is skipped; beyond it the connection ends.
inline constexpr uint32_t kMaxSkippedOption = 32u << 20;
/// In all answers to one BLOCK_STATUS together.
inline constexpr uint32_t kMaxStatusExtents = 1u << 17;
/// Contexts an export may offer: the payload that names them all fits the receive buffer, and each gets some extents.
inline constexpr size_t kMaxContexts = 1024;
/// Longest extent of a 32-bit block status answer: a multiple of every block size.
inline constexpr uint64_t kMaxExtentLength = 0xffff0000;

// Handshake flags, server and client.
inline constexpr uint16_t kFlagFixedNewstyle = 1 << 0;
inline constexpr uint16_t kFlagNoZeroes = 1 << 1;

enum Option : uint32_t {
    kOptExportName = 1,
    kOptAbort = 2,
    kOptList = 3,
    kOptPeekExport = 4,
    kOptStartTls = 5,
    kOptInfo = 6,
    kOptGo = 7,
    kOptStructuredReply = 8,
    kOptListMetaContext = 9,
    kOptSetMetaContext = 10,
    kOptExtendedHeaders = 11,
};

enum OptionReply : uint32_t {
    kRepAck = 1,
    kRepServer = 2,
    kRepInfo = 3,
    kRepMetaContext = 4,
    kRepErrUnsup = 0x80000001,
    kRepErrPolicy = 0x80000002,
    kRepErrInvalid = 0x80000003,
    kRepErrPlatform = 0x80000004,
    kRepErrTlsRequired = 0x80000005,
    kRepErrUnknown = 0x80000006,
    kRepErrShutdown = 0x80000007,
    kRepErrBlockSizeRequired = 0x80000008,
    kRepErrTooBig = 0x80000009,
    kRepErrExtHeaderRequired = 0x8000000a,
};

enum InfoType : uint16_t { kInfoExport = 0, kInfoName = 1, kInfoDescription = 2, kInfoBlockSize = 3 };

enum TransmissionFlag : uint16_t {
    kHasFlags = 1 << 0,
    kReadOnly = 1 << 1,
    kSendFlush = 1 << 2,
    kSendFua = 1 << 3,
    kRotational = 1 << 4,
    kSendTrim = 1 << 5,
    kSendWriteZeroes = 1 << 6,
    kSendDf = 1 << 7,
    kCanMultiConn = 1 << 8,
    kSendResize = 1 << 9,
    kSendCache = 1 << 10,
    kSendFastZero = 1 << 11,
    kBlockStatusPayload = 1 << 12,
};

enum Command : uint16_t {
    kCmdRead = 0,
    kCmdWrite = 1,
    kCmdDisc = 2,
    kCmdFlush = 3,
    kCmdTrim = 4,
    kCmdCache = 5,
    kCmdWriteZeroes = 6,
    kCmdBlockStatus = 7,
    kCmdResize = 8,
};

enum CommandFlag : uint16_t {
    kCmdFua = 1 << 0,
    kCmdNoHole = 1 << 1,
    kCmdDf = 1 << 2,
    kCmdReqOne = 1 << 3,
    kCmdFastZero = 1 << 4,
    kCmdPayloadLen = 1 << 5,
};

enum WireError : uint32_t {
    kWireOk = 0,
    kWirePerm = 1,
    kWireIo = 5,
    kWireNoMem = 12,
    kWireInval = 22,
    kWireNoSpace = 28,
    kWireOverflow = 75,
    kWireNotSup = 95,
    kWireShutdown = 108,
};

enum ChunkType : uint16_t {
    kChunkNone = 0,
    kChunkOffsetData = 1,
    kChunkOffsetHole = 2,
    kChunkBlockStatus = 5,
    kChunkBlockStatusExt = 6,
    kChunkError = 0x8001,
    kChunkErrorOffset = 0x8002,
};
inline constexpr uint16_t kChunkDone = 1;

// Flag word of base:allocation.
inline constexpr uint32_t kStateHole = 1 << 0;
inline constexpr uint32_t kStateZero = 1 << 1;
// Flag word of qemu:dirty-bitmap:NAME.
inline constexpr uint32_t kStateDirty = 1 << 0;

inline constexpr size_t kGreetingSize = 18;
inline constexpr size_t kClientFlagsSize = 4;
inline constexpr size_t kOptionHeaderSize = 16;
inline constexpr size_t kOptionReplySize = 20;
inline constexpr size_t kRequestSize = 28;
inline constexpr size_t kExtendedRequestSize = 32;
/// Payload of a BLOCK_STATUS: the length of the range, then context ids.
inline constexpr size_t kStatusPayloadFixed = 8;
inline constexpr size_t kSimpleReplySize = 16;
inline constexpr size_t kChunkHeaderSize = 20;
inline constexpr size_t kExtendedChunkHeaderSize = 32;

template <class T>
constexpr T to_big(T v) {
    if constexpr (std::endian::native == std::endian::little) return std::byteswap(v);
    return v;
}
template <class T>
inline T load_big(const uint8_t* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return to_big(v);
}
template <class T>
inline uint8_t* store_big(uint8_t* p, T v) {
    v = to_big(v);
    std::memcpy(p, &v, sizeof v);
    return p + sizeof v;
}

/// A request as it arrived; `magic` is not checked. `length` is that of the payload for WRITE and, with extended
/// headers, wherever PAYLOAD_LEN is set; else that of the range (32 bits in a compact request).
struct RequestHeader {
    uint32_t magic;
    uint16_t flags;
    uint16_t command;
    uint64_t cookie;
    uint64_t offset;
    uint64_t length;
};
/// kExtendedRequestSize bytes if `extended`, else kRequestSize.
inline RequestHeader decode_request(const uint8_t* p, bool extended = false) {
    return {load_big<uint32_t>(p),      load_big<uint16_t>(p + 4),
            load_big<uint16_t>(p + 6),  load_big<uint64_t>(p + 8),
            load_big<uint64_t>(p + 16), extended ? load_big<uint64_t>(p + 24) : load_big<uint32_t>(p + 24)};
}
inline void encode_request(uint8_t* p, const RequestHeader& r, bool extended = false) {
    p = store_big(p, r.magic);
    p = store_big(p, r.flags);
    p = store_big(p, r.command);
    p = store_big(p, r.cookie);
    p = store_big(p, r.offset);
    if (extended) {
        store_big(p, r.length);
    } else {
        store_big(p, static_cast<uint32_t>(r.length));
    }
}

inline void encode_simple_reply(uint8_t* p, uint32_t error, uint64_t cookie) {
    p = store_big(p, kSimpleReplyMagic);
    p = store_big(p, error);
    store_big(p, cookie);
}

inline uint8_t* encode_chunk(uint8_t* p, uint16_t flags, uint16_t type, uint64_t cookie, uint32_t payload_length) {
    p = store_big(p, kStructuredReplyMagic);
    p = store_big(p, flags);
    p = store_big(p, type);
    p = store_big(p, cookie);
    return store_big(p, payload_length);
}
/// `offset` is the request's, whatever the chunk is about.
inline uint8_t* encode_extended_chunk(uint8_t* p, uint16_t flags, uint16_t type, uint64_t cookie, uint64_t offset,
                                      uint64_t payload_length) {
    p = store_big(p, kExtendedReplyMagic);
    p = store_big(p, flags);
    p = store_big(p, type);
    p = store_big(p, cookie);
    p = store_big(p, offset);
    return store_big(p, payload_length);
}

struct OptionHeader {
    uint64_t magic;
    uint32_t option;
    uint32_t length;
};
inline OptionHeader decode_option(const uint8_t* p) {
    return {load_big<uint64_t>(p), load_big<uint32_t>(p + 8), load_big<uint32_t>(p + 12)};
}

inline void encode_option_reply(uint8_t* p, uint32_t option, uint32_t type, uint32_t length) {
    p = store_big(p, kOptionReplyMagic);
    p = store_big(p, option);
    p = store_big(p, type);
    store_big(p, length);
}

inline void encode_greeting(uint8_t* p, uint16_t flags) {
    p = store_big(p, kNbdMagic);
    p = store_big(p, kOptionMagic);
    store_big(p, flags);
}

}  // namespace gantry::nbd
