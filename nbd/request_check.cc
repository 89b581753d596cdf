#include "nbd/request_check.h"

namespace gantry::nbd {

namespace {

/// Flags a command may carry besides FUA, which every command takes once SEND_FUA is advertised.
uint16_t allowed_flags(uint16_t command, const RequestRules& rules) {
    switch (command) {
        case kCmdRead:
            return rules.structured ? kCmdDf : 0;
        case kCmdWrite:
            return rules.extended ? kCmdPayloadLen : 0;
        case kCmdWriteZeroes:
            return rules.read_only ? kCmdNoHole : kCmdNoHole | kCmdFastZero;
        case kCmdBlockStatus:
            return rules.extended && rules.has_contexts ? kCmdReqOne | kCmdPayloadLen : kCmdReqOne;
        default:
            return 0;
    }
}

}  // namespace

Verdict check_request(const RequestHeader& request, const RequestRules& rules) {
    if (request.command == kCmdDisc) return {};
    if (rules.good_bye) return {kWireShutdown, "the server is shutting down"};
    if (request.command > kCmdBlockStatus) return {kWireInval, "unknown command"};
    if (request.flags & ~(allowed_flags(request.command, rules) | kCmdFua)) {
        return {kWireInval, "flag not allowed on this command"};
    }
    if (request.command == kCmdFlush) return {};
    if (request.command == kCmdBlockStatus && !rules.has_contexts) {
        return {kWireInval, "no meta context was negotiated"};
    }
    if (request.command == kCmdBlockStatus && (request.flags & kCmdPayloadLen)) return {};
    const bool writes =
        request.command == kCmdWrite || request.command == kCmdWriteZeroes || request.command == kCmdTrim;
    if (writes && rules.read_only) return {kWirePerm, "the export is read-only"};
    if (request.offset > rules.size || request.length > rules.size - request.offset) {
        const bool no_space = request.command == kCmdWrite || request.command == kCmdWriteZeroes;
        return {no_space ? kWireNoSpace : kWireInval, "the range ends beyond the export"};
    }
    if (request.command == kCmdRead && request.length > kMaxPayload) {
        const bool overflow = rules.extended || (request.flags & kCmdDf);
        return {overflow ? kWireOverflow : kWireInval, "longer than the maximum payload"};
    }
    if (request.command == kCmdBlockStatus && request.length == 0) return {kWireInval, "the range is empty"};
    return {};
}

}  // namespace gantry::nbd
