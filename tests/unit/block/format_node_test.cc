#include <catch2/catch.hpp>

#include "block/align.h"
#include "tests/support/block_format.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/node_io.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;

namespace {

constexpr uint64_t kKiB = 1024;
constexpr uint64_t kBlock = BlockFormat::kBlock;

/// A "blocks" image named "img" in a memory disk, perhaps with a backing image.
struct FormatFixture : GraphFixture {
    explicit FormatFixture(uint64_t size = 1 << 20, uint64_t key = 0, std::string options = "",
                           uint64_t backing_size = 0)
        : GraphFixture(nullptr, {kBlockFormatDriver}) {
        MemoryDisk::forget("img");
        MemoryDisk::forget("base");
        disk = MemoryDisk::named("img");
        base = MemoryDisk::named("base");
        BlockFormat::create(*disk, size, 8 << 20, key);
        more = std::move(options);
        if (backing_size) {
            base->resize(backing_size);
            const Bytes old = pattern(backing_size, 200);
            base->write(0, old.data(), old.size());
            more += ",'backing':{'driver':'memory','disk':'base'}";
        }
        open();
    }
    void open() {
        REQUIRE(add("{'driver':'blocks','node-name':'img','discard':'unmap','file':{'driver':'memory','disk':'img',"
                    "'growable':true,'node-name':'disk'}" +
                    more + "}") == "");
        img = dynamic_cast<BlockFormat*>(&node("img"));
        REQUIRE(img != nullptr);
    }
    void reopen_image() {
        REQUIRE(remove("img") == "");
        open();
    }
    void write(uint64_t offset, const Bytes& data, WriteFlags flags = WriteFlags::kNone) {
        REQUIRE(error_of(run(node_write(img, offset, data, flags))) == "");
    }
    Bytes read(uint64_t offset, size_t length) {
        auto got = run(node_read(img, offset, length));
        REQUIRE(got.has_value());
        return std::move(*got);
    }
    BlockStatus status(uint64_t offset, uint64_t length) {
        auto got = run(node_status(img, offset, length));
        REQUIRE(got.has_value());
        return *got;
    }
    Bytes base_bytes(uint64_t offset, size_t length) { return base->bytes(offset, length); }
    std::string check() {
        REQUIRE(run(node_flush(img)).has_value());
        return BlockFormat::check(*disk);
    }
    uint64_t writes() { return disk->count(MemoryDisk::Op::kWrite); }

    std::shared_ptr<MemoryDisk> disk, base;
    BlockFormat* img = nullptr;
    std::string more;
};

Bytes joined(std::initializer_list<Bytes> parts) {
    Bytes all;
    for (const Bytes& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
}

}  // namespace

TEST_CASE("format node: a partial write of new sub-blocks fills their edges", "[block][format]") {
    const uint64_t key = GENERATE(0, 77);
    FormatFixture f(1 << 20, key, "", 300 * kKiB);
    const Bytes data = pattern(10000, 3);
    f.write(100000, data);
    CHECK(f.read(100000, 10000) == data);
    // Around it the backing file shows, and beyond its end zeroes.
    CHECK(f.read(90000, 10000) == f.base_bytes(90000, 10000));
    CHECK(f.read(110000, 10000) == f.base_bytes(110000, 10000));
    CHECK(f.read(299 * kKiB, 2 * kKiB) == joined({f.base_bytes(299 * kKiB, kKiB), Bytes(kKiB)}));
    // Across the end of the backing file.
    f.write(300 * kKiB - 10, pattern(20, 9));
    CHECK(f.read(298 * kKiB, 4 * kKiB) ==
          joined({f.base_bytes(298 * kKiB, 2 * kKiB - 10), pattern(20, 9), Bytes(2 * kKiB - 10)}));
    CHECK(f.check() == "");
    f.reopen_image();
    CHECK(f.read(100000, 10000) == data);
}

TEST_CASE("format node: adjacent edges and data are one write", "[block][format]") {
    FormatFixture f(1 << 20, 0, "", 1 << 20);
    const uint64_t before = f.writes();
    f.write(100, pattern(100, 1));
    CHECK(f.writes() == before + 1);
    CHECK(f.read(0, 8192) == joined({f.base_bytes(0, 100), pattern(100, 1), f.base_bytes(200, 7992)}));
    // In place afterwards: only the bytes themselves, and no plan.
    const uint64_t plans = f.img->plans();
    f.write(150, pattern(10, 5));
    CHECK(f.writes() == before + 2);
    CHECK(f.img->plans() == plans);
}

TEST_CASE("format node: edges that read as zeroes are not written to a fresh place", "[block][format]") {
    FormatFixture f;
    f.write(5000, pattern(100, 1));
    CHECK(f.disk->size() == BlockFormat::Header{1 << 20, 128, 0}.data_offset() + 5100);
    CHECK(f.read(4096, 4096) == joined({Bytes(904), pattern(100, 1), Bytes(3092)}));
}

TEST_CASE("format node: a used place gets zero edges written", "[block][format]") {
    FormatFixture f;
    f.write(0, Bytes(kBlock, 0xff));
    REQUIRE(f.run(node_discard(f.img, 0, kBlock)).has_value());
    REQUIRE(f.run(node_flush(f.img)).has_value());
    CHECK(f.img->free_blocks() == 1);
    f.write(300 * kKiB + 10, Bytes(10, 0x11));
    CHECK(f.img->free_blocks() == 0);
    CHECK(f.read(300 * kKiB, 4096) == joined({Bytes(10), Bytes(10, 0x11), Bytes(4076)}));
    CHECK(f.check() == "");
}

TEST_CASE("format node: a write into a shared block moves it and leaves the old one alone", "[block][format]") {
    const uint64_t key = GENERATE(0, 99);
    FormatFixture f(1 << 20, key);
    const Bytes old = pattern(2 * kBlock, 1);
    f.write(0, old);
    REQUIRE(f.run(f.img->share_all()).has_value());
    const Bytes before = f.disk->bytes(0, f.disk->size());
    f.write(kBlock - 5000, pattern(10000, 77));
    Bytes expected = old;
    const Bytes fresh = pattern(10000, 77);
    std::copy(fresh.begin(), fresh.end(), expected.begin() + kBlock - 5000);
    CHECK(f.read(0, 2 * kBlock) == expected);
    // What the snapshot holds is untouched, and the copies are encoded for their new place.
    const Bytes after = f.disk->bytes(0, before.size());
    CHECK(std::equal(before.begin() + 2 * kBlock, before.end(), after.begin() + 2 * kBlock));
    CHECK(f.check() == "");
    f.reopen_image();
    CHECK(f.read(0, 2 * kBlock) == expected);
}

TEST_CASE("format node: with a transform the file never holds what the guest wrote", "[block][format]") {
    FormatFixture f(1 << 20, 1234);
    f.write(0, Bytes(kBlock, 'A'));
    f.write(2 * kBlock + 10, Bytes(100, 'A'));
    const Bytes all = f.disk->bytes(0, f.disk->size());
    const std::string needle(16, 'A');
    CHECK(std::search(all.begin(), all.end(), needle.begin(), needle.end()) == all.end());
    CHECK(f.read(2 * kBlock, 4096) == joined({Bytes(10), Bytes(100, 'A'), Bytes(3986)}));
    CHECK_FALSE(f.status(0, kBlock).has_offset);
    CHECK(f.status(0, kBlock).encrypted);
}

TEST_CASE("format node: encoded blocks are read, and decoded to a new place by a write", "[block][format]") {
    FormatFixture f;
    Bytes model = joined({Bytes(30000, 1), Bytes(kBlock - 30000, 2), Bytes(kBlock, 3)});
    f.write(0, model, WriteFlags::kCompressed);
    CHECK(f.read(0, 2 * kBlock) == model);
    CHECK(f.read(29990, 20) == joined({Bytes(10, 1), Bytes(10, 2)}));
    const BlockStatus status = f.status(0, 2 * kBlock);
    CHECK(status.compressed);
    CHECK(status.data);
    CHECK_FALSE(status.has_offset);
    CHECK(status.length == 2 * kBlock);
    f.write(40000, pattern(50, 8));
    const Bytes part = pattern(50, 8);
    std::copy(part.begin(), part.end(), model.begin() + 40000);
    CHECK(f.read(0, 2 * kBlock) == model);
    // What does not get smaller, and parts of blocks, are written plainly.
    const Bytes noise = pattern(kBlock, 5);
    f.write(4 * kBlock, noise, WriteFlags::kCompressed);
    f.write(5 * kBlock + 7, Bytes(100, 9), WriteFlags::kCompressed);
    CHECK(f.read(4 * kBlock, kBlock) == noise);
    CHECK_FALSE(f.status(4 * kBlock, kBlock).compressed);
    CHECK(f.check() == "");
    // Zeroing a part of an encoded block writes data.
    REQUIRE(f.run(node_zero(f.img, kBlock + 4096, 4096)).has_value());
    std::fill_n(model.begin() + kBlock + 4096, 4096, 0);
    CHECK(f.read(0, 2 * kBlock) == model);
    f.reopen_image();
    CHECK(f.read(0, 2 * kBlock) == model);
}

TEST_CASE("format node: zeroes extend over what reads as zero already, else the edge is written", "[block][format]") {
    FormatFixture f;
    const uint64_t before = f.writes();
    REQUIRE(f.run(node_zero(f.img, 100, 100000)).has_value());
    CHECK(f.writes() == before);
    CHECK(f.status(0, 1 << 20).zero);
    CHECK(f.status(0, 102400).allocated);
    CHECK(f.status(0, 1 << 20).length == 102400);

    f.write(200 * kKiB, pattern(64 * kKiB, 4));
    Bytes model = pattern(64 * kKiB, 4);
    CHECK(f.run(node_zero(f.img, 200 * kKiB + 100, 20000, WriteFlags::kNoFallback)).error().kind() ==
          ErrorKind::kUnsupported);
    CHECK(f.read(200 * kKiB, 64 * kKiB) == model);
    REQUIRE(f.run(node_zero(f.img, 200 * kKiB + 100, 20000)).has_value());
    std::fill_n(model.begin() + 100, 20000, 0);
    CHECK(f.read(200 * kKiB, 64 * kKiB) == model);
    const BlockStatus inner = f.status(204 * kKiB, 60 * kKiB);
    CHECK(inner.zero);
    CHECK(inner.length == 12 * kKiB);
    CHECK(f.run(node_zero(f.img, 204 * kKiB, 8192, WriteFlags::kNoFallback)).has_value());
    CHECK(f.check() == "");
}

TEST_CASE("format node: discarded data never shows the backing file again", "[block][format]") {
    FormatFixture f(1 << 20, 0, "", 1 << 20);
    f.write(0, pattern(2 * kBlock, 1));
    REQUIRE(f.run(node_discard(f.img, 10, 2 * kBlock)).has_value());
    CHECK(f.read(0, 4096) == pattern(4096, 1));
    CHECK(f.read(4096, 2 * kBlock - 4096) == Bytes(2 * kBlock - 4096));
    CHECK(f.read(2 * kBlock, 4096) == f.base_bytes(2 * kBlock, 4096));
}

TEST_CASE("format node: block status tells kinds, depth and places", "[block][format]") {
    FormatFixture f(1 << 20, 0, "", 512 * kKiB);
    f.write(64 * kKiB, pattern(128 * kKiB, 1));
    const BlockStatus below = f.status(0, 1 << 20);
    CHECK(below.data);
    CHECK_FALSE(below.allocated);
    CHECK(below.depth == 2);
    CHECK(below.length == 64 * kKiB);
    const BlockStatus here = f.status(64 * kKiB, 1 << 19);
    CHECK(here.data);
    CHECK(here.allocated);
    CHECK(here.depth == 1);
    CHECK(here.length == 128 * kKiB);  // two blocks that lie behind each other
    CHECK(here.has_offset);
    CHECK(here.file == &f.node("disk"));
    CHECK(f.disk->bytes(here.host_offset, 100) == pattern(100, 1));
    const BlockStatus beyond = f.status(512 * kKiB, 512 * kKiB);
    CHECK(beyond.zero);
    CHECK_FALSE(beyond.data);
    CHECK_FALSE(beyond.allocated);
    CHECK(beyond.depth == 0);
    CHECK(beyond.length == 512 * kKiB);
    CHECK(beyond.eof);
}

TEST_CASE("format node: inline attempts answer where maps and children can", "[block][format]") {
    FormatFixture f(1 << 20, 0, "", 512 * kKiB);
    f.write(64 * kKiB, pattern(8 * kKiB, 1));
    auto attempt = [](BlockFormat* img, uint64_t offset, Bytes* data, bool write) -> Task<int> {
        Request rq = Request::internal();
        const iovec iov{data->data(), data->size()};
        if (write) co_return img->try_write(rq, offset, IoVec(iov), WriteFlags::kNone);
        co_return img->try_read(rq, offset, IoVec(iov));
    };
    Bytes data(16 * kKiB);
    CHECK(f.run(attempt(f.img, 60 * kKiB, &data, false)) == 0);
    CHECK(data == joined({f.base_bytes(60 * kKiB, 4 * kKiB), pattern(8 * kKiB, 1), f.base_bytes(72 * kKiB, 4 * kKiB)}));
    CHECK(f.run(attempt(f.img, 508 * kKiB, &data, false)) == 0);
    CHECK(data == joined({f.base_bytes(508 * kKiB, 4 * kKiB), Bytes(12 * kKiB)}));
    Bytes part = pattern(100, 7);
    CHECK(f.run(attempt(f.img, 65 * kKiB, &part, true)) == 0);
    CHECK(f.read(65 * kKiB, 100) == part);
    CHECK(f.run(attempt(f.img, 72 * kKiB - 50, &part, true)) == -EAGAIN);  // needs a new sub-block
    REQUIRE(f.run(f.img->share_all()).has_value());
    CHECK(f.run(attempt(f.img, 65 * kKiB, &part, true)) == -EAGAIN);  // must be copied
    f.disk->close_gate();
    CHECK(f.run(attempt(f.img, 64 * kKiB, &data, false)) == -EAGAIN);
    f.disk->open_gate();
}

TEST_CASE("format node: many writers of one unallocated block allocate it once", "[block][format]") {
    const uint64_t key = GENERATE(0, 5);
    FormatFixture f(1 << 20, key, "", 1 << 20);
    auto storm = [](FormatFixture* fixture) -> Task<void> {
        TaskScope scope;
        std::vector<Result<>> results;
        for (size_t i = 0; i < 128; i++) {
            Task<Result<>> one =
                node_write(fixture->img, 3 * kBlock + i * 512 + 7, Bytes(505, static_cast<uint8_t>(i)));
            scope.spawn(store(run_on(fixture->runtime.io_loop(i), std::move(one)), &results));
        }
        co_await scope.join();
        CHECK(std::ranges::all_of(results, [](const auto& r) { return r.has_value(); }));
    };
    f.run(storm(&f));
    Bytes expected = f.base_bytes(3 * kBlock, kBlock);
    for (size_t i = 0; i < 128; i++)
        std::fill_n(expected.begin() + static_cast<ptrdiff_t>(i * 512 + 7), 505, static_cast<uint8_t>(i));
    CHECK(f.read(3 * kBlock, kBlock) == expected);
    CHECK(f.disk->size() == BlockFormat::Header{1 << 20, 128, 0}.data_offset() + kBlock);
    CHECK(f.check() == "");
}

TEST_CASE("format node: parts of one read that lie apart are read at the same time", "[block][format]") {
    FormatFixture f;
    Bytes expected;
    for (uint64_t i = 12; i > 0; i--) {  // against the order of the disk: no two are neighbours
        const Bytes block = pattern(kBlock, static_cast<uint8_t>(i));
        f.write((i - 1) * kBlock, block);
        expected = joined({block, expected});
    }
    const auto one_read = [](FormatFixture* fixture, Result<Bytes>* result) -> Task<void> {
        *result = co_await node_read(fixture->img, 0, 12 * kBlock);
    };
    const auto at_once = [](FormatFixture* fixture, Task<void> read) -> Task<void> {
        TaskScope scope;
        fixture->disk->close_gate();
        scope.spawn(std::move(read));
        CHECK(co_await wait_until([fixture] { return fixture->disk->at_gate() == 8; }));  // no more than that
        fixture->disk->open_gate();
        co_await scope.join();
    };
    Result<Bytes> result;
    f.run(at_once(&f, one_read(&f, &result)));
    REQUIRE(result);
    CHECK(*result == expected);

    // One that fails fails the whole, after the others have ended.
    const uint64_t bad = f.status(5 * kBlock, 1).host_offset;
    f.disk->set_fault([bad](MemoryDisk::Op op, uint64_t offset, uint64_t) {
        return op == MemoryDisk::Op::kRead && offset == bad ? EIO : 0;
    });
    f.run(at_once(&f, one_read(&f, &result)));
    REQUIRE_FALSE(result);
    CHECK(result.error().kind() == ErrorKind::kIo);
}

TEST_CASE("format node: a failed write changes nothing and gives its place back", "[block][format][errors]") {
    const bool through = GENERATE(false, true);
    FormatFixture f(1 << 20, 0, through ? ",'write-through':true" : "", 1 << 20);
    f.write(0, pattern(4096, 1));
    SECTION("the data cannot be written") {
        f.disk->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kWrite ? EIO : 0; });
        CHECK(f.run(node_write(f.img, kBlock + 100, pattern(100, 1))).error().kind() == ErrorKind::kIo);
        f.disk->set_fault(nullptr);
        CHECK(f.img->free_blocks() == 1);
    }
    SECTION("the edge cannot be read") {
        f.base->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kRead ? EIO : 0; });
        CHECK_FALSE(f.run(node_write(f.img, kBlock + 100, pattern(100, 1))).has_value());
        f.base->set_fault(nullptr);
        CHECK(f.img->free_blocks() == 1);
    }
    SECTION("the table cannot be written") {
        f.disk->set_fault([](MemoryDisk::Op op, uint64_t offset, uint64_t) {
            return op == MemoryDisk::Op::kWrite && offset < 2 * kBlock ? ENOSPC : 0;
        });
        const Result<> written = f.run(node_write(f.img, kBlock + 100, pattern(100, 1)));
        CHECK(written.has_value() == !through);
        if (!through) {
            CHECK(f.run(node_flush(f.img)).error().kind() == ErrorKind::kNoSpace);
            f.disk->set_fault(nullptr);
            REQUIRE(f.run(node_flush(f.img)).has_value());  // what could not be written back is kept and written now
            f.reopen_image();
            CHECK(f.read(kBlock + 100, 100) == pattern(100, 1));
            return;
        }
        f.disk->set_fault(nullptr);
    }
    CHECK(f.read(kBlock, kBlock) == f.base_bytes(kBlock, kBlock));
    f.write(kBlock + 100, pattern(100, 9));
    CHECK(f.read(kBlock, 300) == joined({f.base_bytes(kBlock, 100), pattern(100, 9), f.base_bytes(kBlock + 200, 100)}));
    CHECK(f.read(0, 4096) == pattern(4096, 1));
    CHECK(f.check() == "");
}

TEST_CASE("format node: a freed place is not used again while a request may hold its address", "[block][format]") {
    FormatFixture f(1 << 20, 0, "", 1 << 20);
    f.write(0, pattern(kBlock, 1));
    auto scenario = [](FormatFixture* fixture) -> Task<void> {
        FormatFixture& x = *fixture;
        // A read of two blocks that waits for the second one, which lies in the backing file.
        TaskScope scope;
        std::vector<Result<Bytes>> results;
        x.base->close_gate();
        scope.spawn(store(node_read(x.img, kBlock - 4096, 8192), &results));
        const bool waiting = co_await wait_until([&] { return x.base->at_gate() == 1; });
        REQUIRE(waiting);
        const Result<> discarded = co_await node_discard(x.img, 0, kBlock);
        CHECK(discarded.has_value());
        const Result<> flushed = co_await node_flush(x.img);
        CHECK(flushed.has_value());
        CHECK(x.img->retired_blocks() == 1);
        CHECK(x.img->free_blocks() == 0);
        const Result<> elsewhere = co_await node_write(x.img, 8 * kBlock, Bytes(kBlock, 0x77));
        CHECK(elsewhere.has_value());
        x.base->open_gate();
        co_await scope.join();
        REQUIRE(results.front().has_value());
        CHECK(std::equal(results.front()->begin(), results.front()->begin() + 4096,
                         pattern(kBlock, 1).begin() + kBlock - 4096));
        CHECK(x.img->retired_blocks() == 1);  // the table on disk may still name it
        const Result<> again = co_await node_flush(x.img);
        CHECK(again.has_value());
        CHECK(x.img->free_blocks() == 1);
        CHECK(x.img->retired_blocks() == 0);
    };
    f.run(scenario(&f));
}

TEST_CASE("format node: table pages are written only after a flush of the data they name", "[block][format][crash]") {
    const bool through = GENERATE(false, true);
    // The edges are old data of the backing file, or zeroes over what a freed place still holds.
    const bool backing = GENERATE(false, true);
    FormatFixture f(4 << 20, 0, through ? ",'write-through':true,'forget':true" : ",'forget':true",
                    backing ? 4 << 20 : 0);
    f.write(0, Bytes(4 << 20, 0xff));
    REQUIRE(f.run(node_discard(f.img, 0, 4 << 20)).has_value());
    REQUIRE(f.run(node_flush(f.img)).has_value());
    REQUIRE(f.img->free_blocks() == 64);
    // With write-through only copied bytes must be stable first (the guest's own are its business until it flushes).
    std::atomic<bool> unstable{false};
    std::atomic<int> violations{0}, pages{0};
    f.disk->set_fault([&](MemoryDisk::Op op, uint64_t offset, uint64_t) {
        if (op == MemoryDisk::Op::kFlush) unstable = false;
        if (op != MemoryDisk::Op::kWrite) return 0;
        if (offset >= 2 * kBlock) {
            unstable = true;
        } else {
            pages++;
            if (unstable) violations++;
        }
        return 0;
    });
    for (int i = 0; i < 40; i++) {
        f.write(static_cast<uint64_t>(i) * 100000 + 50, pattern(30, 1));
        if (i % 8 == 7) REQUIRE(f.run(node_flush(f.img)).has_value());
    }
    f.disk->set_fault(nullptr);
    CHECK(pages > 0);
    CHECK(violations == 0);
}

TEST_CASE("format node: growing shows zeroes, never old data or the backing file", "[block][format][resize]") {
    FormatFixture f(100000, 0, "", 1 << 20);
    f.write(0, pattern(100000, 1));
    auto resize = [&](uint64_t size) {
        auto result = f.run(f.graph->resize(*f.img, static_cast<int64_t>(size)));
        REQUIRE(error_of(result) == "");
    };
    resize(50001);
    CHECK(f.img->size() == 50001);
    resize(400000);
    CHECK(f.read(0, 50001) == pattern(50001, 1));
    CHECK(f.read(50001, 349999) == Bytes(349999));
    f.reopen_image();
    CHECK(f.img->size() == 400000);
    CHECK(f.read(0, 400000) == joined({pattern(50001, 1), Bytes(349999)}));
    CHECK(f.check() == "");
    // An encoded last block, too.
    f.write(5 * kBlock, Bytes(kBlock, 7), WriteFlags::kCompressed);
    resize(5 * kBlock + 5000);
    resize(7 * kBlock);
    CHECK(f.read(5 * kBlock, 2 * kBlock) == joined({Bytes(5000, 7), Bytes(2 * kBlock - 5000)}));
    CHECK(f.run(f.graph->resize(*f.img, int64_t{1} << 40)).error().kind() == ErrorKind::kNoSpace);
}
