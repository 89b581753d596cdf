#include "exports/vhost_user/message.h"

#include <algorithm>

namespace gantry::vhost_user {

namespace {

constexpr uint32_t kTableMost = sizeof(MemoryTable) + kMaxTableRegions * sizeof(MemoryRegion);
constexpr uint32_t kConfigMost = sizeof(ConfigRange) + kMaxConfigBytes;
constexpr uint32_t kInflightLeast = 20;

constexpr RequestRule kRules[] = {
    {Request::kGetFeatures, "GET_FEATURES", 0, 0, 0, 0, true},
    {Request::kSetFeatures, "SET_FEATURES", 8, 8, 0, 0, false},
    {Request::kSetOwner, "SET_OWNER", 0, 0, 0, 0, false},
    {Request::kResetOwner, "RESET_OWNER", 0, 0, 0, 0, false},
    {Request::kSetMemTable, "SET_MEM_TABLE", sizeof(MemoryTable), kTableMost, 0, kMaxTableRegions, false},
    {Request::kSetLogBase, "SET_LOG_BASE", sizeof(LogArea), sizeof(LogArea), 1, 1, true},
    {Request::kSetLogFd, "SET_LOG_FD", 0, 8, 0, 1, false},
    {Request::kSetVringNum, "SET_VRING_NUM", sizeof(VringState), sizeof(VringState), 0, 0, false},
    {Request::kSetVringAddr, "SET_VRING_ADDR", sizeof(VringAddress), sizeof(VringAddress), 0, 0, false},
    {Request::kSetVringBase, "SET_VRING_BASE", sizeof(VringState), sizeof(VringState), 0, 0, false},
    {Request::kGetVringBase, "GET_VRING_BASE", sizeof(VringState), sizeof(VringState), 0, 0, true},
    {Request::kSetVringKick, "SET_VRING_KICK", 8, 8, 0, 1, false},
    {Request::kSetVringCall, "SET_VRING_CALL", 8, 8, 0, 1, false},
    {Request::kSetVringErr, "SET_VRING_ERR", 8, 8, 0, 1, false},
    {Request::kGetProtocolFeatures, "GET_PROTOCOL_FEATURES", 0, 0, 0, 0, true},
    {Request::kSetProtocolFeatures, "SET_PROTOCOL_FEATURES", 8, 8, 0, 0, false},
    {Request::kGetQueueNum, "GET_QUEUE_NUM", 0, 0, 0, 0, true},
    {Request::kSetVringEnable, "SET_VRING_ENABLE", sizeof(VringState), sizeof(VringState), 0, 0, false},
    {Request::kSetBackendReqFd, "SET_BACKEND_REQ_FD", 0, 8, 1, 1, false},
    {Request::kGetConfig, "GET_CONFIG", sizeof(ConfigRange), kConfigMost, 0, 0, true},
    {Request::kSetConfig, "SET_CONFIG", sizeof(ConfigRange), kConfigMost, 0, 0, false},
    {Request::kGetInflightFd, "GET_INFLIGHT_FD", kInflightLeast, sizeof(InflightArea), 0, 0, true},
    {Request::kSetInflightFd, "SET_INFLIGHT_FD", kInflightLeast, sizeof(InflightArea), 1, 1, false},
    {Request::kResetDevice, "RESET_DEVICE", 0, 0, 0, 0, false},
    {Request::kGetMaxMemSlots, "GET_MAX_MEM_SLOTS", 0, 0, 0, 0, true},
    {Request::kAddMemReg, "ADD_MEM_REG", sizeof(SingleRegion), sizeof(SingleRegion), 1, 1, false},
    {Request::kRemMemReg, "REM_MEM_REG", sizeof(SingleRegion), sizeof(SingleRegion), 0, 1, false},
    {Request::kSetStatus, "SET_STATUS", 8, 8, 0, 0, false},
    {Request::kGetStatus, "GET_STATUS", 0, 0, 0, 0, true},
};

/// Whether a request of SET_VRING_KICK's kind has the descriptor that it announces.
bool descriptor_as_announced(const Message& message) {
    const bool none = message.as<uint64_t>() & kNoDescriptor;
    return message.fds.size() == (none ? 0 : 1);
}

}  // namespace

const RequestRule* rule_of(uint32_t request) {
    const auto it = std::ranges::find(kRules, static_cast<Request>(request), &RequestRule::request);
    return it == std::end(kRules) ? nullptr : it;
}

Result<> check_header(const Header& header) {
    if ((header.flags & kVersionMask) != kVersion) {
        return fail(ErrorKind::kInvalid, "it speaks version {} of the protocol, not 1 (request {}, flags {:#x})",
                    header.flags & kVersionMask, header.request, header.flags);
    }
    if (header.flags & kReplyFlag) {
        return fail(ErrorKind::kInvalid, "it sent a reply (to request {}) where requests belong", header.request);
    }
    if (header.size > kMaxPayload) {
        return fail(ErrorKind::kInvalid, "request {} has {} bytes of payload; at most {} are taken", header.request,
                    header.size, kMaxPayload);
    }
    return {};
}

Result<> check_message(const RequestRule& rule, Message& message) {
    const size_t size = message.payload.size();
    if (size < rule.least || size > rule.most) {
        return rule.least == rule.most
                   ? fail(ErrorKind::kInvalid, "{} has {} bytes of payload instead of {}", rule.name, size, rule.least)
                   : fail(ErrorKind::kInvalid, "{} has {} bytes of payload instead of {} to {}", rule.name, size,
                          rule.least, rule.most);
    }
    if (message.fds.size() < rule.least_fds || (rule.most_fds > 0 && message.fds.size() > rule.most_fds)) {
        return fail(ErrorKind::kInvalid, "{} comes with {} descriptors", rule.name, message.fds.size());
    }
    switch (rule.request) {
        case Request::kSetMemTable: {
            const auto table = message.as<MemoryTable>();
            if (table.regions > kMaxTableRegions) {
                return fail(ErrorKind::kInvalid, "SET_MEM_TABLE has {} regions; at most {} are taken", table.regions,
                            kMaxTableRegions);
            }
            if (size < sizeof table + table.regions * sizeof(MemoryRegion)) {
                return fail(ErrorKind::kInvalid, "SET_MEM_TABLE has {} regions in {} bytes", table.regions, size);
            }
            if (message.fds.size() != table.regions) {
                return fail(ErrorKind::kInvalid, "SET_MEM_TABLE has {} regions and {} descriptors", table.regions,
                            message.fds.size());
            }
            break;
        }
        case Request::kSetVringKick:
        case Request::kSetVringCall:
        case Request::kSetVringErr:
            if (!descriptor_as_announced(message)) {
                return fail(ErrorKind::kInvalid, "{} for queue {} announces {} descriptor and comes with {}", rule.name,
                            message.as<uint64_t>() & kIndexMask, message.fds.empty() ? "one" : "no",
                            message.fds.size());
            }
            break;
        case Request::kSetConfig: {
            const auto range = message.as<ConfigRange>();
            if (range.size != size - sizeof range) {
                return fail(ErrorKind::kInvalid, "SET_CONFIG announces {} bytes and has {}", range.size,
                            size - sizeof range);
            }
            break;
        }
        default:
            break;
    }
    if (rule.most_fds == 0 || rule.request == Request::kRemMemReg || rule.request == Request::kSetLogFd) {
        message.fds.clear();
    }
    return {};
}

std::vector<MemoryRegion> table_regions(const Message& message) {
    std::vector<MemoryRegion> regions(std::min<size_t>(message.as<MemoryTable>().regions, kMaxTableRegions));
    for (size_t i = 0; i < regions.size(); ++i) {
        regions[i] = message.as<MemoryRegion>(sizeof(MemoryTable) + i * sizeof(MemoryRegion));
    }
    return regions;
}

std::vector<std::byte> encode_reply(uint32_t request, std::span<const std::byte> payload) {
    const Header header{request, kVersion | kReplyFlag, static_cast<uint32_t>(payload.size())};
    std::vector<std::byte> out(sizeof header + payload.size());
    std::memcpy(out.data(), &header, sizeof header);
    if (!payload.empty()) std::memcpy(out.data() + sizeof header, payload.data(), payload.size());
    return out;
}

}  // namespace gantry::vhost_user
