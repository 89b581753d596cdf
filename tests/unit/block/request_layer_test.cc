#include <catch2/catch.hpp>
#include <numeric>

#include "block/bitmap.h"
#include "block/graph.h"
#include "runtime/task_scope.h"
#include "tests/support/probe_node.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::ProbeNode;
using gantry::test::TestRuntime;
using gantry::test::wait_until;

namespace {

std::vector<uint8_t> pattern(size_t size, uint8_t seed) {
    std::vector<uint8_t> data(size);
    for (size_t i = 0; i < size; i++) data[i] = static_cast<uint8_t>(seed + i * 7 + i / 251);
    return data;
}

Task<Result<>> read_into(Node* node, uint64_t offset, std::vector<uint8_t>* data) {
    Request rq = Request::internal();
    const iovec iov{data->data(), data->size()};
    co_return co_await node->read(rq, offset, IoVec(iov));
}

Task<Result<>> write_from(Node* node, uint64_t offset, std::vector<uint8_t> data,
                          WriteFlags flags = WriteFlags::kNone) {
    Request rq = Request::internal();
    const iovec iov{data.data(), data.size()};
    co_return co_await node->write(rq, offset, IoVec(iov), flags);
}

Task<Result<>> zero(Node* node, uint64_t offset, uint64_t length, WriteFlags flags = WriteFlags::kNone) {
    Request rq = Request::internal();
    co_return co_await node->write_zeroes(rq, offset, length, flags);
}

Task<Result<>> discard(Node* node, uint64_t offset, uint64_t length) {
    Request rq = Request::internal();
    co_return co_await node->discard(rq, offset, length);
}

Task<Result<>> flush(Node* node) {
    Request rq = Request::internal();
    co_return co_await node->flush(rq);
}

Task<void> keep(Task<Result<>> task, std::vector<std::string>* ended, std::string name) {
    Result<> result = co_await std::move(task);
    ended->push_back(name + (result ? "" : " failed"));
}

Limits aligned(uint32_t unit) {
    Limits l;
    l.request_alignment = unit;
    return l;
}

ErrorKind kind_of(const Result<>& result) {
    REQUIRE_FALSE(result.has_value());
    return result.error().kind();
}

}  // namespace

TEST_CASE("request layer: what fits the limits reaches the driver unchanged", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(1 << 20);
    CHECK(rt.run(write_from(&node, 3, pattern(100, 1))).has_value());
    std::vector<uint8_t> back(100);
    CHECK(rt.run(read_into(&node, 3, &back)).has_value());
    CHECK(back == pattern(100, 1));
    CHECK(node.log() == "W 3+100, R 3+100");
    CHECK(node.wr_highest_offset() == 103);
}

TEST_CASE("request layer: reads beyond the end give zeroes, writes are refused or grow the node", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(1000);
    std::memset(node.bytes(), 0xaa, node.capacity());
    std::vector<uint8_t> data(200, 0x55);
    CHECK(rt.run(read_into(&node, 900, &data)).has_value());
    CHECK(node.log() == "R 900+100");
    CHECK(std::count(data.begin(), data.end(), 0xaa) == 100);
    CHECK(std::count(data.begin() + 100, data.end(), 0) == 100);
    CHECK(rt.run(read_into(&node, 5000, &data)).has_value());
    CHECK(node.log() == "");
    CHECK(kind_of(rt.run(write_from(&node, 901, pattern(100, 0)))) == ErrorKind::kNoSpace);
    CHECK(kind_of(rt.run(zero(&node, 1001, 1))) == ErrorKind::kNoSpace);
    CHECK(kind_of(rt.run(zero(&node, 1, UINT64_MAX))) == ErrorKind::kNoSpace);
    CHECK(kind_of(rt.run(read_into(&node, UINT64_MAX - 10, &data))) == ErrorKind::kInvalid);
    CHECK(node.log() == "");

    Limits l;
    l.can_grow_by_write = true;
    ProbeNode growing(1000, {}, l);
    CHECK(rt.run(write_from(&growing, 1500, pattern(100, 0))).has_value());
    CHECK(growing.size() == 1600);
    CHECK(rt.run(zero(&growing, 1600, 400)).has_value());
    CHECK(growing.size() == 2000);
    growing.fault = [](auto, auto, auto) { return fail(ErrorKind::kIo, "broken"); };
    CHECK(kind_of(rt.run(write_from(&growing, 3000, pattern(100, 0)))) == ErrorKind::kIo);
    CHECK(growing.size() == 2000);
}

TEST_CASE("request layer: a read-only node refuses every change", "[block][request]") {
    TestRuntime rt;
    NodeFlags flags;
    flags.read_only = true;
    flags.discard = DiscardMode::kUnmap;
    ProbeNode node(1000, flags);
    CHECK(kind_of(rt.run(write_from(&node, 0, pattern(10, 0)))) == ErrorKind::kReadOnly);
    CHECK(kind_of(rt.run(zero(&node, 0, 10))) == ErrorKind::kReadOnly);
    CHECK(kind_of(rt.run(discard(&node, 0, 10))) == ErrorKind::kReadOnly);
    CHECK(node.log() == "");
}

TEST_CASE("request layer: unaligned requests are read, merged and written in whole units", "[block][request]") {
    TestRuntime rt;
    const uint32_t memory = GENERATE(1u, 512u);
    Limits l = aligned(512);
    l.memory_alignment = memory;
    ProbeNode node(1 << 16, {}, l);
    std::vector<uint8_t> model = pattern(1 << 16, 9);
    std::copy(model.begin(), model.end(), node.bytes());

    const auto data = pattern(1000, 50);
    CHECK(rt.run(write_from(&node, 700, data)).has_value());
    std::copy(data.begin(), data.end(), model.begin() + 700);
    CHECK(node.log() == "R 512+512, R 1536+512, W 512+1536");
    CHECK(std::equal(model.begin(), model.end(), node.bytes()));

    CHECK(rt.run(write_from(&node, 5, pattern(10, 1))).has_value());
    CHECK(node.log() == "R 0+512, W 0+512");

    std::vector<uint8_t> back(1000);
    CHECK(rt.run(read_into(&node, 700, &back)).has_value());
    CHECK(back == data);
    CHECK(node.log() == "R 512+1536");
}

TEST_CASE("request layer: the last unit of an odd size is read and written whole", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(1000, {}, aligned(512));
    CHECK(rt.run(write_from(&node, 990, pattern(10, 1))).has_value());
    CHECK(node.log() == "R 512+512, W 512+512");
    CHECK(node.size() == 1000);
    std::vector<uint8_t> back(20);
    CHECK(rt.run(read_into(&node, 985, &back)).has_value());
    CHECK(std::vector<uint8_t>(back.begin() + 5, back.begin() + 15) == pattern(10, 1));
    CHECK(back[19] == 0);
}

TEST_CASE("request layer: requests are split to max_transfer and max_iov", "[block][request]") {
    TestRuntime rt;
    Limits l = aligned(512);
    l.max_transfer = 4096;
    l.max_iov = 4;
    ProbeNode node(1 << 20, {}, l);
    CHECK(rt.run(write_from(&node, 0, pattern(10000, 3))).has_value());
    CHECK(node.log() == "W 0+4096, W 4096+4096, W 8192+1536, R 9728+512, W 9728+512");

    // Many tiny pieces of memory are gathered.
    std::vector<uint8_t> data = pattern(4096, 77);
    std::vector<iovec> list;
    for (size_t i = 0; i < data.size(); i += 64) list.push_back({data.data() + i, 64});
    auto scattered = [](ProbeNode* n, IoVec iov, bool write) -> Task<Result<>> {
        Request rq = Request::internal();
        if (write) co_return co_await n->write(rq, 4096, iov);
        co_return co_await n->read(rq, 4096, iov);
    };
    const IoVec iov(list.data(), static_cast<uint32_t>(list.size()), data.size());
    CHECK(rt.run(scattered(&node, iov, true)).has_value());
    CHECK(std::equal(data.begin(), data.end(), node.bytes() + 4096));
    std::fill(data.begin(), data.end(), 0);
    CHECK(rt.run(scattered(&node, iov, false)).has_value());
    CHECK(data == pattern(4096, 77));
}

TEST_CASE("request layer: FUA becomes a flush where the driver has none", "[block][request]") {
    TestRuntime rt;
    ProbeNode plain(1 << 16);
    CHECK(rt.run(write_from(&plain, 0, pattern(10, 0), WriteFlags::kFua)).has_value());
    CHECK(plain.log() == "W 0+10, F");
    Limits l;
    l.supports_fua = true;
    l.supports_zeroes = true;
    ProbeNode able(1 << 16, {}, l);
    CHECK(rt.run(write_from(&able, 0, pattern(10, 0), WriteFlags::kFua)).has_value());
    CHECK(rt.run(zero(&able, 0, 10, WriteFlags::kFua)).has_value());
    CHECK(able.log() == "W 0+10 fua, Z 0+10 fua");
    NodeFlags unsafe;
    unsafe.cache_no_flush = true;
    ProbeNode careless(1 << 16, unsafe, l);
    CHECK(rt.run(write_from(&careless, 0, pattern(10, 0), WriteFlags::kFua)).has_value());
    CHECK(rt.run(flush(&careless)).has_value());
    CHECK(careless.log() == "W 0+10");
}

TEST_CASE("request layer: zeroes go to the driver in whole units, the rest is written", "[block][request]") {
    TestRuntime rt;
    Limits l = aligned(512);
    l.supports_zeroes = true;
    l.zeroes_alignment = 4096;
    l.max_zeroes = 8192;
    ProbeNode node(1 << 20, {}, l);
    std::memset(node.bytes(), 0xff, node.capacity());
    CHECK(rt.run(zero(&node, 4000, 16700, WriteFlags::kMayUnmap)).has_value());
    // MayUnmap is dropped because the node does not discard.
    CHECK(node.log() == "R 3584+512, W 3584+512, Z 4096+8192, Z 12288+8192, R 20480+512, W 20480+512");
    CHECK(std::count(node.bytes(), node.bytes() + 30000, 0) == 16700);
    CHECK(node.bytes()[3999] == 0xff);
    CHECK(node.bytes()[20700] == 0xff);

    // A head or tail that has to be written is slow.
    CHECK(kind_of(rt.run(zero(&node, 4000, 16700, WriteFlags::kNoFallback))) == ErrorKind::kUnsupported);
    CHECK(kind_of(rt.run(zero(&node, 4096, 4095, WriteFlags::kNoFallback))) == ErrorKind::kUnsupported);
    CHECK(node.log() == "");
    CHECK(rt.run(zero(&node, 4096, 4096, WriteFlags::kNoFallback)).has_value());
    CHECK(node.log() == "Z 4096+4096 fast");

    // What the driver refuses is written in bounded pieces.
    node.fault = [](std::string_view verb, uint64_t, uint64_t) -> Result<> {
        if (verb == "Z") return fail(ErrorKind::kUnsupported, "not here");
        return {};
    };
    std::memset(node.bytes(), 0xff, node.capacity());
    CHECK(rt.run(zero(&node, 0, 8192)).has_value());
    CHECK(node.log() == "Z 0+8192, W 0+8192");
    CHECK(std::count(node.bytes(), node.bytes() + 8192, 0) == 8192);
    CHECK(kind_of(rt.run(zero(&node, 0, 8192, WriteFlags::kNoFallback))) == ErrorKind::kUnsupported);
    CHECK(node.log() == "Z 0+8192 fast");
}

TEST_CASE("request layer: a driver without write-zeroes gets bounded writes", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(3 << 20);
    std::memset(node.bytes(), 0xff, node.capacity());
    CHECK(rt.run(zero(&node, 100, (5 << 19))).has_value());
    CHECK(node.log() == "W 100+1048476, W 1048576+1048576, W 2097152+524388");
    CHECK(std::count(node.bytes(), node.bytes() + node.capacity(), 0) == 5 << 19);
    CHECK(kind_of(rt.run(zero(&node, 0, 512, WriteFlags::kNoFallback))) == ErrorKind::kUnsupported);
}

TEST_CASE("request layer: detect-zeroes turns whole zero requests into write-zeroes", "[block][request]") {
    TestRuntime rt;
    NodeFlags flags;
    flags.detect_zeroes = GENERATE(DetectZeroes::kOn, DetectZeroes::kUnmap);
    flags.discard = DiscardMode::kUnmap;
    Limits l;
    l.supports_zeroes = true;
    ProbeNode node(1 << 20, flags, l);
    CHECK(rt.run(write_from(&node, 512, std::vector<uint8_t>(4096))).has_value());
    CHECK(node.log() == (flags.detect_zeroes == DetectZeroes::kUnmap ? "Z 512+4096 unmap" : "Z 512+4096"));
    std::vector<uint8_t> almost(4096);
    almost[4095] = 1;
    CHECK(rt.run(write_from(&node, 512, almost)).has_value());
    CHECK(node.log() == "W 512+4096");
}

TEST_CASE("request layer: discards shrink inward and end here unless allowed", "[block][request]") {
    TestRuntime rt;
    Limits l;
    l.discard_alignment = 4096;
    l.max_discard = 8192;
    NodeFlags flags;
    ProbeNode off(100000, flags, l);
    CHECK(rt.run(discard(&off, 0, 100000)).has_value());
    CHECK(off.log() == "");
    flags.discard = DiscardMode::kUnmap;
    ProbeNode on(100000, flags, l);
    CHECK(rt.run(discard(&on, 1, 8190)).has_value());
    CHECK(on.log() == "");
    CHECK(rt.run(discard(&on, 4095, 12300)).has_value());
    CHECK(on.log() == "D 4096+8192, D 12288+4096");
    CHECK(rt.run(discard(&on, 98000, 1 << 30)).has_value());
    CHECK(on.log() == "D 98304+1696");
    on.fault = [](auto, auto, auto) { return fail(ErrorKind::kUnsupported, "no"); };
    CHECK(rt.run(discard(&on, 0, 4096)).has_value());
    on.fault = [](auto, auto, auto) { return fail(ErrorKind::kIo, "broken"); };
    CHECK(kind_of(rt.run(discard(&on, 0, 4096))) == ErrorKind::kIo);
}

TEST_CASE("request layer: overlapping read-modify-writes never lose bytes", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(8192, {}, aligned(4096));
    // All of them touch the same two units at once, from several loops.
    auto storm = [](ProbeNode* n, TestRuntime* runtime) -> Task<void> {
        TaskScope scope;
        std::vector<std::string> ended;
        for (size_t i = 0; i < 64; i++) {
            const uint64_t at = i * 100;
            Task<Result<>> one = write_from(n, at, std::vector<uint8_t>(100, static_cast<uint8_t>(i + 1)));
            scope.spawn(keep(run_on(runtime->io_loop(i), std::move(one)), &ended, "w"));
        }
        co_await scope.join();
        CHECK(ended.size() == 64);
        CHECK(std::ranges::count(ended, "w") == 64);
    };
    rt.run(storm(&node, &rt));
    for (size_t i = 0; i < 6400; i++) {
        if (node.bytes()[i] != i / 100 + 1) FAIL("byte " << i << " is " << int{node.bytes()[i]});
    }
}

TEST_CASE("request layer: serialising requests wait for earlier ones and hold up later ones, in order",
          "[block][request]") {
    TestRuntime rt;
    ProbeNode node(1 << 20);
    node.track_requests();
    auto scenario = [](ProbeNode* n) -> Task<void> {
        TaskScope scope;
        std::vector<std::string> ended;
        n->gate().reset();
        scope.spawn(keep(write_from(n, 0, pattern(4096, 1)), &ended, "a"));
        scope.spawn(keep(write_from(n, 2048, pattern(4096, 2), WriteFlags::kSerialising), &ended, "b"));
        scope.spawn(keep(write_from(n, 4096, pattern(4096, 3)), &ended, "c"));
        scope.spawn(keep(zero(n, 0, 1 << 19, WriteFlags::kSerialising), &ended, "d"));
        scope.spawn(keep(write_from(n, 1 << 19, pattern(4096, 4)), &ended, "e"));
        // a runs, and e, which overlaps nobody; b waits for a, c for b, d for all.
        CHECK(n->log() == "W 0+4096, W 524288+4096");
        CHECK(n->at_gate() == 2);
        n->gate().set();
        co_await scope.join();
        CHECK(n->log() == "W 2048+4096, W 4096+4096, W 0+524288");
        CHECK(ended == std::vector<std::string>{"a", "e", "b", "c", "d"});
    };
    rt.run(scenario(&node));
}

TEST_CASE("request layer: concurrent flushes share one that began after them", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(1 << 16);
    auto scenario = [](ProbeNode* n) -> Task<void> {
        TaskScope scope;
        std::vector<std::string> ended;
        n->gate().reset();
        scope.spawn(keep(flush(n), &ended, "1"));
        for (int i = 2; i < 12; i++) scope.spawn(keep(flush(n), &ended, std::to_string(i)));
        CHECK(n->log() == "F");  // the others need one that begins after their call
        n->gate().set();
        co_await scope.join();
        CHECK(n->log() == "F");
        CHECK(ended.size() == 11);
        CHECK(ended.front() == "1");
    };
    rt.run(scenario(&node));
    // From many loops at once.
    auto storm = [](ProbeNode* n, TestRuntime* runtime) -> Task<void> {
        TaskScope scope;
        std::vector<std::string> ended;
        for (size_t i = 0; i < 200; i++) scope.spawn(keep(run_on(runtime->io_loop(i), flush(n)), &ended, "f"));
        co_await scope.join();
        CHECK(std::ranges::count(ended, "f") == 200);
    };
    rt.run(storm(&node, &rt));
}

TEST_CASE("request layer: after a failed flush of a leaf every later one fails", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(1 << 16);
    node.fault = [](auto, auto, auto) { return fail(ErrorKind::kIo, "the medium failed"); };
    CHECK(kind_of(rt.run(flush(&node))) == ErrorKind::kIo);
    node.fault = nullptr;
    const Result<> later = rt.run(flush(&node));
    CHECK(kind_of(later) == ErrorKind::kIo);
    CHECK(later.error().message() == "the medium failed");
    CHECK(node.log() == "F");
    CHECK(kind_of(rt.run(write_from(&node, 0, pattern(10, 0), WriteFlags::kFua))) == ErrorKind::kIo);
}

TEST_CASE("request layer: dirty bitmaps are marked after every change, failed ones too", "[block][request][bitmap]") {
    TestRuntime rt;
    NodeFlags flags;
    flags.discard = DiscardMode::kUnmap;
    ProbeNode node(1 << 20, flags);
    auto bitmap = DirtyBitmap::create("b", 1 << 20, 4096).value();
    node.add_bitmap(bitmap);
    node.allow(true, true);
    CHECK(rt.run(write_from(&node, 5000, pattern(10, 0))).has_value());
    CHECK(bitmap->dirty_bytes() == 4096);
    CHECK(rt.run(zero(&node, 8192, 8192)).has_value());
    CHECK(rt.run(discard(&node, 65536, 4096)).has_value());
    CHECK(bitmap->dirty_bytes() == 4 * 4096);
    CHECK(rt.run(write_from(&node, 300000, pattern(10, 0), WriteFlags::kUnchanged)).has_value());
    CHECK(bitmap->dirty_bytes() == 4 * 4096);
    node.fault = [](auto, auto, auto) { return fail(ErrorKind::kIo, "torn"); };
    CHECK_FALSE(rt.run(write_from(&node, 400000, pattern(10, 0))).has_value());
    CHECK(bitmap->is_dirty(400000));
    node.fault = nullptr;

    // try_write would not mark: it is closed while there is a bitmap.
    auto try_write = [](ProbeNode* n) -> Task<int> {
        Request rq = Request::internal();
        uint8_t byte = 1;
        const iovec iov{&byte, 1};
        co_return n->try_write(rq, 0, IoVec(iov), WriteFlags::kNone);
    };
    CHECK(rt.run(try_write(&node)) == -EAGAIN);
    node.remove_bitmap(*bitmap);
    CHECK(rt.run(try_write(&node)) == 0);
}

TEST_CASE("request layer: preload is cut to the node", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(10000);
    auto preload = [](ProbeNode* n, uint64_t offset, uint64_t length) -> Task<Result<>> {
        Request rq = Request::internal();
        co_return co_await n->preload(rq, offset, length);
    };
    CHECK(rt.run(preload(&node, 9000, UINT64_MAX)).has_value());
    CHECK(rt.run(preload(&node, 10000, 5)).has_value());
    CHECK(rt.run(preload(&node, 5, 0)).has_value());
    CHECK(node.log() == "P 9000+1000");
}

TEST_CASE("request layer: block status is cut to what was asked and knows the end", "[block][request]") {
    TestRuntime rt;
    ProbeNode node(10000, {}, aligned(512));
    auto ask = [](ProbeNode* n, uint64_t offset, uint64_t length) -> Task<Result<BlockStatus>> {
        Request rq = Request::internal();
        co_return co_await n->block_status(rq, offset, length);
    };
    auto inner = rt.run(ask(&node, 700, 100));
    REQUIRE(inner.has_value());
    CHECK(inner->length == 100);
    CHECK(inner->host_offset == 700);
    CHECK(inner->file == &node);
    CHECK_FALSE(inner->eof);
    auto last = rt.run(ask(&node, 9000, 1000));
    REQUIRE(last.has_value());
    CHECK(last->length == 1000);
    CHECK(last->eof);
    CHECK_FALSE(rt.run(ask(&node, 9000, 1001)).has_value());
    CHECK_FALSE(rt.run(ask(&node, 0, 0)).has_value());
}
