// What a request must look like before anybody acts on it.

#include "fuse/call.h"

namespace gantry::fuse {

namespace {

/// How long an operation's own struct is; 0: none, or one that nobody reads.
uint32_t least_arguments(Opcode opcode) {
    switch (opcode) {
        case Opcode::kLookup:
            return 1;  // the 0 that ends a name
        case Opcode::kForget:
        case Opcode::kBatchForget:
        case Opcode::kInterrupt:
            return 8;
        case Opcode::kInit:
            return 2 * sizeof(uint32_t);  // another major version may know no more
        case Opcode::kGetattr:
            return sizeof(GetattrIn);
        case Opcode::kSetattr:
            return sizeof(SetattrIn);
        case Opcode::kOpen:
            return sizeof(OpenIn);
        case Opcode::kRead:
            return sizeof(ReadIn);
        case Opcode::kWrite:
            return sizeof(WriteIn);
        case Opcode::kRelease:
            return sizeof(ReleaseIn);
        case Opcode::kFsync:
            return sizeof(FsyncIn);
        case Opcode::kFlush:
            return sizeof(FlushIn);
        case Opcode::kFallocate:
            return sizeof(FallocateIn);
        case Opcode::kLseek:
            return sizeof(LseekIn);
        default:
            return 0;
    }
}

/// Operations that are about the connection, or about nodes that may be gone.
bool needs_root_node(Opcode opcode) {
    switch (opcode) {
        case Opcode::kInit:
        case Opcode::kForget:
        case Opcode::kBatchForget:
        case Opcode::kInterrupt:
        case Opcode::kDestroy:
        case Opcode::kNotifyReply:
            return false;
        default:
            return true;
    }
}

}  // namespace

CallFault check_call(const Call& call, uint64_t received) {
    const InHeader& header = call.header;
    if (received < sizeof(InHeader) || header.len != received) return CallFault::kBroken;
    const uint64_t body = received - sizeof(InHeader);
    if (call.args.size() + uint64_t{call.data_size} != body || call.data_size > call.room_size)
        return CallFault::kRefused;
    // Extensions stand at the end of everything.
    const uint64_t extensions = uint64_t{header.total_extlen} * 8;
    const uint64_t own = least_arguments(call.opcode());
    if (call.opcode() == Opcode::kWrite) {
        if (call.args.size() != own) return CallFault::kRefused;
        if (call.arguments<WriteIn>().size + extensions != call.data_size) return CallFault::kRefused;
    } else if (call.args.size() < own || body < own + extensions) {
        // Names and values that nobody reads may lie anywhere.
        return CallFault::kRefused;
    }
    if (needs_root_node(call.opcode()) && header.nodeid != kRootNode) return CallFault::kRefused;
    return CallFault::kNone;
}

}  // namespace gantry::fuse
