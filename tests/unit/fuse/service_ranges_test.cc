// Ranges: fallocate and the search for data and holes.

#include <catch2/catch.hpp>

#include <fmt/format.h>
#include <sys/stat.h>

#include <random>

#include "tests/support/fuse_service.h"
#include "tests/support/node_io.h"
#include "tests/support/shell.h"
#include "tests/support/temp_dir.h"

using namespace gantry;
using namespace gantry::fuse;
using namespace gantry::test;

namespace {

constexpr uint32_t kKeep = FALLOC_FL_KEEP_SIZE;
constexpr uint32_t kPunch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
constexpr uint32_t kZero = FALLOC_FL_ZERO_RANGE;
constexpr uint64_t kSize = 3 << 20;

/// Over a disk in memory, filled with a pattern.
struct Fixture : FuseServiceFixture {
    explicit Fixture(ServiceOptions options, const std::string& limits = "") {
        MemoryDisk::forget("fuse");
        disk = MemoryDisk::named("fuse");
        model = pattern(kSize, 5);
        disk->write(0, model.data(), model.size());
        open({fmt::format("{{'driver':'memory','node-name':'n','disk':'fuse','discard':'unmap'{}}}", limits)},
             std::move(options));
    }
    void zero(uint64_t offset, uint64_t length) {
        if (model.size() < offset + length) model.resize(offset + length);
        std::fill_n(model.begin() + static_cast<ptrdiff_t>(offset), length, 0);
    }
    bool same() const { return disk->size() == model.size() && disk->bytes(0, model.size()) == model; }
    std::shared_ptr<MemoryDisk> disk;
    Bytes model;
};

/// A sparse file under the file driver, or in a qcow2 image.
struct SparseFixture : FuseServiceFixture {
    void open_raw(const Bytes& bytes, uint64_t size) {
        const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
        REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(size)) == 0);
        REQUIRE(::pwrite(fd.get(), bytes.data(), bytes.size(), 1 << 20) == static_cast<ssize_t>(bytes.size()));
        open({fmt::format("{{'driver':'file','node-name':'n','filename':'{}','discard':'unmap'}}", path)},
             {.writable = true, .growable = true});
    }
    void open_qcow2(uint64_t size) {
        REQUIRE(shell(fmt::format("qemu-img create -q -f qcow2 {} {}", path, size)).status == 0);
        open({fmt::format("{{'driver':'qcow2','node-name':'n','discard':'unmap','file':{{'driver':'file',"
                          "'filename':'{}','discard':'unmap'}}}}",
                          path)},
             {.writable = true, .growable = true});
    }
    uint64_t stored() const {
        struct stat st{};
        REQUIRE(::stat(path.c_str(), &st) == 0);
        return static_cast<uint64_t>(st.st_blocks) * 512;
    }
    TempDir dir;
    std::string path = dir.file("image");
};

}  // namespace

TEST_CASE("fuse ranges: which modes there are", "[fuse][ranges]") {
    Fixture f({.writable = true});
    const auto [mode, error] = GENERATE(table<uint32_t, int>({
        {kPunch, 0},
        {kZero, 0},
        {kZero | kKeep, 0},
        {0, EOPNOTSUPP},
        {kKeep, EOPNOTSUPP},
        {FALLOC_FL_PUNCH_HOLE, EOPNOTSUPP},
        {kPunch | kZero, EOPNOTSUPP},
        {FALLOC_FL_COLLAPSE_RANGE, EOPNOTSUPP},
        {FALLOC_FL_INSERT_RANGE, EOPNOTSUPP},
        {FALLOC_FL_UNSHARE_RANGE, EOPNOTSUPP},
        {0x80000000, EOPNOTSUPP},
    }));
    CAPTURE(mode);
    CHECK(f.fallocate(mode, 1001, 5000).error() == error);
    if (error == 0) f.zero(1001, 5000);
    CHECK(f.same());
}

TEST_CASE("fuse ranges: offsets that no file has", "[fuse][ranges]") {
    Fixture f({.writable = true, .growable = true});
    const uint32_t mode = GENERATE(as<uint32_t>(), 0u, kKeep, kPunch, kZero, kZero | kKeep);
    CHECK(f.fallocate(mode, INT64_MAX, 1).error() == EFBIG);
    CHECK(f.fallocate(mode, UINT64_MAX, 1).error() == EFBIG);
    CHECK(f.fallocate(mode, 1, INT64_MAX).error() == EFBIG);
    CHECK(f.fallocate(mode, 1, UINT64_MAX).error() == EFBIG);
    CHECK(f.fallocate(mode, 0, 0).error() == EINVAL);
    CHECK(f.same());
}

TEST_CASE("fuse ranges: holes and zeroes within the file", "[fuse][ranges]") {
    const std::string limits = GENERATE(as<std::string>(), "", ",'request-alignment':512,'memory-alignment':512",
                                        ",'request-alignment':4096,'zeroes-alignment':65536");
    const uint32_t mode = GENERATE(as<uint32_t>(), kPunch, kZero | kKeep, kZero);
    Fixture f({.writable = true}, limits);
    const auto [offset, length] = GENERATE(table<uint64_t, uint64_t>({
        {0, kSize},
        {0, 1},
        {kSize - 1, 1},
        {511, 2},
        {4096, 4096},
        {65536, 65536},
        {65535, 65538},
        {1, kSize - 2},
    }));
    CAPTURE(limits, mode, offset, length);
    CHECK(f.fallocate(mode, offset, length).error() == 0);
    f.zero(offset, length);
    CHECK(f.same());
}

TEST_CASE("fuse ranges: beyond the end", "[fuse][ranges]") {
    const bool growable = GENERATE(false, true);
    Fixture f({.writable = true, .growable = growable});
    SECTION("holes end with the file") {
        CHECK(f.fallocate(kPunch, kSize - 10, 100).error() == 0);
        f.zero(kSize - 10, 10);
        CHECK(f.fallocate(kPunch, kSize, 100).error() == 0);
        CHECK(f.fallocate(kPunch, kSize + 1000, 100).error() == 0);
    }
    SECTION("zeroes that keep the size, too") {
        CHECK(f.fallocate(kZero | kKeep, kSize - 10, 100).error() == 0);
        f.zero(kSize - 10, 10);
        CHECK(f.fallocate(kZero | kKeep, kSize, 100).error() == 0);
    }
    SECTION("other zeroes make it longer where it may be") {
        CHECK(f.fallocate(kZero, kSize - 10, 1001).error() == (growable ? 0 : ENOSPC));
        if (growable) f.zero(kSize - 10, 1001);
        CHECK(f.fallocate(kZero, f.model.size() + 777, 5).error() == (growable ? 0 : ENOSPC));
        if (growable) f.zero(f.model.size() + 777, 5);
    }
    SECTION("preallocation makes it longer where it may be") {
        CHECK(f.fallocate(0, kSize, 1001).error() == (growable ? 0 : ENOSPC));
        if (growable) f.zero(kSize, 1001);
        CHECK(f.fallocate(0, f.model.size() - 1, 2).error() == EOPNOTSUPP);
        CHECK(f.fallocate(kKeep, f.model.size(), 100).error() == EOPNOTSUPP);
        CHECK(f.fallocate(0, MemoryDisk::kCapacity, 1).error() == ENOSPC);
    }
    CHECK(f.same());
}

TEST_CASE("fuse ranges: a node without zeroes writes them, but makes no long hole", "[fuse][ranges]") {
    Fixture f({.writable = true}, ",'no-zeroes':true");
    CHECK(f.fallocate(kPunch, 0, kSize).error() == EOPNOTSUPP);
    CHECK(f.same());
    CHECK(f.fallocate(kPunch, 1000, 5000).error() == 0);
    f.zero(1000, 5000);
    CHECK(f.fallocate(kZero, 100'000, 2'000'000).error() == 0);
    f.zero(100'000, 2'000'000);
    CHECK(f.same());
}

TEST_CASE("fuse ranges: what the medium says of zeroes is told", "[fuse][ranges]") {
    Fixture f({.writable = true});
    f.disk->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kZeroes ? EIO : 0; });
    CHECK(f.fallocate(kPunch, 0, 4096).error() == EIO);
    CHECK(f.fallocate(kZero, 0, 4096).error() == EIO);
    f.disk->set_fault(nullptr);
}

TEST_CASE("fuse ranges: long zeroing goes in steps that an interrupt ends", "[fuse][ranges]") {
    FuseServiceFixture f;
    f.open({"{'driver':'null-co','node-name':'n','size':1099511627776}"}, {.writable = true});
    CHECK(f.fallocate(kZero, 1, (uint64_t{1} << 40) - 1).error() == 0);
    f.service->hurry();
    CHECK(f.fallocate(kZero, 1, (uint64_t{1} << 40) - 1).error() == EINTR);
    CHECK(f.fallocate(kZero, 0, 4096).error() == 0);
}

namespace {

/// Sends INTERRUPT for `unique` when a request waits in the node; then lets it go.
Task<void> interrupt_at_gate(MemoryDisk* disk, FileService* service, block::Channel* channel, uint64_t unique) {
    const bool there = co_await wait_until([&] { return disk->at_gate() == 1; });
    CHECK(there);
    FuseRequest interrupt(Opcode::kInterrupt, unique);
    co_await FuseRequest::answer(&interrupt, service, channel);
    CHECK(interrupt.call.silent);
    disk->open_gate();
}

Task<void> ask_and_interrupt(FuseRequest* request, FileService* service, block::Channel* channel, MemoryDisk* disk,
                             uint64_t unique) {
    TaskScope scope;
    scope.spawn(interrupt_at_gate(disk, service, channel, unique));
    co_await FuseRequest::answer(request, service, channel);
    co_await scope.join();
}

}  // namespace

TEST_CASE("fuse ranges: INTERRUPT ends the call it names and no other", "[fuse][ranges]") {
    FuseServiceFixture f;
    MemoryDisk::forget("fuse");
    auto disk = MemoryDisk::named("fuse");
    // Several steps; the first one waits at the gate.
    f.open({"{'driver':'memory','node-name':'n','disk':'fuse','size':1073741824}"}, {.writable = true});
    const auto [named, error] = GENERATE(table<uint64_t, int>({{2, EINTR}, {2 | kResent, EINTR}, {4, 0}}));
    disk->close_gate();
    FuseRequest request(Opcode::kFallocate, FallocateIn{.length = uint64_t{1} << 30, .mode = kZero});
    f.runtime.run_on_io(ask_and_interrupt(&request, f.service.get(), f.channels[0], disk.get(), named));
    CHECK(request.error() == error);
}

TEST_CASE("fuse ranges: holes of a raw file and of a qcow2 image give space back", "[fuse][ranges]") {
    SparseFixture f;
    const bool qcow2 = GENERATE(false, true);
    if (qcow2) {
        f.open_qcow2(8 << 20);
    } else {
        f.open_raw(Bytes(1), 8 << 20);
    }
    const Bytes data = pattern(4 << 20, 1);
    for (uint64_t at = 0; at < data.size(); at += 1 << 20)
        CHECK(f.write(at, Bytes(data.begin() + static_cast<ptrdiff_t>(at),
                                data.begin() + static_cast<ptrdiff_t>(at + (1 << 20))))
                  .error() == 0);
    CHECK(f.ask(Opcode::kFsync, FsyncIn{}).error() == 0);
    const uint64_t before = f.stored();
    CHECK(before >= 4 << 20);
    // At odd places, as fstrim over a loop device never does.
    CHECK(f.fallocate(kPunch, 4097, (3 << 20) + 1).error() == 0);
    CHECK(f.ask(Opcode::kFsync, FsyncIn{}).error() == 0);
    CHECK(f.stored() < before - (2 << 20));
    Bytes expected = data;
    std::fill_n(expected.begin() + 4097, (3 << 20) + 1, 0);
    for (uint64_t at = 0; at < expected.size(); at += 1 << 20)
        CHECK(f.read(at, 1 << 20).data() == Bytes(expected.begin() + static_cast<ptrdiff_t>(at),
                                                  expected.begin() + static_cast<ptrdiff_t>(at + (1 << 20))));
    CHECK(f.seek(131072, SEEK_DATA) >= 3 << 20);
}

TEST_CASE("fuse ranges: data and holes are where the file system has them", "[fuse][ranges]") {
    SparseFixture f;
    const uint64_t size = (8 << 20) + 777;
    f.open_raw(Bytes(1 << 20, 7), size);
    const UniqueFd fd(::open(f.path.c_str(), O_RDONLY | O_CLOEXEC));
    for (const uint64_t offset : {uint64_t{0}, uint64_t{1}, uint64_t{4096}, uint64_t{(1 << 20) - 1}, uint64_t{1 << 20},
                                  uint64_t{(1 << 20) + 1}, uint64_t{(2 << 20) - 1}, uint64_t{2 << 20},
                                  uint64_t{(2 << 20) + 1}, size - 1, size, size + 1, uint64_t{1} << 40}) {
        for (const int whence : {SEEK_DATA, SEEK_HOLE}) {
            const off_t native = ::lseek(fd.get(), static_cast<off_t>(offset), whence);
            CAPTURE(offset, whence);
            CHECK(f.seek(offset, static_cast<uint32_t>(whence)) == (native < 0 ? -errno : native));
        }
    }
    CHECK(f.seek(0, SEEK_SET) == -EINVAL);
    CHECK(f.seek(0, SEEK_END) == -EINVAL);
    CHECK(f.seek(0, 5) == -EINVAL);
    CHECK(f.seek(UINT64_MAX, SEEK_DATA) == -ENXIO);
}

TEST_CASE("fuse ranges: data and holes of a qcow2 image", "[fuse][ranges]") {
    SparseFixture f;
    f.open_qcow2(uint64_t{1} << 40);
    CHECK(f.seek(0, SEEK_DATA) == -ENXIO);
    CHECK(f.seek(0, SEEK_HOLE) == 0);
    // More parts than one step looks at.
    for (uint64_t i = 0; i < 300; ++i) REQUIRE(f.write(i * 131072, Bytes(512, 1)).error() == 0);
    const uint64_t far = (uint64_t{1} << 39) + 5;
    REQUIRE(f.write(far, Bytes(1, 1)).error() == 0);
    CHECK(f.seek(0, SEEK_DATA) == 0);
    CHECK(f.seek(1, SEEK_HOLE) == 65536);
    CHECK(f.seek(65536, SEEK_DATA) == 131072);
    CHECK(f.seek(300 * 131072, SEEK_DATA) == static_cast<int64_t>(far & ~uint64_t{65535}));
    CHECK(f.seek(far, SEEK_HOLE) == static_cast<int64_t>((far & ~uint64_t{65535}) + 65536));
    CHECK(f.seek(far + 65536, SEEK_DATA) == -ENXIO);
    CHECK(f.seek(far + 65536, SEEK_HOLE) == static_cast<int64_t>(far + 65536));
    CHECK(f.fallocate(kPunch, 0, uint64_t{1} << 40).error() == 0);
    CHECK(f.seek(0, SEEK_DATA) == -ENXIO);
}

TEST_CASE("fuse ranges: a file that is all data ends in a hole of no length", "[fuse][ranges]") {
    Fixture f({.writable = true});
    CHECK(f.seek(0, SEEK_DATA) == 0);
    CHECK(f.seek(5, SEEK_DATA) == 5);
    CHECK(f.seek(5, SEEK_HOLE) == kSize);
    CHECK(f.seek(kSize, SEEK_HOLE) == -ENXIO);
    CHECK(f.seek(kSize, SEEK_DATA) == -ENXIO);
}

TEST_CASE("fuse ranges: growth of a qcow2 image goes by sectors", "[fuse][ranges]") {
    SparseFixture f;
    f.open_qcow2(65536);
    CHECK(f.write(65536 + 100, Bytes(10, 9)).out<WriteOut>().size == 10);
    CHECK(f.attr().size == 65536 + 512);
    Bytes expected(512);
    std::fill_n(expected.begin() + 100, 10, 9);
    CHECK(f.read(65536, 4096).data() == expected);
    CHECK(f.truncate(1000).error() == EINVAL);
    CHECK(f.truncate(1024).error() == 0);
    CHECK(f.attr().size == 1024);
}
