// Messages of the vhost-user protocol: the codec, and what every request looks like ("Message Specification" of the
// vhost-user specification). Pure: no socket, no state.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::vhost_user {

enum class Request : uint32_t {
    kGetFeatures = 1,
    kSetFeatures = 2,
    kSetOwner = 3,
    kResetOwner = 4,
    kSetMemTable = 5,
    kSetLogBase = 6,
    kSetLogFd = 7,
    kSetVringNum = 8,
    kSetVringAddr = 9,
    kSetVringBase = 10,
    kGetVringBase = 11,
    kSetVringKick = 12,
    kSetVringCall = 13,
    kSetVringErr = 14,
    kGetProtocolFeatures = 15,
    kSetProtocolFeatures = 16,
    kGetQueueNum = 17,
    kSetVringEnable = 18,
    kSetBackendReqFd = 21,
    kGetConfig = 24,
    kSetConfig = 25,
    kGetInflightFd = 31,
    kSetInflightFd = 32,
    kResetDevice = 34,
    kGetMaxMemSlots = 36,
    kAddMemReg = 37,
    kRemMemReg = 38,
    kSetStatus = 39,
    kGetStatus = 40,
};

/// What we send on the back-end channel.
inline constexpr uint32_t kConfigChange = 2;

/// Device features that belong to the transport.
inline constexpr uint64_t kLogAll = uint64_t{1} << 26, kHasProtocolFeatures = uint64_t{1} << 30;

/// Protocol features.
inline constexpr uint64_t kMultiQueue = 1u << 0, kLogShmFd = 1u << 1, kReplyAck = 1u << 3, kBackendReq = 1u << 5,
                          kConfig = 1u << 9, kInflightShmFd = 1u << 12, kResetsDevice = 1u << 13, kMemSlots = 1u << 15,
                          kStatus = 1u << 16;
inline constexpr uint64_t kProtocolFeatures =
    kMultiQueue | kLogShmFd | kReplyAck | kBackendReq | kConfig | kInflightShmFd | kResetsDevice | kMemSlots | kStatus;

// As on the wire, in the byte order of the machine.
struct Header {
    uint32_t request = 0, flags = 0, size = 0;
};
struct VringState {
    uint32_t index = 0, num = 0;
};
struct VringAddress {
    uint32_t index = 0, flags = 0;
    uint64_t descriptors = 0, used = 0, available = 0, log = 0;
};
struct MemoryRegion {
    uint64_t guest = 0, size = 0, user = 0, offset = 0;
};
struct MemoryTable {
    uint32_t regions = 0, padding = 0;
};
struct SingleRegion {
    uint64_t padding = 0;
    MemoryRegion region;
};
struct ConfigRange {
    uint32_t offset = 0, size = 0, flags = 0;
};
struct InflightArea {
    uint64_t size = 0, offset = 0;
    uint16_t queues = 0, queue_size = 0;
    uint32_t padding = 0;  // not sent by everybody
};
struct LogArea {
    uint64_t size = 0, offset = 0;
};
static_assert(sizeof(Header) == 12 && sizeof(VringState) == 8 && sizeof(VringAddress) == 40);
static_assert(sizeof(MemoryRegion) == 32 && sizeof(SingleRegion) == 40 && sizeof(ConfigRange) == 12);
static_assert(sizeof(InflightArea) == 24 && sizeof(LogArea) == 16);

inline constexpr uint32_t kVersion = 1, kVersionMask = 3, kReplyFlag = 4, kNeedReply = 8;
inline constexpr uint32_t kLogRing = 1;         // flags of VringAddress
inline constexpr uint64_t kIndexMask = 0xff;    // of SET_VRING_KICK and its kind
inline constexpr uint64_t kNoDescriptor = 256;  // the same
inline constexpr size_t kMaxPayload = 4096;
inline constexpr size_t kMaxDescriptors = 8;
inline constexpr size_t kMaxTableRegions = 8;
inline constexpr size_t kMaxMemorySlots = 509;
inline constexpr size_t kMaxConfigBytes = 256;

/// One request with what came along.
struct Message {
    Header header;
    std::vector<std::byte> payload;
    std::vector<UniqueFd> fds;

    Request request() const { return static_cast<Request>(header.request); }
    bool needs_reply() const { return header.flags & kNeedReply; }
    /// The payload's beginning; what it is too short for is 0.
    template <class T>
    T as(size_t offset = 0) const {
        T value{};
        if (offset < payload.size())
            std::memcpy(&value, payload.data() + offset, std::min(sizeof value, payload.size() - offset));
        return value;
    }
};

/// How a request must look.
struct RequestRule {
    Request request;
    std::string_view name;
    uint32_t least, most;         // bytes of payload
    uint8_t least_fds, most_fds;  // more than that are closed unseen
    bool answered;                // has a reply of its own
};

/// Null for what is not known, or not for a block device.
const RequestRule* rule_of(uint32_t request);

/// Before the payload is read. kInvalid with the reason: the connection makes no sense any more.
Result<> check_header(const Header& header);
/// The whole message, of a request that has a rule. kInvalid likewise. Descriptors that the request does not expect are
/// closed.
Result<> check_message(const RequestRule& rule, Message& message);

/// The regions of a SET_MEM_TABLE that was checked.
std::vector<MemoryRegion> table_regions(const Message& message);

/// A header and `payload`, as a reply to `request`.
std::vector<std::byte> encode_reply(uint32_t request, std::span<const std::byte> payload);

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
    return std::as_bytes(std::span(&value, 1));
}

}  // namespace gantry::vhost_user
