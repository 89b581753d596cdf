// Requests that do not fit together.

#include <catch2/catch.hpp>

#include <tuple>

#include "fuse/call.h"

using namespace gantry::fuse;

namespace {

/// A request as a transport shows it to check_call().
struct Shown {
    std::vector<uint8_t> args;
    Call call;
    explicit Shown(Opcode opcode, size_t args_size, uint32_t data_size = 0) : args(args_size) {
        call.header.opcode = static_cast<uint32_t>(opcode);
        call.header.nodeid = kRootNode;
        call.header.len = static_cast<uint32_t>(sizeof(InHeader) + args_size + data_size);
        call.args = args;
        call.room_size = 1 << 20;
        call.data_size = data_size;
    }
    void set_size(uint32_t size) {
        const WriteIn in{.size = size};
        std::memcpy(args.data(), &in, sizeof in);
    }
    CallFault check() const { return check_call(call, call.header.len); }
};

}  // namespace

TEST_CASE("fuse check: each operation needs its own struct whole", "[fuse][once]") {
    const auto [opcode, size] = GENERATE(table<Opcode, size_t>({
        {Opcode::kLookup, 1},         {Opcode::kForget, 8},        {Opcode::kGetattr, 16},
        {Opcode::kSetattr, 88},       {Opcode::kOpen, 8},          {Opcode::kRead, 40},
        {Opcode::kStatfs, 0},         {Opcode::kRelease, 24},      {Opcode::kFsync, 16},
        {Opcode::kFlush, 24},         {Opcode::kInit, 8},          {Opcode::kInterrupt, 8},
        {Opcode::kBatchForget, 8},    {Opcode::kIoctl, 0},         {Opcode::kFallocate, 32},
        {Opcode::kLseek, 24},         {Opcode::kSetxattr, 0},      {Opcode::kStatx, 0},
        {static_cast<Opcode>(53), 0}, {static_cast<Opcode>(0), 0}, {static_cast<Opcode>(0xffffffff), 0},
    }));
    CAPTURE(static_cast<uint32_t>(opcode), size);
    CHECK(Shown(opcode, size).check() == CallFault::kNone);
    CHECK(Shown(opcode, size + 8).check() == CallFault::kNone);
    if (size) CHECK(Shown(opcode, size - 1).check() == CallFault::kRefused);
    if (size) CHECK(Shown(opcode, 0).check() == CallFault::kRefused);
}

TEST_CASE("fuse check: the header's length is what was received", "[fuse][once]") {
    const Shown good(Opcode::kGetattr, 16);
    const uint64_t whole = good.call.header.len;
    CHECK(check_call(good.call, whole) == CallFault::kNone);
    CHECK(check_call(good.call, whole - 1) == CallFault::kBroken);
    CHECK(check_call(good.call, whole + 1) == CallFault::kBroken);
    CHECK(check_call(good.call, 0) == CallFault::kBroken);
    Shown tiny(Opcode::kStatfs, 0);
    tiny.call.header.len = 39;
    CHECK(check_call(tiny.call, 39) == CallFault::kBroken);
    tiny.call.header.len = 0xffffffff;
    CHECK(check_call(tiny.call, 40) == CallFault::kBroken);
    CHECK(check_call(tiny.call, 0xffffffff) == CallFault::kRefused);
}

TEST_CASE("fuse check: a WRITE brings as much data as it says", "[fuse][once]") {
    Shown write(Opcode::kWrite, 40, 4096);
    write.set_size(4096);
    CHECK(write.check() == CallFault::kNone);
    for (const uint32_t size : {0u, 4095u, 4097u, 0xffffffffu}) {
        write.set_size(size);
        CHECK(write.check() == CallFault::kRefused);
    }
    Shown empty(Opcode::kWrite, 40);
    CHECK(empty.check() == CallFault::kNone);
    // Data among the arguments is not where it belongs.
    Shown misplaced(Opcode::kWrite, 48);
    misplaced.set_size(8);
    CHECK(misplaced.check() == CallFault::kRefused);
    Shown too_much(Opcode::kWrite, 40, 4096);
    too_much.set_size(4096);
    too_much.call.room_size = 4095;
    CHECK(too_much.check() == CallFault::kRefused);
}

TEST_CASE("fuse check: extensions are part of the length", "[fuse][once]") {
    Shown getattr(Opcode::kGetattr, 16 + 16);
    getattr.call.header.total_extlen = 2;
    CHECK(getattr.check() == CallFault::kNone);
    getattr.call.header.total_extlen = 3;
    CHECK(getattr.check() == CallFault::kRefused);
    getattr.call.header.total_extlen = 0xffff;
    CHECK(getattr.check() == CallFault::kRefused);
    Shown write(Opcode::kWrite, 40, 100 + 8);
    write.set_size(100);
    CHECK(write.check() == CallFault::kRefused);
    write.call.header.total_extlen = 1;
    CHECK(write.check() == CallFault::kNone);
}

TEST_CASE("fuse check: there is one node", "[fuse][once]") {
    const auto [opcode, any_node] = GENERATE(table<Opcode, bool>({
        {Opcode::kGetattr, false},
        {Opcode::kRead, false},
        {Opcode::kOpen, false},
        {Opcode::kStatfs, false},
        {Opcode::kIoctl, false},
        {Opcode::kInit, true},
        {Opcode::kForget, true},
        {Opcode::kInterrupt, true},
        {Opcode::kDestroy, true},
        {Opcode::kBatchForget, true},
        {Opcode::kNotifyReply, true},
    }));
    CAPTURE(static_cast<uint32_t>(opcode));
    for (const uint64_t node : {uint64_t{0}, uint64_t{2}, UINT64_MAX}) {
        Shown shown(opcode, 40);
        shown.call.header.nodeid = node;
        CHECK(shown.check() == (any_node ? CallFault::kNone : CallFault::kRefused));
    }
}

TEST_CASE("fuse check: long names and values are nobody's fault", "[fuse][once]") {
    CHECK(Shown(Opcode::kSetxattr, 216, 65536).check() == CallFault::kNone);
    CHECK(Shown(Opcode::kLookup, 216, 40).check() == CallFault::kNone);
    // The parts must still add up.
    Shown odd(Opcode::kSetxattr, 216, 65536);
    odd.call.data_size = 65535;
    CHECK(odd.check() == CallFault::kRefused);
}
