#include <catch2/catch.hpp>

#include <zlib.h>
#include <zstd.h>

#include <thread>

#include "block/formats/qcow2/cache_options.h"
#include "block/formats/qcow2/decoded_clusters.h"
#include "block/formats/qcow2/decompress.h"
#include "block/formats/qcow2/l2_slice_cache.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::block::qcow2;

namespace {

std::vector<uint8_t> slice_of(uint64_t value, size_t bytes) {
    std::vector<uint8_t> out(bytes);
    for (size_t i = 0; i < bytes; i++) out[i] = static_cast<uint8_t>(value >> (56 - 8 * (i % 8)));
    return out;
}

std::unique_ptr<L2SliceCache> make_cache(uint32_t slice, uint64_t slots) {
    auto cache = L2SliceCache::create(slice, slots);
    REQUIRE(cache);
    return std::move(*cache);
}

std::vector<uint8_t> deflated(const std::vector<uint8_t>& data) {
    std::vector<uint8_t> out(data.size() + 1024);
    z_stream z{};
    deflateInit2(&z, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY);
    z.next_in = const_cast<Bytef*>(data.data());
    z.avail_in = static_cast<uInt>(data.size());
    z.next_out = out.data();
    z.avail_out = static_cast<uInt>(out.size());
    deflate(&z, Z_FINISH);
    out.resize(z.total_out);
    deflateEnd(&z);
    return out;
}

std::vector<uint8_t> patterned(size_t bytes) {
    std::vector<uint8_t> data(bytes);
    for (size_t i = 0; i < bytes; i++) data[i] = static_cast<uint8_t>((i * i) >> 7);
    return data;
}

}  // namespace

TEST_CASE("qcow2: a slice cache that covers the disk keeps everything", "[qcow2][cache]") {
    const uint32_t slice = GENERATE(512, 4096);
    auto cache = make_cache(slice, 100);
    for (uint64_t s = 0; s < 100; s++) {
        CHECK_FALSE(cache->find(s));
        cache->insert(s, slice_of(s + 1, slice).data());
    }
    CHECK(cache->resident() == 100);
    for (uint64_t s = 0; s < 100; s++) {
        auto view = cache->find(s);
        REQUIRE(view);
        CHECK(view->word(0) == s + 1);
        CHECK(view->word(slice / 8 - 1) == s + 1);
        CHECK(view->still_valid());
    }
    cache->insert(7, slice_of(1000, slice).data());
    CHECK(cache->find(7)->word(3) == 8);  // what is here is never older
    cache->invalidate(7);
    CHECK_FALSE(cache->find(7));
    CHECK(cache->resident() == 99);
}

TEST_CASE("qcow2: a small slice cache evicts and says so to late readers", "[qcow2][cache]") {
    auto cache = make_cache(512, 2);
    const uint64_t room = cache->slots();
    for (uint64_t s = 0; s < room; s++) cache->insert(s, slice_of(s, 512).data());
    auto early = cache->find(0);
    REQUIRE(early);
    for (uint64_t s = room; s < 3 * room; s++) cache->insert(s, slice_of(s, 512).data());
    CHECK(cache->resident() == room);
    CHECK_FALSE(early->still_valid());
    CHECK_FALSE(cache->find(0));
    CHECK(cache->find(3 * room - 1)->word(0) == 3 * room - 1);
}

TEST_CASE("qcow2: cleaning drops what was not used since the last cleaning", "[qcow2][cache]") {
    auto cache = make_cache(4096, 64);
    for (uint64_t s = 0; s < 64; s++) cache->insert(s, slice_of(s, 4096).data());
    cache->clean();  // all are fresh
    CHECK(cache->resident() == 64);
    CHECK(cache->find(5));
    auto late = cache->find(6);
    REQUIRE(late);
    CHECK(cache->find(6)->word(0) == 6);
    cache->clean();
    CHECK(cache->resident() == 2);
    CHECK(cache->find(5));
    CHECK_FALSE(cache->find(7));
    cache->invalidate(6);
    CHECK_FALSE(late->still_valid());
}

TEST_CASE("qcow2: readers of the slice cache never see mixed slices", "[qcow2][cache]") {
    auto cache = make_cache(512, 8);
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> torn{0}, hits{0};
    std::vector<std::thread> readers;
    for (int t = 0; t < 2; t++) {
        readers.emplace_back([&] {
            uint64_t slice = 0;
            while (!stop.load(std::memory_order_relaxed)) {
                slice = (slice + 1) % 24;
                const auto view = cache->find(slice);
                if (!view) continue;
                const uint64_t first = view->word(0), last = view->word(63);
                if (!view->still_valid()) continue;
                hits.fetch_add(1, std::memory_order_relaxed);
                if (first != last || first % 24 != slice) torn.fetch_add(1, std::memory_order_relaxed);
            }
        });
    }
    for (uint64_t round = 0; round < 4000 || (hits.load() < 1000 && round < 4000000); round++) {
        cache->invalidate(round % 24);
        cache->insert(round % 24, slice_of(round, 512).data());
        if (round % 64 == 0) cache->clean();
    }
    stop = true;
    for (auto& reader : readers) reader.join();
    CHECK(torn.load() == 0);
    CHECK(hits.load() > 0);
}

TEST_CASE("qcow2: cache sizes follow the options", "[qcow2][options]") {
    const Geometry geometry{.cluster_bits = 16};
    const auto sizes = [&](json::object o, uint64_t disk = uint64_t{1} << 40) {
        auto r = cache_sizes(schema::Options(o), geometry, disk, "q");
        INFO((r ? "" : r.error().message()));
        REQUIRE(r);
        return *r;
    };
    const auto refused = [&](json::object o) {
        auto r = cache_sizes(schema::Options(o), geometry, uint64_t{1} << 40, "q");
        return r ? std::string() : r.error().message();
    };
    constexpr uint64_t kMiB = 1 << 20;
    CHECK(sizes({}).l2_bytes == 32 * kMiB);  // 128 MiB would be needed
    CHECK(sizes({}).refcount_bytes == 4 * 65536);
    CHECK(sizes({}).l2_slice_bytes == 4096);
    CHECK(sizes({}).clean_interval_s == 600);
    CHECK(sizes({}, 1 << 30).l2_bytes == 131072);
    CHECK(sizes({}, 0).l2_bytes == 8192);
    CHECK(sizes({{"l2-cache-size", 9000000000000000000}}).l2_bytes == 128 * kMiB);
    CHECK(sizes({{"cache-size", 1 << 20}}).l2_bytes == kMiB - 4 * 65536);
    CHECK(sizes({{"cache-size", 1 << 20}, {"refcount-cache-size", 1 << 19}}).l2_bytes == kMiB / 2);
    CHECK(sizes({{"cache-size", 1 << 22}, {"l2-cache-size", 1 << 20}}).refcount_bytes == 3 * kMiB);
    CHECK(sizes({{"cache-clean-interval", 0}, {"l2-cache-entry-size", 512}}).l2_slice_bytes == 512);

    CHECK(refused({{"cache-size", 1}, {"l2-cache-size", 1}, {"refcount-cache-size", 1}})
              .starts_with("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"));
    CHECK(refused({{"cache-size", 1024}, {"l2-cache-size", 2048}})
              .starts_with("l2-cache-size may not exceed cache-size"));
    CHECK(refused({{"cache-size", 1024}, {"refcount-cache-size", 2048}})
              .starts_with("refcount-cache-size may not exceed cache-size"));
    CHECK(refused({{"refcount-cache-size", 9000000000000000000}}).starts_with("Refcount cache size too big"));
    for (const int64_t size : {0, 256, 1000, 131072}) {
        CHECK(refused({{"l2-cache-entry-size", size}})
                  .starts_with("L2 cache entry size must be a power of two between 512 and the cluster size (65536)"));
    }
    CHECK(refused({{"cache-clean-interval", 5000000000}}).starts_with("Cache clean interval too big"));
    CHECK(refused({{"l2-cache-size", -1}})
              .starts_with("Parameter 'l2-cache-size' expects a non-negative number below 2^64"));
}

TEST_CASE("qcow2: deflate and zstd clusters are decoded, damaged ones refused", "[qcow2][compressed][malformed]") {
    const std::vector<uint8_t> data = patterned(65536);
    std::vector<uint8_t> blob = deflated(data);
    Compression type = Compression::kDeflate;
    SECTION("deflate") {}
    SECTION("zstd") {
        type = Compression::kZstd;
        blob.resize(ZSTD_compressBound(data.size()));
        blob.resize(ZSTD_compress(blob.data(), blob.size(), data.data(), data.size(), 3));
    }
    std::vector<uint8_t> out(65536);
    REQUIRE(decompress(type, blob, out));
    CHECK(out == data);

    auto trailed = blob;  // the next cluster's data follows in the same sector
    trailed.insert(trailed.end(), {0xde, 0xad, 0xbe, 0xef});
    std::fill(out.begin(), out.end(), 0);
    REQUIRE(decompress(type, trailed, out));
    CHECK(out == data);

    std::vector<uint8_t> half(32768);  // a stream of more than a cluster: the cluster is what counts
    REQUIRE(decompress(type, blob, half));
    CHECK(std::equal(half.begin(), half.end(), data.begin()));

    std::vector<uint8_t> more(131072);
    auto early = decompress(type, blob, more);
    REQUIRE_FALSE(early);
    CHECK(early.error().kind() == ErrorKind::kCorrupt);
    CHECK(early.error().message().find("65536 of 131072") != std::string::npos);
    CHECK_FALSE(decompress(type, std::span(blob).first(blob.size() / 2), out));
    CHECK_FALSE(decompress(type, {}, out));
    CHECK_FALSE(decompress(type, std::vector<uint8_t>(1000, 0xff), out));
    CHECK_FALSE(decompress(type, std::vector<uint8_t>(1000, 0), out));
}

TEST_CASE("qcow2: a zstd frame cannot ask for a giant window", "[qcow2][compressed][malformed]") {
    // Magic, a descriptor without single segment, window descriptor for 128 MiB, an empty last block.
    const std::vector<uint8_t> frame = {0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x88, 0x01, 0x00, 0x00};
    std::vector<uint8_t> out(65536);
    auto r = decompress(Compression::kZstd, frame, out);
    REQUIRE_FALSE(r);
    CHECK(r.error().message().find("memory") != std::string::npos);
}

TEST_CASE("qcow2: decoded clusters are kept, the oldest makes room", "[qcow2][compressed]") {
    DecodedClusters clusters(2);
    bool mine = false;
    auto a = clusters.find_or_begin(100, mine);
    CHECK(mine);
    a->data = Buffer::alloc(512);
    clusters.finish(a);
    CHECK(clusters.find_or_begin(100, mine) == a);
    CHECK_FALSE(mine);
    clusters.finish(clusters.find_or_begin(200, mine));
    CHECK(clusters.find_or_begin(100, mine) == a);
    clusters.finish(clusters.find_or_begin(300, mine));  // 200 goes: 100 was used later
    CHECK(clusters.find_or_begin(100, mine) == a);
    CHECK_FALSE(mine);

    auto failed = clusters.find_or_begin(400, mine);
    CHECK(mine);
    failed->error = Error(ErrorKind::kCorrupt, "broken");
    clusters.finish(failed);
    clusters.finish(clusters.find_or_begin(400, mine));
    CHECK(mine);  // tried again
    clusters.clean();
    clusters.clean();
    CHECK(clusters.size() == 0);
}
