#include "block/bitmap_serialise.h"

#include <catch2/catch.hpp>
#include <random>
#include <vector>

using namespace gantry;
using namespace gantry::block;

namespace {

std::shared_ptr<DirtyBitmap> make(uint64_t size, uint32_t granularity) {
    return DirtyBitmap::create("b", size, granularity).value();
}

std::vector<uint8_t> bytes_of(const DirtyBitmap& bitmap) {
    std::vector<uint8_t> bytes(serialised_bytes(bitmap));
    serialise_piece(bitmap, 0, bytes);
    return bytes;
}

}  // namespace

TEST_CASE("bitmap: granule b is bit b % 8 of byte b / 8", "[block][bitmap]") {
    auto b = make(512 * 75 + 1, 512);
    CHECK(serialised_bytes(*b) == 10);
    for (const uint64_t granule : {0, 3, 15, 64, 75}) b->mark(granule * 512, 1);
    CHECK(bytes_of(*b) == std::vector<uint8_t>{0x09, 0x80, 0, 0, 0, 0, 0, 0, 0x01, 0x08});
    std::vector<uint8_t> longer(16, 0xee);
    serialise_piece(*b, 8, longer);
    CHECK(longer == std::vector<uint8_t>{1, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
    CHECK(serialised_bytes(*make(0, 512)) == 0);
}

TEST_CASE("bitmap: pieces written and read back are the same bitmap", "[block][bitmap]") {
    std::mt19937_64 random(GENERATE(1, 2, 3, 4, 5, 6));
    const uint32_t granularity = 512u << (random() % 3);
    const uint64_t size = 1 + random() % (granularity * uint64_t{50000});
    auto b = make(size, granularity);
    for (int i = 0; i < 300; i++) b->mark(random() % size, random() % (granularity * 200));
    const uint64_t bytes = serialised_bytes(*b);
    const uint64_t piece = uint64_t{8} << (random() % 8);
    auto copy = make(size, granularity);
    for (uint64_t at = 0; at < bytes; at += piece) {
        std::vector<uint8_t> data(piece);
        serialise_piece(*b, at, data);
        bool zeroes = true, ones = true;
        for (uint64_t granule = at * 8; granule < (at + piece) * 8 && granule * granularity < size; granule++) {
            const bool dirty = b->is_dirty(granule * granularity);
            REQUIRE(dirty == ((data[granule / 8 - at] >> (granule % 8)) & 1));
            zeroes = zeroes && !dirty;
            ones = ones && dirty;
        }
        const BitmapPiece kind = classify_piece(*b, at, piece);
        REQUIRE(kind == (zeroes ? BitmapPiece::kZeroes : ones ? BitmapPiece::kOnes : BitmapPiece::kMixed));
        if (kind == BitmapPiece::kOnes) {
            deserialise_ones(*copy, at, piece);
        } else {
            deserialise_piece(*copy, at, data);
        }
    }
    CHECK(bytes_of(*copy) == bytes_of(*b));
    CHECK(copy->dirty_bytes() == b->dirty_bytes());
}

TEST_CASE("bitmap: what lies beyond the end of a bitmap is dropped", "[block][bitmap]") {
    auto b = make(512 * 5, 512);
    const std::vector<uint8_t> ones(64, 0xff);
    deserialise_piece(*b, 0, ones);
    deserialise_piece(*b, 64, ones);
    CHECK(b->dirty_bytes() == 512 * 5);
    CHECK(bytes_of(*b) == std::vector<uint8_t>{0x1f});
    CHECK(classify_piece(*b, 0, 512) == BitmapPiece::kOnes);
    b->clear_all();
    deserialise_ones(*b, 0, 1 << 20);
    CHECK(bytes_of(*b) == std::vector<uint8_t>{0x1f});
    CHECK(b->next_clean(0) == 512 * 5);
}

TEST_CASE("bitmap: assign takes exactly the other's bits", "[block][bitmap]") {
    auto a = make(1 << 20, 4096);
    auto b = make(1 << 20, 4096);
    a->mark(0, 5000);
    b->mark(900000, 1);
    a->assign(*b);
    CHECK(bytes_of(*a) == bytes_of(*b));
    b->clear_all();
    a->assign(*b);
    CHECK(a->dirty_bytes() == 0);
}

TEST_CASE("bitmap: it records while it is enabled, writable and consistent", "[block][bitmap]") {
    auto b = make(1 << 20, 4096);
    CHECK(b->recording());
    b->set_read_only(true);
    CHECK_FALSE(b->recording());
    CHECK(b->enabled());
    b->set_recording(false);
    b->set_read_only(false);
    CHECK_FALSE(b->recording());
    b->set_recording(true);
    CHECK(b->recording());
    b->mark(0, 1);
    b->set_inconsistent();
    CHECK_FALSE(b->recording());
    CHECK(b->dirty_bytes() == 0);
    auto lost = DirtyBitmap::create_inconsistent("lost", 65536);
    CHECK(lost->inconsistent);
    CHECK(lost->persistent);
    CHECK(lost->granularity() == 65536);
    CHECK(lost->resize(uint64_t{1} << 50).has_value());
    CHECK(lost->dirty_bytes() == 0);
}

TEST_CASE("bitmap: growth of a persistent one is clean", "[block][bitmap]") {
    auto b = make(1 << 20, 4096);
    b->persistent = true;
    b->mark(0, 1);
    REQUIRE(b->resize(2 << 20));
    CHECK(b->dirty_bytes() == 4096);
    REQUIRE(b->resize(4096));
    REQUIRE(b->resize(1 << 20));
    CHECK(b->dirty_bytes() == 4096);
}
