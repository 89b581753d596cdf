// Call: one request of the kernel, from its arrival to its reply.

#pragma once

#include <cstring>
#include <span>

#include "fuse/wire.h"

namespace gantry::fuse {

constexpr uint32_t kMaxWrite = 1 << 20;  // of READ, too

/// Made by a transport, answered by FileService, sent by the transport. On one loop, from first to last.
struct Call {
    InHeader header;
    /// The operation's own struct, checked to be whole; no alignment. Of WRITE without the data.
    std::span<const uint8_t> args;
    /// Page-aligned memory: WRITE's data lies at its beginning (`data_size` bytes), READ's answer goes there (at least
    /// ReadIn::size bytes were found to fit).
    uint8_t* room = nullptr;
    uint32_t room_size = 0;
    uint32_t data_size = 0;
    /// Others have come with it, or are under way: what takes long is better done beside them.
    bool among_others = false;

    // The answer.
    int32_t error = 0;        // 0 or -errno
    uint32_t reply_size = 0;  // bytes, in `body` or, with in_room, at the beginning of `room`; none with an error
    bool in_room = false;
    bool silent = false;  // no reply at all
    union Body {
        Body() {}
        AttrOut attr;
        OpenOut open;
        WriteOut write;
        LseekOut lseek;
        StatfsOut statfs;
        InitOut init;
    } body;

    Opcode opcode() const { return static_cast<Opcode>(header.opcode); }
    template <class T>
    T arguments() const {
        T value;
        std::memcpy(&value, args.data(), sizeof value);
        return value;
    }
    void fail(int positive_errno) {
        error = -positive_errno;
        reply_size = 0;
    }
    void succeed() { error = 0, reply_size = 0; }
    void succeed(const AttrOut& out) { put(body.attr, out); }
    void succeed(const OpenOut& out) { put(body.open, out); }
    void succeed(const WriteOut& out) { put(body.write, out); }
    void succeed(const LseekOut& out) { put(body.lseek, out); }
    void succeed(const StatfsOut& out) { put(body.statfs, out); }
    void succeed(const InitOut& out) { put(body.init, out); }
    void succeed_with_data(uint32_t bytes) {
        error = 0;
        in_room = true;
        reply_size = bytes;
    }

  private:
    template <class T>
    void put(T& where, const T& out) {
        where = out;
        error = 0;
        in_room = false;
        reply_size = sizeof out;
    }
};

/// What is wrong with a request that was received.
enum class CallFault : uint8_t {
    kNone,
    kRefused,  // answered EIO: its parts do not fit together
    kBroken,   // its header is no header: nothing that comes after can be trusted
};
/// Checks `call.header` against what was received and the opcode: `received` bytes in all, of which `args` (all that
/// lies between the header and the data) is set already, as are data_size and room_size. Pure.
CallFault check_call(const Call& call, uint64_t received);

}  // namespace gantry::fuse
