// The file as its clients see it: attributes, opening, reading, writing, growing.

#include <catch2/catch.hpp>

#include <fmt/format.h>
#include <sys/stat.h>

#include "tests/support/fuse_service.h"
#include "tests/support/node_io.h"
#include "tests/support/shell.h"
#include "tests/support/temp_dir.h"

using namespace gantry;
using namespace gantry::fuse;
using namespace gantry::test;

namespace {

const std::string kMemory = "{'driver':'memory','node-name':'n','size':10001,'disk':'fuse'}";

struct Fixture : FuseServiceFixture {
    explicit Fixture(ServiceOptions options = {.writable = true}, const std::string& node = kMemory,
                     bool writethrough = false) {
        MemoryDisk::forget("fuse");
        disk = MemoryDisk::named("fuse");
        open({node}, std::move(options), writethrough);
    }
    int64_t mtime() { return service->attributes().mtime_ns(); }
    std::shared_ptr<MemoryDisk> disk;
};

}  // namespace

TEST_CASE("fuse service: reads end where the file does", "[fuse][io]") {
    Fixture f({}, GENERATE(as<std::string>(), kMemory,
                           "{'driver':'memory','node-name':'n','size':10001,'disk':'fuse','no-inline':true}",
                           "{'driver':'memory','node-name':'n','size':10240,'disk':'fuse','request-alignment':512,"
                           "'memory-alignment':512}"));
    const uint64_t size = f.disk->size();
    const Bytes data = pattern(size, 3);
    f.disk->write(0, data.data(), data.size());
    const auto [offset, length] = GENERATE(table<uint64_t, uint32_t>({
        {0, 0},
        {0, 1},
        {0, 4096},
        {1, 1},
        {511, 2},
        {512, 512},
        {4095, 4097},
        {9999, 2},
        {10000, 1},
        {10000, 4096},
        {10001, 1},
        {10001, 4096},
        {10002, 1},
        {20000, 65536},
        {0, 1 << 20},
        {INT64_MAX, 4096},
        {INT64_MAX - 1, 1},
    }));
    CAPTURE(offset, length, size);
    const Bytes expected(data.begin() + static_cast<ptrdiff_t>(std::min(offset, size)),
                         data.begin() + static_cast<ptrdiff_t>(std::min(offset + length, size)));
    CHECK(f.read(offset, length).data() == expected);
}

TEST_CASE("fuse service: a read larger than its room, or at no offset, is refused", "[fuse][io]") {
    Fixture f;
    CHECK(f.read(0, 4097, 4096).error() == EINVAL);
    CHECK(f.read(0, UINT32_MAX, 4096).error() == EINVAL);
    CHECK(f.read(uint64_t{1} << 63, 1).error() == EINVAL);
    CHECK(f.read(UINT64_MAX, 1).error() == EINVAL);
    CHECK(f.read(0, 4096, 4096).data().size() == 4096);
}

TEST_CASE("fuse service: what the page cache can answer is answered at once", "[fuse][io]") {
    Fixture f;
    CHECK(f.read(0, 4096).at_once);
    CHECK(f.read(20000, 4096).at_once);
    CHECK(f.write(5, Bytes(100, 1)).at_once);
    CHECK(f.ask(Opcode::kGetattr, GetattrIn{}).at_once);
    CHECK(f.ask(Opcode::kStatfs).at_once);
    CHECK(f.open_file(O_RDWR).at_once);
    CHECK_FALSE(f.ask(Opcode::kFsync, FsyncIn{}).at_once);
}

TEST_CASE("fuse service: writes change their bytes and no other", "[fuse][io]") {
    Fixture f({.writable = true},
              GENERATE(as<std::string>(), kMemory,
                       "{'driver':'memory','node-name':'n','size':10001,'disk':'fuse','no-inline':true}",
                       "{'driver':'memory','node-name':'n','size':10240,'disk':'fuse','request-alignment':512,"
                       "'memory-alignment':512}"));
    const uint64_t size = f.disk->size();
    Bytes model = pattern(size, 3);
    f.disk->write(0, model.data(), model.size());
    const auto [offset, length] = GENERATE(table<uint64_t, uint32_t>(
        {{0, 1}, {1, 1}, {511, 2}, {512, 512}, {4095, 4097}, {0, 10001}, {10000, 1}, {3, 9}}));
    CAPTURE(offset, length);
    const Bytes data = pattern(length, 99);
    CHECK(f.write(offset, data).out<WriteOut>().size == length);
    std::copy(data.begin(), data.end(), model.begin() + static_cast<ptrdiff_t>(offset));
    CHECK(f.disk->bytes(0, size) == model);
    CHECK(f.resizes == 0);
}

TEST_CASE("fuse service: writes beyond the end of a file that does not grow", "[fuse][io]") {
    Fixture f;
    SECTION("are short at the end") {
        CHECK(f.write(9990, Bytes(100, 7)).out<WriteOut>().size == 11);
        CHECK(f.disk->bytes(9990, 11) == Bytes(11, 7));
    }
    SECTION("fail behind it") {
        const uint64_t offset = GENERATE(10001u, 10002u, 1u << 30);
        CHECK(f.write(offset, Bytes(1, 7)).error() == ENOSPC);
    }
    SECTION("of no byte are no matter") { CHECK(f.write(20000, {}).out<WriteOut>().size == 0); }
    SECTION("beyond all files are too large") {
        CHECK(f.write(INT64_MAX, Bytes(1)).error() == EFBIG);
        CHECK(f.write(UINT64_MAX, Bytes(1)).error() == EFBIG);
    }
    CHECK(f.disk->size() == 10001);
    CHECK(f.resizes == 0);
}

TEST_CASE("fuse service: a growing file grows by what is written", "[fuse][io]") {
    Fixture f({.writable = true, .growable = true});
    Bytes model = pattern(10001, 3);
    f.disk->write(0, model.data(), model.size());
    SECTION("across the end") {
        CHECK(f.write(9990, Bytes(100, 7)).out<WriteOut>().size == 100);
        model.resize(9990);
        model.resize(10090, 7);
    }
    SECTION("with a gap of zeroes") {
        CHECK(f.write(20003, Bytes(5, 7)).out<WriteOut>().size == 5);
        model.resize(20003);
        model.resize(20008, 7);
    }
    SECTION("not by writing nothing") { CHECK(f.write(20003, {}).out<WriteOut>().size == 0); }
    SECTION("not by pages of a mapping that come late") {
        CHECK(f.write(9990, Bytes(100, 7), 1).out<WriteOut>().size == 100);
        CHECK(f.write(12288, Bytes(4096, 7), 1).out<WriteOut>().size == 4096);
        std::fill(model.begin() + 9990, model.end(), 7);
    }
    SECTION("as far as its node can") {
        CHECK(f.write(MemoryDisk::kCapacity, Bytes(1, 7)).error() == ENOSPC);
        // What fits is written.
        CHECK(f.write(0, Bytes(4, 1)).out<WriteOut>().size == 4);
        std::fill_n(model.begin(), 4, 1);
    }
    CHECK(f.attr().size == model.size());
    CHECK(f.disk->bytes(0, f.disk->size()) == model);
}

TEST_CASE("fuse service: a node that cannot grow takes what fits", "[fuse][io]") {
    FuseServiceFixture f;
    f.open({"{'driver':'null-co','node-name':'n','size':8192}"}, {.writable = true, .growable = true});
    CHECK(f.write(8000, Bytes(400, 7)).out<WriteOut>().size == 192);
    CHECK(f.write(8192, Bytes(1, 7)).error() == EOPNOTSUPP);
}

TEST_CASE("fuse service: a file that is read only", "[fuse][io]") {
    Fixture f(ServiceOptions{});
    CHECK(f.write(0, Bytes(1)).error() == EACCES);
    CHECK(f.truncate(5).error() == EACCES);
    CHECK(f.truncate(10001).error() == EACCES);
    CHECK(f.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1).error() == EACCES);
    CHECK(f.fallocate(0, 0, 1).error() == EACCES);
    CHECK(f.open_file(O_WRONLY).error() == EROFS);
    CHECK(f.open_file(O_RDWR | O_TRUNC).error() == EROFS);
    CHECK(f.service->open_files() == 0);
    CHECK(f.open_file(O_RDONLY).error() == 0);
    CHECK(f.attr().mode == (S_IFREG | 0400));
    CHECK(f.set(kSetMode, {.mode = 0600}).error() == EROFS);
    CHECK(f.set(kSetMode, {.mode = 0400}).error() == 0);
    CHECK(f.set(kSetMode, {.mode = 0}).error() == 0);
    CHECK(f.attr().mode == S_IFREG);
    CHECK(f.ask(Opcode::kFsync, FsyncIn{}).error() == 0);
}

TEST_CASE("fuse service: how a file is opened", "[fuse]") {
    const uint32_t direct = kOpenDirectIo | kOpenParallelDirectWrites;
    const auto [options, flags, backing, expected] = GENERATE_COPY(table<ServiceOptions, uint32_t, int32_t, uint32_t>({
        {{.writable = true}, O_RDWR, 0, direct},
        {{.writable = true}, O_WRONLY | O_APPEND, 0, direct},
        {{.writable = true}, O_RDONLY, 0, direct | kOpenNoFlush},
        {{}, O_RDONLY, 0, direct | kOpenNoFlush},
        {{.cached = true}, O_RDONLY, 0, kOpenKeepCache | kOpenNoFlush},
        {{.writable = true}, O_RDWR, 7, kOpenPassthrough},
        {{.writable = true}, O_RDONLY, 7, kOpenPassthrough | kOpenNoFlush},
    }));
    Fixture f(options);
    f.service->set_backing(backing);
    const OpenOut out = f.open_file(flags).out<OpenOut>();
    CHECK(out.open_flags == expected);
    CHECK(out.backing_id == backing);
}

TEST_CASE("fuse service: open files are counted", "[fuse]") {
    Fixture f;
    CHECK(f.service->open_files() == 0);
    for (int i = 0; i < 3; ++i) CHECK(f.open_file(O_RDWR).error() == 0);
    CHECK(f.service->open_files() == 3);
    for (int i = 0; i < 3; ++i) CHECK(f.ask(Opcode::kRelease, ReleaseIn{}).error() == 0);
    CHECK(f.service->open_files() == 0);
    CHECK(f.ask(Opcode::kRelease, ReleaseIn{}).error() == 0);
    CHECK(f.service->open_files() == 0);
    f.service->adopt_open_files(5);
    f.ask(Opcode::kRelease, ReleaseIn{});
    CHECK(f.service->open_files() == 4);
}

TEST_CASE("fuse service: opening with O_TRUNC", "[fuse]") {
    const bool honour = GENERATE(false, true);
    Fixture f({.writable = true, .honour_o_trunc = honour});
    f.write(0, Bytes(4, 1));
    CHECK(f.open_file(O_WRONLY | O_TRUNC).out<OpenOut>().open_flags == (kOpenDirectIo | kOpenParallelDirectWrites));
    CHECK(f.attr().size == (honour ? 0u : 10001u));
    CHECK(f.service->open_files() == 1);
}

TEST_CASE("fuse service: a refused truncation opens nothing", "[fuse]") {
    FuseServiceFixture f;
    f.open({"{'driver':'null-co','node-name':'n','size':8192}"}, {.writable = true, .honour_o_trunc = true});
    CHECK(f.open_file(O_WRONLY | O_TRUNC).error() == EOPNOTSUPP);
    CHECK(f.service->open_files() == 0);
}

TEST_CASE("fuse service: which attributes can be set", "[fuse]") {
    const bool others = GENERATE(false, true);
    Fixture f({.writable = true, .allow_other = others, .uid = 5, .gid = 6});
    SECTION("times are those of the data") {
        const int64_t mtime = f.mtime();
        const uint32_t valid = GENERATE(as<uint32_t>(), kSetAtime, kSetMtime, kSetCtime, kSetAtime | kSetAtimeNow,
                                        kSetMtime | kSetMtimeNow | kSetFh | kSetLockOwner | kSetKillSuidgid);
        CHECK(f.set(valid, {.atime = 1, .mtime = 1, .ctime = 1}).out<AttrOut>().attr.mtime ==
              static_cast<uint64_t>(mtime / 1'000'000'000));
        CHECK(f.mtime() == mtime);
    }
    SECTION("the mode") {
        const auto [mode, error] = GENERATE_COPY(table<uint32_t, int>({
            {0600, 0},
            {0400, 0},
            {0, 0},
            {0700, 0},
            {S_IFREG | 0600, 0},
            {S_IFDIR | 07600, 0},
            {0640, others ? 0 : EPERM},
            {0604, others ? 0 : EPERM},
            {0777, others ? 0 : EPERM},
        }));
        const FuseRequest r = f.set(kSetMode, {.mode = mode});
        CHECK(r.error() == error);
        if (error == 0) CHECK(r.out<AttrOut>().attr.mode == (S_IFREG | (mode & 07777)));
        CHECK(f.attr().mode == (S_IFREG | (error ? 0600 : mode & 07777)));
    }
    SECTION("the owner") {
        const uint32_t valid = GENERATE(as<uint32_t>(), kSetUid, kSetGid, kSetUid | kSetGid);
        const FuseRequest r = f.set(valid, {.uid = 100, .gid = 200});
        CHECK(r.error() == (others ? 0 : EOPNOTSUPP));
        CHECK(f.attr().uid == (others && (valid & kSetUid) ? 100u : 5u));
        CHECK(f.attr().gid == (others && (valid & kSetGid) ? 200u : 6u));
    }
    SECTION("nothing that is not known") {
        const uint32_t valid = GENERATE(as<uint32_t>(), 0x1000u, 0x80000000u, 0x1000u | kSetSize);
        CHECK(f.set(valid, {.size = 1}).error() == EOPNOTSUPP);
        CHECK(f.attr().size == 10001);
    }
    SECTION("all or nothing") {
        CHECK(f.set(kSetSize | kSetMode | kSetUid, {.size = uint64_t{1} << 63, .mode = 0400, .uid = 1}).error() ==
              (others ? EFBIG : EOPNOTSUPP));
        // The node refuses the size.
        CHECK(f.set(kSetSize | kSetMode, {.size = MemoryDisk::kCapacity + 1, .mode = 0400}).error() == ENOSPC);
        CHECK(f.attr().mode == (S_IFREG | 0600));
        CHECK(f.attr().size == 10001);
    }
}

TEST_CASE("fuse service: truncation", "[fuse]") {
    Fixture f({.writable = true});
    const Bytes model = pattern(10001, 3);
    f.disk->write(0, model.data(), model.size());
    const uint64_t size = GENERATE(0u, 1u, 511u, 5000u, 10000u, 10001u, 10002u, 30001u);
    const int64_t mtime = f.mtime();
    CHECK(f.truncate(size).out<AttrOut>().attr.size == size);
    CHECK(f.mtime() > mtime);
    Bytes expected(model.begin(), model.begin() + static_cast<ptrdiff_t>(std::min<uint64_t>(size, model.size())));
    expected.resize(size);
    CHECK(f.read(0, 1 << 20).data() == expected);
    // What was cut off does not come back.
    CHECK(f.truncate(40000).error() == 0);
    expected.resize(40000);
    CHECK(f.read(0, 1 << 20).data() == expected);
}

TEST_CASE("fuse service: a truncation that the graph refuses", "[fuse]") {
    SECTION("the driver cannot") {
        FuseServiceFixture f;
        f.open({"{'driver':'null-co','node-name':'n','size':8192}"}, {.writable = true});
        CHECK(f.truncate(0).error() == EOPNOTSUPP);
        CHECK(f.truncate(8192).error() == 0);
    }
    SECTION("somebody forbids it") {
        Fixture f;
        block::RootOptions other = GraphFixture::reader("a job");
        auto root = f.attach("n", other);
        CHECK(f.truncate(0).error() == EPERM);
        CHECK(f.attr().size == 10001);
        f.detach(std::move(root));
    }
}

TEST_CASE("fuse service: mtime changes when data does", "[fuse]") {
    Fixture f({.writable = true, .growable = true});
    int64_t last = f.mtime();
    const auto unchanged = [&] {
        const bool same = f.mtime() == last;
        last = f.mtime();
        return same;
    };
    f.read(0, 4096);
    f.open_file(O_RDWR);
    f.ask(Opcode::kFsync, FsyncIn{});
    f.set(kSetMode, {.mode = 0400});
    f.set(kSetMtime | kSetAtime);
    f.seek(0, SEEK_HOLE);
    f.attr();
    CHECK(unchanged());
    // The clock of writes ticks every few milliseconds.
    const auto deadline = Clock::now() + std::chrono::seconds(10);
    while (f.mtime() == last && Clock::now() < deadline) REQUIRE(f.write(0, Bytes(1)).error() == 0);
    CHECK_FALSE(unchanged());
    CHECK_FALSE(f.truncate(5000).error());
    CHECK_FALSE(unchanged());
    CHECK(f.write(9999, Bytes(10)).error() == 0);
    CHECK_FALSE(unchanged());
    f.run(f.graph->resize(f.node("n"), 4096));
    CHECK_FALSE(unchanged());
}

TEST_CASE("fuse service: what was written before the mount was written then", "[fuse]") {
    const TempDir dir;
    const std::string path = dir.file("image");
    REQUIRE(shell("qemu-img create -q -f qcow2 " + path + " 1M").status == 0);
    const timespec then[2] = {{1234567890, 987654321}, {1234567890, 987654321}};
    REQUIRE(::utimensat(AT_FDCWD, path.c_str(), then, 0) == 0);
    FuseServiceFixture f;
    f.open({fmt::format("{{'driver':'qcow2','node-name':'n','read-only':true,'file':{{'driver':'file',"
                        "'filename':'{}','read-only':true}}}}",
                        path)},
           {});
    const auto written = f.run(last_written_ns(f.node("n").shared_from_this()));
    REQUIRE(written);
    f.service->attributes().set_mtime(*written);
    const Attr a = f.attr();
    CHECK(a.mtime == 1234567890);
    CHECK(a.mtime_nsec == 987654321);
    CHECK(a.ctime > 1234567890);
    f.service->touched();
    CHECK(f.attr().mtime > 1234567890);
    REQUIRE(f.add("{'driver':'null-co','node-name':'nothing','size':512}") == "");
    CHECK_FALSE(f.run(last_written_ns(f.node("nothing").shared_from_this())));
}

TEST_CASE("fuse service: what a process before this one has written is flushed at the next close", "[fuse]") {
    const bool writable = GENERATE(false, true);
    Fixture f({.writable = writable});
    f.service->adopt_open_files(1);
    const auto flushes = [&] { return f.disk->count(MemoryDisk::Op::kFlush); };
    const uint64_t before = flushes();
    for (int i = 0; i < 2; ++i) CHECK(f.ask(Opcode::kFlush, FlushIn{}).error() == 0);
    CHECK(flushes() == before + writable);
}

TEST_CASE("fuse service: flushes", "[fuse]") {
    const bool writethrough = GENERATE(false, true);
    Fixture f({.writable = true}, kMemory, writethrough);
    const auto flushes = [&] { return f.disk->count(MemoryDisk::Op::kFlush); };
    const auto flush = [&] { return f.ask(Opcode::kFlush, FlushIn{}); };
    CHECK(flush().at_once);
    CHECK(flushes() == 0);
    CHECK(f.write(0, Bytes(512)).error() == 0);
    // Acknowledged means stable then.
    CHECK(flushes() == (writethrough ? 1u : 0u));
    const uint64_t before = flushes();
    CHECK(flush().error() == 0);
    CHECK(flushes() == before + 1);
    CHECK(flush().at_once);
    CHECK(flushes() == before + 1);
    // fsync asks every time: others may have written.
    for (const uint32_t flags : {0u, 1u}) CHECK(f.ask(Opcode::kFsync, FsyncIn{.fsync_flags = flags}).error() == 0);
    CHECK(flushes() == before + 3);
    f.fallocate(FALLOC_FL_ZERO_RANGE, 0, 512);
    CHECK_FALSE(flush().at_once);
    f.truncate(100);
    CHECK_FALSE(flush().at_once);
}

TEST_CASE("fuse service: a synchronous write is stable when it is answered", "[fuse]") {
    Fixture f({.writable = true, .growable = true});
    const auto flushes = [&] { return f.disk->count(MemoryDisk::Op::kFlush); };
    const auto write = [&](uint64_t offset, uint32_t open_flags) {
        const WriteIn in{.offset = offset, .size = 512, .flags = open_flags};
        return f.ask(FuseRequest(Opcode::kWrite, in, Bytes(512)));
    };
    uint64_t before = flushes();
    CHECK(write(0, O_RDWR).error() == 0);
    CHECK(flushes() == before);
    for (const uint32_t flags : {O_RDWR | O_DSYNC, O_WRONLY | O_SYNC, O_RDWR | O_SYNC | O_DIRECT}) {
        for (const uint64_t offset : {uint64_t{0}, uint64_t{7}, f.attr().size, f.attr().size + 100}) {
            INFO("flags " << flags << ", offset " << offset);
            CHECK(write(offset, flags).error() == 0);
            CHECK(flushes() > before);
            before = flushes();
        }
    }
    f.disk->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kFlush ? EIO : 0; });
    CHECK(write(0, O_DSYNC).error() == EIO);
    f.disk->set_fault(nullptr);
}

TEST_CASE("fuse service: a failed flush is told, and tried again by the next close", "[fuse]") {
    Fixture f({.writable = true});
    f.write(0, Bytes(512));
    f.disk->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kFlush ? EIO : 0; });
    CHECK(f.ask(Opcode::kFlush, FlushIn{}).error() == EIO);
    const FuseRequest again = f.ask(Opcode::kFlush, FlushIn{});
    CHECK_FALSE(again.at_once);
    CHECK(again.error() == EIO);
    CHECK(f.ask(Opcode::kFsync, FsyncIn{}).error() == EIO);
    f.disk->set_fault(nullptr);
}

TEST_CASE("fuse service: failures of the medium in words of the kernel", "[fuse]") {
    const auto [error, told] = GENERATE(table<int, int>({
        {EIO, EIO},
        {ENOSPC, ENOSPC},
        {EDQUOT, EDQUOT},
        {ENOMEM, ENOMEM},
        {EROFS, EROFS},
        {ENOSYS, EOPNOTSUPP},
        {ENODEV, EIO},
        {ESHUTDOWN, EIO},
        {524, EIO},
        {512, EIO},
        {EAGAIN, EIO},
        {ENOTCONN, EIO},
        {EOPNOTSUPP, EOPNOTSUPP},
        {ENOTTY, EOPNOTSUPP},
    }));
    CAPTURE(error);
    Fixture f;
    f.disk->set_fault([error](MemoryDisk::Op, uint64_t, uint64_t) { return error; });
    CHECK(f.read(0, 1).error() == told);
    CHECK(f.write(0, Bytes(1)).error() == told);
    f.disk->set_fault(nullptr);
}

TEST_CASE("fuse service: operations that a single file has no use for", "[fuse]") {
    Fixture f;
    const auto [opcode, error] = GENERATE(table<uint32_t, int>({
        {20000, ENOSYS}, {0, ENOSYS},  {39, ENOTTY}, {38, 0},      {21, ENOSYS},
        {22, ENOSYS},    {23, ENOSYS}, {24, ENOSYS},                              // extended attributes
        {31, ENOSYS},    {32, ENOSYS}, {33, ENOSYS},                              // locks
        {34, ENOSYS},    {37, ENOSYS}, {40, ENOSYS}, {47, ENOSYS}, {50, ENOSYS},  // access, bmap, poll, copy, syncfs
        {51, ENOSYS},    {52, ENOSYS}, {53, ENOSYS}, {26, ENOSYS}, {9, ENOSYS},
        {10, ENOSYS},    {12, ENOSYS}, {28, ENOSYS},  // names
    }));
    CAPTURE(opcode);
    const FuseRequest r = f.ask(static_cast<Opcode>(opcode), uint64_t{0});
    CHECK(r.error() == error);
    CHECK(r.at_once);
    CHECK(r.call.reply_size == 0);
    CHECK_FALSE(r.call.silent);
    CHECK(f.ask(Opcode::kLookup, uint64_t{0}).error() == ENOENT);
    for (const Opcode quiet : {Opcode::kForget, Opcode::kBatchForget, Opcode::kInterrupt, Opcode::kNotifyReply})
        CHECK(f.ask(quiet, uint64_t{0}).call.silent);
}

TEST_CASE("fuse service: the size of the file system", "[fuse]") {
    Fixture f;
    const StatfsOut out = f.ask(Opcode::kStatfs).out<StatfsOut>();
    CHECK(out.bsize == 4096);
    CHECK(out.frsize == 4096);
    CHECK(out.blocks == 2);
    CHECK(out.bfree == 0);
    CHECK(out.bavail == 0);
    CHECK(out.namelen == 255);
}

TEST_CASE("fuse service: sizes changed by others show at once", "[fuse]") {
    Fixture f;
    f.open_file(O_RDWR);
    REQUIRE(f.run(f.graph->resize(f.node("n"), 20000)));
    CHECK(f.attr().size == 20000);
    CHECK(f.write(19999, Bytes(1, 9)).out<WriteOut>().size == 1);
    CHECK(f.read(19990, 4096).data().size() == 10);
    REQUIRE(f.run(f.graph->resize(f.node("n"), 100)));
    CHECK(f.attr().size == 100);
    CHECK(f.read(99, 10).data().size() == 1);
    CHECK(f.read(100, 10).data().empty());
    CHECK(f.write(100, Bytes(1)).error() == ENOSPC);
}

TEST_CASE("fuse service: st_blocks comes from the image", "[fuse]") {
    Fixture f;
    auto asked = std::make_shared<std::atomic<int>>(0);
    auto bytes = std::make_shared<std::atomic<int64_t>>(4096);
    ServiceOptions options{.writable = true};
    options.allocated = [&f, asked, bytes]() -> Task<std::optional<uint64_t>> {
        CHECK(f.runtime.main_loop().in_loop());
        ++*asked;
        return [](int64_t n) -> Task<std::optional<uint64_t>> {
            if (n < 0) co_return std::nullopt;
            co_return static_cast<uint64_t>(n);
        }(*bytes);
    };
    f.service = std::make_unique<FileService>(f.runtime.main_loop(), std::move(options));
    CHECK(f.attr().blocks == 8);
    CHECK(*asked == 1);
    // Kept for a while, but not when something was written.
    *bytes = 12288;
    f.write(0, Bytes(1));
    CHECK(f.run(wait_until([&] { return f.service->attributes().allocation_stale(); })));
    CHECK(f.attr().blocks == 24);
    CHECK(f.attr().blocks == 24);
    CHECK(*asked == 2);
    *bytes = -1;
    f.write(0, Bytes(1));
    CHECK(f.run(wait_until([&] { return f.service->attributes().allocation_stale(); })));
    CHECK(f.attr().blocks == 20);
}

TEST_CASE("fuse service: in passthrough the file behind tells its times and blocks", "[fuse]") {
    Fixture f;
    f.service->set_backing(3, f.disk->fd());
    const iovec one{const_cast<char*>("x"), 1};
    struct stat st;
    REQUIRE(::pwritev(f.disk->fd(), &one, 1, 0) == 1);
    REQUIRE(::fstat(f.disk->fd(), &st) == 0);
    const Attr a = f.attr();
    CHECK(a.size == 10001);
    CHECK(a.blocks == static_cast<uint64_t>(st.st_blocks));
    CHECK(a.mtime == static_cast<uint64_t>(st.st_mtim.tv_sec));
    CHECK(a.mtime_nsec == static_cast<uint32_t>(st.st_mtim.tv_nsec));
    f.service->set_backing(0);
    CHECK(f.open_file(O_RDWR).out<OpenOut>().backing_id == 0);
}
