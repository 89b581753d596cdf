// What is agreed with the kernel.

#include <catch2/catch.hpp>

#include <boost/json/parse.hpp>
#include <cerrno>

#include "fuse/init.h"
#include "schema/value.h"

using namespace gantry;
using namespace gantry::fuse;

namespace {

constexpr uint64_t kWriteback = init_bit(16);
constexpr uint64_t kSplice = init_bit(7) | init_bit(8) | init_bit(9);

/// A kernel that offers `flags`.
InitIn kernel(uint64_t flags = UINT64_MAX, uint32_t minor = kMinor, uint32_t major = kMajor) {
    return {.major = major,
            .minor = minor,
            .max_readahead = 131072,
            .flags = static_cast<uint32_t>(flags),
            .flags2 = static_cast<uint32_t>(flags >> 32)};
}

uint64_t flags_of(const InitOut& out) { return out.flags | uint64_t{out.flags2} << 32; }

}  // namespace

TEST_CASE("fuse init: versions", "[fuse][once]") {
    SECTION("the older minor counts") {
        const auto [minor, agreed] =
            GENERATE(table<uint32_t, uint32_t>({{31, 31}, {38, 38}, {45, 45}, {46, 45}, {99, 45}}));
        const InitAnswer a = negotiate(kernel(UINT64_MAX, minor), {});
        REQUIRE(a.agreed);
        CHECK(a.error == 0);
        CHECK(a.out.major == 7);
        CHECK(a.out.minor == agreed);
        CHECK(a.agreed->minor == agreed);
        CHECK(a.out_size == 64);
    }
    SECTION("too old ones are refused") {
        const auto [major, minor] = GENERATE(table<uint32_t, uint32_t>({{7, 30}, {7, 0}, {6, 45}, {0, 0}}));
        const InitAnswer a = negotiate(kernel(UINT64_MAX, minor, major), {});
        CHECK(a.error == EPROTO);
        CHECK_FALSE(a.agreed);
        CHECK(a.out_size == 0);
    }
    SECTION("a newer major is told ours and asks again") {
        const InitAnswer a = negotiate(kernel(UINT64_MAX, 0, 8), {});
        CHECK(a.error == 0);
        CHECK_FALSE(a.agreed);
        CHECK(a.out.major == 7);
        CHECK(a.out_size == 24);
        CHECK(flags_of(a.out) == 0);
    }
}

TEST_CASE("fuse init: flags are what both want", "[fuse][once]") {
    const uint64_t always = kAsyncRead | kAtomicOTrunc | kBigWrites | kAsyncDio | kAbortError | kMaxPages | kInitExt |
                            kDirectIoAllowMmap | kNoExportSupport | kHasResend;
    SECTION("wishes") {
        const auto [wishes, more] = GENERATE(table<InitWishes, uint64_t>({
            {InitWishes{}, 0},
            {InitWishes{.cached = true}, kAutoInvalData},
            {InitWishes{.passthrough = true}, kPassthrough},
            {InitWishes{.io_uring = true}, kOverIoUring},
            {InitWishes{.cached = true, .passthrough = true, .io_uring = true},
             kAutoInvalData | kPassthrough | kOverIoUring},
        }));
        const InitAnswer a = negotiate(kernel(), wishes);
        REQUIRE(a.agreed);
        CHECK(a.agreed->flags == (always | more));
        CHECK(flags_of(a.out) == a.agreed->flags);
        CHECK((flags_of(a.out) & (kWriteback | kSplice)) == 0);
        CHECK(a.out.max_stack_depth == (wishes.passthrough ? 1u : 0u));
    }
    SECTION("nothing that was not offered") {
        const InitWishes all{.cached = true, .passthrough = true, .io_uring = true};
        for (unsigned bit = 0; bit < 64; ++bit) {
            const uint64_t offered = ~init_bit(bit);
            const InitAnswer a = negotiate(kernel(offered), all);
            REQUIRE(a.agreed);
            CHECK((a.agreed->flags & ~offered) == 0);
            CHECK(a.agreed->flags == flags_of(a.out));
        }
        CHECK(flags_of(negotiate(kernel(0), all).out) == 0);
    }
    SECTION("the upper half counts with its announcement only") {
        const InitAnswer a = negotiate(kernel(~kInitExt), {.passthrough = true, .io_uring = true});
        CHECK(a.out.flags2 == 0);
        CHECK(a.out.max_stack_depth == 0);
        CHECK_FALSE(a.agreed->has(kHasResend));
        CHECK_FALSE(a.agreed->has(kPassthrough));
    }
}

TEST_CASE("fuse init: sizes", "[fuse][once]") {
    SECTION("a megabyte, in pages") {
        const InitAnswer a = negotiate(kernel(), {});
        CHECK(a.out.max_write == 1 << 20);
        CHECK(a.out.max_pages == 256);
        CHECK(a.agreed->max_write == 1 << 20);
        CHECK(a.out.max_readahead == 131072);
        CHECK(a.out.time_gran == 1);
        CHECK(a.out.max_background >= 256);
        CHECK(a.out.congestion_threshold == a.out.max_background / 4 * 3);
        CHECK(a.out.request_timeout == 0);
    }
    SECTION("a kernel that knows no number of pages has 32") {
        const InitAnswer a = negotiate(kernel(~kMaxPages), {});
        CHECK(a.out.max_write == 128 << 10);
        CHECK(a.agreed->max_write == 128 << 10);
    }
    SECTION("what is wished for stays within bounds") {
        const auto [wished, got] = GENERATE(table<uint32_t, uint32_t>(
            {{0, 4096}, {4096, 4096}, {8191, 4096}, {256 << 10, 256 << 10}, {1 << 20, 1 << 20}, {64u << 20, 1 << 20}}));
        const InitAnswer a = negotiate(kernel(), {.max_write = wished});
        CHECK(a.out.max_write == got);
        CHECK(a.out.max_pages * 4096u == got);
    }
}

TEST_CASE("fuse init: shorter structs of older kernels", "[fuse][once]") {
    std::vector<uint8_t> bytes(16, 0xff);
    const InitIn in = parse_init(bytes);
    CHECK(in.flags == 0xffffffff);
    CHECK(in.flags2 == 0);
    CHECK(in.unused[10] == 0);
    bytes.assign(200, 0xff);
    CHECK(parse_init(bytes).unused[10] == 0xffffffff);
    bytes.assign(8, 0x07);
    CHECK(parse_init(bytes).minor == 0x07070707);
    CHECK(parse_init(bytes).flags == 0);
}

TEST_CASE("fuse init: what was agreed is saved and read back", "[fuse][once]") {
    const Negotiated agreed =
        *negotiate(kernel(), {.cached = true, .passthrough = true, .io_uring = true, .max_write = 256 << 10}).agreed;
    const json::value saved = json::value(agreed.save());
    // By way of text, as in a file.
    const auto back = Negotiated::load(json::parse(json::serialize(saved)).as_object());
    REQUIRE(back);
    CHECK(*back == agreed);

    const auto [key, value] = GENERATE(table<const char*, json::value>({
        {"minor", 30},
        {"minor", 46},
        {"minor", "45"},
        {"minor", -1},
        {"minor", nullptr},
        {"flags", -1},
        {"flags", "x"},
        {"max-write", 0},
        {"max-write", 4095},
        {"max-write", 2 << 20},
        {"max-readahead", -1},
        {"max-readahead", 1e30},
        {"max-background", 65536},
        {"max-background", true},
    }));
    CAPTURE(key, json::serialize(value));
    json::object bad = agreed.save();
    bad[key] = value;
    CHECK_FALSE(Negotiated::load(bad));
    bad.erase(key);
    CHECK_FALSE(Negotiated::load(bad));
}
