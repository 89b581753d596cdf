// BlkDevice and BlkService: configuration, and single requests in any layout of memory.

#include <catch2/catch.hpp>
#include <cstring>
#include <random>

#include "exports/virtio/blk_request.h"
#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::virtio;

namespace {

constexpr uint64_t kDisk = 1 << 20;

/// Memory of a request, cut up as a driver might.
struct Parts {
    explicit Parts(size_t size, std::mt19937* random = nullptr) : bytes(size) {
        for (size_t at = 0; at < size;) {
            const size_t n = random ? 1 + (*random)() % std::min<size_t>(size - at, 700) : size;
            list.push_back({bytes.data() + at, n});
            at += n;
        }
    }
    std::vector<std::byte> bytes;
    std::vector<iovec> list;
};

template <class T>
void append(std::vector<std::byte>& to, T value) {
    const auto* p = reinterpret_cast<const std::byte*>(&value);
    to.insert(to.end(), p, p + sizeof value);
}

struct Answer {
    BlkStatus status{};
    uint32_t written = 0;
    std::vector<std::byte> data;  // of the writable part, without the status
    const char* fault = nullptr;
};

struct Fixture : test::GraphFixture {
    explicit Fixture(BlkShape shape = {.serial = "serial", .writable = true}, const std::string& more = "")
        : device(std::move(shape), kDisk), service(device) {
        const std::string error = add(
            "{'driver': 'memory', 'node-name': 'n', 'discard': 'unmap', 'size': " + std::to_string(kDisk) + more + "}");
        if (!error.empty()) throw std::runtime_error(error);
        root = attach("n", device.shape().writable ? writer() : reader());
        channel = run(root->channel(runtime.io_loop(0)));
        device.choose_features(device.features() & ~kRingPacked);
    }
    ~Fixture() { detach(std::move(root)); }

    static Task<void> serve(const BlkService* service, BlkRequest* request, block::Channel* channel) {
        if (!service->try_answer(*request, *channel)) co_await service->answer(*request, *channel);
    }

    /// One request: `readable` after the header, and room for `room` bytes and the status.
    Answer ask(uint32_t type, uint64_t sector, std::vector<std::byte> readable, size_t room,
               std::mt19937* random = nullptr) {
        std::vector<std::byte> out;
        append(out, type);
        append(out, uint32_t{0});
        append(out, sector);
        out.insert(out.end(), readable.begin(), readable.end());
        return ask_raw(out, room + 1, random);
    }
    Answer ask_raw(const std::vector<std::byte>& out, size_t writable, std::mt19937* random = nullptr) {
        Parts from(out.size(), random), to(writable, random);
        if (!out.empty()) std::memcpy(from.bytes.data(), out.data(), out.size());
        std::fill(to.bytes.begin(), to.bytes.end(), std::byte{0xee});
        BlkRequest request;
        request.chain.parts = from.list;
        request.chain.parts.insert(request.chain.parts.end(), to.list.begin(), to.list.end());
        request.chain.readable = static_cast<uint32_t>(from.list.size());
        request.chain.readable_bytes = out.size();
        request.chain.writable_bytes = writable;
        Answer answer;
        answer.fault = service.begin(request);
        if (answer.fault) return answer;
        runtime.run_on_io(serve(&service, &request, channel), 0);
        BlkService::write_status(request);
        answer.status = static_cast<BlkStatus>(to.bytes.back());
        answer.written = request.written;
        to.bytes.pop_back();
        answer.data = to.bytes;
        return answer;
    }
    Answer read(uint64_t sector, size_t bytes, std::mt19937* random = nullptr) {
        return ask(0, sector, {}, bytes, random);
    }
    Answer write(uint64_t sector, std::vector<std::byte> data, std::mt19937* random = nullptr) {
        return ask(1, sector, std::move(data), 0, random);
    }
    struct Range {
        uint64_t sector;
        uint32_t sectors, flags;
    };
    Answer ranges(uint32_t type, const std::vector<Range>& list) {
        std::vector<std::byte> data;
        for (const Range& r : list) append(data, r);
        return ask(type, 0, std::move(data), 0);
    }
    uint64_t count(test::MemoryDisk::Op op) { return static_cast<test::MemoryNode&>(node("n")).disk().count(op); }

    BlkDevice device;
    BlkService service;
    std::unique_ptr<block::Root> root;
    block::Channel* channel = nullptr;
};

std::vector<std::byte> pattern(size_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::byte> data(size);
    for (auto& b : data) b = static_cast<std::byte>(random());
    return data;
}

using Op = test::MemoryDisk::Op;

}  // namespace

TEST_CASE("virtio-blk: reads and writes in any layout of descriptors", "[virtio]") {
    Fixture f;
    std::mt19937 random(7);
    std::vector<std::byte> model(kDisk);
    for (int i = 0; i < 300; ++i) {
        const uint64_t sectors = 1 + random() % 40, sector = random() % (kDisk / 512 - sectors + 1);
        if (random() % 2) {
            const auto data = pattern(sectors * 512, random());
            const Answer a = f.write(sector, data, &random);
            REQUIRE(a.status == BlkStatus::kOk);
            CHECK(a.written == 1);
            std::memcpy(model.data() + sector * 512, data.data(), data.size());
        } else {
            const Answer a = f.read(sector, sectors * 512, &random);
            REQUIRE(a.status == BlkStatus::kOk);
            CHECK(a.written == sectors * 512 + 1);
            CHECK(std::memcmp(a.data.data(), model.data() + sector * 512, sectors * 512) == 0);
        }
    }
}

TEST_CASE("virtio-blk: what does not lie on the disk in whole blocks", "[virtio]") {
    for (const uint32_t block : {512U, 4096U}) {
        Fixture f({.block_size = block, .writable = true});
        const uint64_t sectors = kDisk / 512;
        const auto bad = [&](uint64_t sector, size_t bytes) {
            const Answer r = f.read(sector, bytes), w = f.write(sector, std::vector<std::byte>(bytes));
            CHECK(r.written == 1);
            return r.status == BlkStatus::kIoError && w.status == BlkStatus::kIoError;
        };
        CHECK(bad(sectors, block));
        CHECK(bad(sectors - block / 512, 2 * block));
        CHECK(bad(UINT64_MAX, block));
        CHECK(bad(UINT64_MAX / 512, block));
        CHECK(bad(UINT64_MAX / 512 + 1, block));
        CHECK(bad(0, block - 1));
        CHECK(bad(0, block + 1));
        if (block > 512) CHECK(bad(1, block));
        if (block > 512) CHECK(bad(0, 512));
        CHECK(f.read(sectors - block / 512, block).status == BlkStatus::kOk);
        CHECK(f.read(0, 0).status == BlkStatus::kOk);
        CHECK(f.write(sectors, {}).status == BlkStatus::kOk);
        CHECK(f.count(Op::kWrite) == 0);
    }
}

TEST_CASE("virtio-blk: requests without header or status", "[virtio]") {
    Fixture f;
    CHECK(f.ask_raw(std::vector<std::byte>(15), 1).fault != nullptr);
    CHECK(f.ask_raw({}, 1).fault != nullptr);
    CHECK(f.ask_raw(std::vector<std::byte>(16), 0).fault != nullptr);
    CHECK(f.ask_raw(std::vector<std::byte>(16), 1).fault == nullptr);
}

TEST_CASE("virtio-blk: types that are not served", "[virtio]") {
    Fixture f;
    for (const uint32_t type : {2U, 3U, 5U, 10U, 14U, 15U, 26U, 0x80000000U, 0x80000001U, 0xffffffffU}) {
        const Answer a = f.ask(type, 0, std::vector<std::byte>(512), 512);
        CHECK(a.status == BlkStatus::kUnsupported);
        CHECK(a.written == 1);
        CHECK(a.data == std::vector<std::byte>(512, std::byte{0xee}));
    }
    CHECK(f.count(Op::kWrite) == 0);
}

TEST_CASE("virtio-blk: the serial number", "[virtio]") {
    const auto text = [](const Answer& a) {
        return std::string(reinterpret_cast<const char*>(a.data.data()), a.written - 1);
    };
    Fixture f;
    CHECK(text(f.ask(8, 0, {}, 20)) == std::string("serial") + std::string(14, '\0'));
    CHECK(text(f.ask(8, 0, {}, 3)) == "ser");
    CHECK(text(f.ask(8, 0, {}, 512)).size() == 20);
    CHECK(f.ask(8, 0, {}, 0).status == BlkStatus::kOk);
    Fixture g({.serial = "12345678901234567890", .writable = false});
    CHECK(text(g.ask(8, 0, {}, 20)) == "12345678901234567890");
}

TEST_CASE("virtio-blk: a disk that is only read", "[virtio]") {
    Fixture f({.writable = false});
    CHECK(f.device.features() & kBlkReadOnly);
    CHECK_FALSE(f.device.features() & (kBlkDiscard | kBlkWriteZeroes));
    CHECK(f.read(0, 4096).status == BlkStatus::kOk);
    CHECK(f.write(0, std::vector<std::byte>(512)).status == BlkStatus::kIoError);
    CHECK(f.ranges(11, {{0, 8, 0}}).status == BlkStatus::kIoError);
    CHECK(f.ranges(13, {{0, 8, 0}}).status == BlkStatus::kIoError);
    CHECK(f.ask(4, 0, {}, 0).status == BlkStatus::kOk);
}

TEST_CASE("virtio-blk: discarding and zeroing ranges", "[virtio]") {
    Fixture f({.block_size = 4096, .writable = true});
    const uint64_t sectors = kDisk / 512;
    REQUIRE(f.write(0, pattern(65536, 1)).status == BlkStatus::kOk);
    CHECK(f.ranges(13, {{8, 8, 0}, {24, 16, 1}}).status == BlkStatus::kOk);
    const Answer all = f.read(0, 65536);
    auto expected = pattern(65536, 1);
    std::fill_n(expected.begin() + 4096, 4096, std::byte{0});
    std::fill_n(expected.begin() + 12288, 8192, std::byte{0});
    CHECK(all.data == expected);
    CHECK(f.ranges(11, {{0, 8, 0}}).status == BlkStatus::kOk);
    CHECK(f.count(Op::kDiscard) == 1);
    // Nothing of a list is done when one of it cannot be.
    const uint64_t zeroed = f.count(Op::kZeroes), discarded = f.count(Op::kDiscard);
    for (const uint32_t type : {11U, 13U}) {
        CHECK(f.ranges(type, {{0, 8, 0}, {sectors, 8, 0}}).status == BlkStatus::kIoError);
        CHECK(f.ranges(type, {{0, 8, 0}, {sectors - 8, 16, 0}}).status == BlkStatus::kIoError);
        CHECK(f.ranges(type, {{0, 8, 0}, {UINT64_MAX, 8, 0}}).status == BlkStatus::kIoError);
        CHECK(f.ranges(type, {{0, 8, 0}, {1, 8, 0}}).status == BlkStatus::kIoError);
        CHECK(f.ranges(type, {{0, 8, 0}, {0, 7, 0}}).status == BlkStatus::kIoError);
        CHECK(f.ranges(type, {{0, 8, 0}, {0, BlkDevice::kMaxDiscardSectors + 8, 0}}).status == BlkStatus::kIoError);
        CHECK(f.ranges(type, {{0, 8, 0}, {0, 8, 2}}).status == BlkStatus::kUnsupported);
        CHECK(f.ranges(type, std::vector<Fixture::Range>(17, {0, 8, 0})).status == BlkStatus::kIoError);
        CHECK(f.ranges(type, {}).status == BlkStatus::kIoError);
        CHECK(f.ask(type, 0, std::vector<std::byte>(15), 0).status == BlkStatus::kIoError);
    }
    CHECK(f.ranges(11, {{0, 8, 1}}).status == BlkStatus::kUnsupported);
    CHECK(f.count(Op::kZeroes) == zeroed);
    CHECK(f.count(Op::kDiscard) == discarded);
    CHECK(f.ranges(11, {{0, 0, 0}}).status == BlkStatus::kOk);
    CHECK(f.ranges(13, std::vector<Fixture::Range>(16, {0, 8, 0})).status == BlkStatus::kOk);
}

TEST_CASE("virtio-blk: without a write cache every write is flushed", "[virtio]") {
    Fixture f({.writable = true}, ", 'no-inline': true");
    const auto block = pattern(4096, 2);
    REQUIRE(f.write(0, block).status == BlkStatus::kOk);
    CHECK(f.count(Op::kFlush) == 0);
    CHECK(f.ask(4, 0, {}, 0).status == BlkStatus::kOk);
    CHECK(f.count(Op::kFlush) == 1);
    const std::byte off{0}, on{1}, strange{2};
    CHECK(f.device.write_config(32, {&off, 1}));
    CHECK(f.device.config()[32] == off);
    REQUIRE(f.write(0, block).status == BlkStatus::kOk);
    CHECK(f.count(Op::kFlush) == 2);
    CHECK(f.ranges(13, {{0, 8, 0}}).status == BlkStatus::kOk);
    CHECK(f.count(Op::kFlush) == 3);
    CHECK(f.device.write_config(32, {&on, 1}));
    REQUIRE(f.write(0, block).status == BlkStatus::kOk);
    CHECK(f.count(Op::kFlush) == 3);
    CHECK_FALSE(f.device.write_config(32, {&strange, 1}));
    CHECK_FALSE(f.device.write_config(0, {&on, 1}));
    // A driver that cannot flush.
    f.device.choose_features(kVersion1);
    REQUIRE(f.write(0, block).status == BlkStatus::kOk);
    CHECK(f.count(Op::kFlush) == 4);
    CHECK_FALSE(f.device.write_config(32, {&on, 1}));
    f.device.choose_features(0);
    CHECK(f.device.write_cache());
}

TEST_CASE("virtio-blk: errors of the node are the driver's", "[virtio]") {
    Fixture f;
    static_cast<test::MemoryNode&>(f.node("n")).disk().set_fault([](Op, uint64_t, uint64_t) { return EIO; });
    CHECK(f.read(0, 512).status == BlkStatus::kIoError);
    CHECK(f.read(0, 512).written == 1);
    CHECK(f.write(0, std::vector<std::byte>(512)).status == BlkStatus::kIoError);
    CHECK(f.ask(4, 0, {}, 0).status == BlkStatus::kIoError);
    CHECK(f.ranges(11, {{0, 8, 0}}).status == BlkStatus::kIoError);
    CHECK(f.ranges(13, {{0, 8, 0}}).status == BlkStatus::kIoError);
}

TEST_CASE("virtio-blk: the configuration space", "[virtio]") {
    BlkDevice device({.block_size = 1024,
                      .queues = 3,
                      .queue_size = 128,
                      .writable = true,
                      .physical_block_size = 4096,
                      .optimal_io_size = 65536},
                     kDisk + 1023);
    const auto field = [&]<class T>(size_t offset, T) {
        const auto config = device.config();
        T value;
        std::memcpy(&value, config.data() + offset, sizeof value);
        return value;
    };
    CHECK(field(0, uint64_t{}) == kDisk / 512);
    CHECK(field(12, uint32_t{}) == 126);
    CHECK(field(20, uint32_t{}) == 1024);
    CHECK(field(24, uint8_t{}) == 2);
    CHECK(field(26, uint16_t{}) == 4);
    CHECK(field(28, uint32_t{}) == 64);
    CHECK(field(32, uint8_t{}) == 1);
    CHECK(field(34, uint16_t{}) == 3);
    CHECK(field(36, uint32_t{}) == BlkDevice::kMaxDiscardSectors);
    CHECK(field(40, uint32_t{}) == BlkDevice::kMaxDiscardSegments);
    CHECK(field(44, uint32_t{}) == 2);
    CHECK(field(56, uint8_t{}) == 1);
    device.set_size(4096);
    CHECK(field(0, uint64_t{}) == 8);
}

TEST_CASE("virtio-blk: features a driver may choose", "[virtio]") {
    const BlkDevice device({.writable = true}, kDisk);
    CHECK(device.check_features(device.features()));
    CHECK(device.check_features(kVersion1));
    CHECK(device.check_features(0));
    CHECK_FALSE(device.check_features(kBlkFlush));
    CHECK_FALSE(device.check_features(kVersion1 | bit(26)));
    CHECK(device.check_features(kVersion1 | bit(26), bit(26)));
    CHECK_FALSE(device.check_features(kVersion1 | kBlkReadOnly));
}
