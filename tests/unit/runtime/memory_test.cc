#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include <catch2/catch.hpp>

#include "runtime/buffer.h"
#include "runtime/frame_pool.h"
#include "runtime/iovec.h"
#include "tests/support/death_test.h"

namespace gantry {
namespace {

std::vector<uint8_t> counting(size_t n) {
    std::vector<uint8_t> v(n);
    for (size_t i = 0; i < n; ++i) v[i] = static_cast<uint8_t>(i * 7 + 1);
    return v;
}

TEST_CASE("iovec: a slice of any range shows the same bytes", "[runtime][iovec]") {
    auto bytes = counting(60);
    // Pieces of 1, 2, 3, ... bytes with empty ones between.
    std::vector<iovec> pieces;
    for (size_t at = 0, n = 1; at < bytes.size(); at += n, ++n) {
        pieces.push_back({bytes.data() + at, std::min(n, bytes.size() - at)});
        pieces.push_back({nullptr, 0});
    }
    const IoVec whole(pieces.data(), static_cast<uint32_t>(pieces.size()), bytes.size());
    for (size_t offset = 0; offset <= bytes.size(); ++offset) {
        for (size_t length = 0; offset + length <= bytes.size(); ++length) {
            const IoVecSlice slice(whole, offset, length);
            REQUIRE(slice.view().bytes == length);
            std::vector<uint8_t> out(length + 1);
            copy_from_iovec(slice.view(), 0, out.data(), length);
            REQUIRE(std::memcmp(out.data(), bytes.data() + offset, length) == 0);
        }
    }
}

TEST_CASE("iovec: copies and fills touch only their range", "[runtime][iovec]") {
    std::vector<uint8_t> memory(30, 0xee);
    iovec pieces[] = {{memory.data(), 10}, {memory.data() + 10, 5}, {memory.data() + 15, 15}};
    const IoVec list(pieces, 3, 30);
    const auto source = counting(12);
    copy_to_iovec(list, 6, source.data(), source.size());
    CHECK(memory[5] == 0xee);
    CHECK(std::memcmp(memory.data() + 6, source.data(), 12) == 0);
    CHECK(memory[18] == 0xee);
    fill_iovec(list, 8, 9);
    CHECK(memory[7] == source[1]);
    CHECK(memory_is_zero(memory.data() + 8, 9));
    CHECK(memory[17] == source[11]);
}

TEST_CASE("iovec: a range beyond the list aborts", "[runtime][iovec]") {
    uint8_t byte = 0;
    const iovec one{&byte, 1};
    uint8_t out[4];
    CHECK_THAT(test::abort_message([&] { copy_from_iovec(IoVec(one), 1, out, 1); }),
               Catch::Contains("inside its iovec"));
    CHECK_THAT(test::abort_message([&] { copy_from_iovec(IoVec(one), SIZE_MAX, out, 2); }), Catch::Contains("inside"));
}

TEST_CASE("iovec: zero detection finds one byte anywhere", "[runtime][iovec]") {
    for (const size_t size :
         {size_t{0}, size_t{1}, size_t{7}, size_t{31}, size_t{32}, size_t{33}, size_t{40}, size_t{100}, size_t{4096}}) {
        std::vector<uint8_t> memory(size + 1, 0);
        memory[size] = 1;  // just outside
        REQUIRE(memory_is_zero(memory.data(), size));
        for (size_t i = 0; i < size; ++i) {
            memory[i] = 0x80;
            REQUIRE_FALSE(memory_is_zero(memory.data(), size));
            memory[i] = 0;
        }
    }
    std::vector<uint8_t> zero(100, 0);
    const iovec pieces[] = {{zero.data(), 40}, {zero.data() + 40, 60}};
    CHECK(iovec_is_zero(IoVec(pieces, 2, 100)));
    zero[99] = 1;
    CHECK_FALSE(iovec_is_zero(IoVec(pieces, 2, 100)));
}

TEST_CASE("buffer: page aligned, of the asked size, reusable", "[runtime][buffer]") {
    for (const size_t size : {size_t{1}, size_t{512}, size_t{4096}, size_t{4097}, size_t{100'000}, size_t{1} << 20,
                              (size_t{32} << 20) + 1}) {
        for (int round = 0; round < 2; ++round) {
            Buffer b = Buffer::alloc(size);
            REQUIRE(b.size() == size);
            REQUIRE(reinterpret_cast<uintptr_t>(b.data()) % 4096 == 0);
            std::memset(b.data(), 0x5a, size);
            Buffer moved = std::move(b);
            REQUIRE_FALSE(b);
            REQUIRE(moved.data()[size - 1] == 0x5a);
        }
    }
    CHECK_FALSE(Buffer::alloc(0));
    CHECK(Buffer::alloc(0).size() == 0);
}

TEST_CASE("buffer: an absurd size is an error, not an abort", "[runtime][buffer]") {
    const auto b = Buffer::try_alloc(size_t{1} << 62);
    REQUIRE_FALSE(b);
    CHECK(b.error().kind() == ErrorKind::kNoMemory);
    CHECK_FALSE(Buffer::try_alloc(SIZE_MAX));
}

TEST_CASE("buffer: memory from one thread is freed on another, and caches end with their threads",
          "[runtime][buffer]") {
    std::vector<Buffer> buffers;
    std::thread maker([&] {
        for (int i = 0; i < 100; ++i) buffers.push_back(Buffer::alloc(64 * 1024));
    });
    maker.join();
    std::thread([moved = std::move(buffers)]() mutable {
        for (Buffer& b : moved) b.data()[0] = 1;
        moved.clear();
        Buffer again = Buffer::alloc(64 * 1024);
        again.data()[65535] = 1;
    }).join();
    buffer_cache_trim();
    CHECK(Buffer::alloc(4096));
}

TEST_CASE("frame pool: sizes do not mix and frames cross threads", "[runtime][frames]") {
    struct Frame {
        void* memory;
        size_t size;
    };
    std::vector<Frame> frames;
    std::thread([&] {
        for (size_t size = 1; size < 6000; size += 13) {
            void* p = frame_alloc(size);
            std::memset(p, static_cast<int>(size & 0xff), size);
            frames.push_back({p, size});
        }
    }).join();
    bool intact = true;
    for (const Frame& f : frames) {
        auto* p = static_cast<uint8_t*>(f.memory);
        intact = intact && p[0] == (f.size & 0xff) && p[f.size - 1] == (f.size & 0xff);
        frame_free(f.memory, f.size);
    }
    CHECK(intact);
    // What was freed here is handed out again and is large enough.
    for (const Frame& f : frames) {
        void* p = frame_alloc(f.size);
        std::memset(p, 1, f.size);
        frame_free(p, f.size);
    }
}

}  // namespace
}  // namespace gantry
