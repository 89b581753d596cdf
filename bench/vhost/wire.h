#pragma once

#include <bit>
#include <cstdint>

namespace gantry::bench::vhost {

static_assert(std::endian::native == std::endian::little, "rings and requests are little-endian (VIRTIO 1.2, 1.4)");

// vhost-user protocol, "Front-end message types": the part that a block driver without recovery needs.
enum class Request : uint32_t {
    kGetFeatures = 1,
    kSetFeatures = 2,
    kSetOwner = 3,
    kSetMemTable = 5,
    kSetVringNum = 8,
    kSetVringAddr = 9,
    kSetVringBase = 10,
    kGetVringBase = 11,
    kSetVringKick = 12,
    kSetVringCall = 13,
    kGetProtocolFeatures = 15,
    kSetProtocolFeatures = 16,
    kGetQueueNum = 17,
    kSetVringEnable = 18,
    kGetConfig = 24,
};

struct Header {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
};
inline constexpr uint32_t kVersion = 1;
inline constexpr uint32_t kVersionMask = 3;
inline constexpr uint32_t kReply = 4;

struct VringState {
    uint32_t index, number;
};
struct VringAddress {
    uint32_t index, flags;
    uint64_t descriptors, used, available, log;
};
struct MemoryTable {
    uint32_t regions, padding;
    uint64_t guest_address, size, user_address, mmap_offset;
};
struct Config {
    uint32_t offset, size, flags;
    uint8_t data[60];
};

inline constexpr uint64_t kProtocolMq = 1;
inline constexpr uint64_t kProtocolConfig = 1 << 9;

inline constexpr uint64_t kFeatureReadOnly = 1 << 5;
inline constexpr uint64_t kFeatureFlush = 1 << 9;
inline constexpr uint64_t kFeatureMq = 1 << 12;
inline constexpr uint64_t kFeatureIndirect = 1 << 28;
inline constexpr uint64_t kFeatureEventIdx = 1 << 29;
inline constexpr uint64_t kFeatureProtocol = 1 << 30;
inline constexpr uint64_t kFeatureVersion1 = uint64_t{1} << 32;
inline constexpr uint64_t kFeaturePacked = uint64_t{1} << 34;

// struct virtio_blk_config
inline constexpr uint32_t kConfigCapacity = 0;
inline constexpr uint32_t kConfigBlockSize = 20;

struct BlockRequest {  // struct virtio_blk_req
    uint32_t type, priority;
    uint64_t sector;
};
inline constexpr uint32_t kTypeRead = 0;
inline constexpr uint32_t kTypeWrite = 1;

inline constexpr uint16_t kDescNext = 1;
inline constexpr uint16_t kDescWrite = 2;
inline constexpr uint16_t kDescIndirect = 4;
inline constexpr uint16_t kDescAvailable = 1 << 7;
inline constexpr uint16_t kDescUsed = 1 << 15;

struct SplitDescriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
struct SplitUsed {
    uint32_t id, length;
};
struct PackedDescriptor {
    uint64_t address;
    uint32_t length;
    uint16_t id, flags;
};
struct PackedEvent {
    uint16_t offset_wrap, flags;
};
inline constexpr uint16_t kEventEnable = 0;
inline constexpr uint16_t kEventDisable = 1;
inline constexpr uint16_t kEventDescriptor = 2;

}  // namespace gantry::bench::vhost
