// Compressed writes as a job makes them: several workers, clusters of the size of the image, each written once.

#include <catch2/catch.hpp>

#include <random>

#include "block/crypto/secrets.h"
#include "schema/json_dialect.h"
#include "tests/unit/block/qcow2_write_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::WriteFlags;

namespace {

/// Of each 1000 bytes `noise` are random, so that a cluster shrinks to a little more than that part.
std::vector<uint8_t> mixed(uint64_t size, unsigned noise, unsigned seed) {
    std::vector<uint8_t> data(size, static_cast<uint8_t>(seed));
    std::mt19937 random(seed);
    for (uint64_t i = 0; i < size; i++) {
        if (i % 1000 < noise) data[i] = static_cast<uint8_t>(random());
    }
    return data;
}

struct Workers {
    block::Channel* channel;
    const std::vector<uint8_t>* data;
    uint64_t cluster;
    uint64_t next = 0;
    std::string error;

    static Task<void> work(Workers* w) {
        while (w->error.empty() && w->next < w->data->size()) {
            const uint64_t at = w->next;
            const uint64_t length = std::min(w->cluster, w->data->size() - at);
            w->next += length;
            std::vector<uint8_t> part(w->data->begin() + static_cast<ptrdiff_t>(at),
                                      w->data->begin() + static_cast<ptrdiff_t>(at + length));
            const Result<> done = co_await write_channel(w->channel, at, std::move(part), WriteFlags::kCompressed);
            if (!done) w->error = done.error().message();
        }
    }
    static Task<std::string> all(Workers w, unsigned count) {
        TaskScope scope;
        for (unsigned i = 0; i < count; i++) scope.spawn(work(&w));
        co_await scope.join();
        co_return w.error;
    }
};

}  // namespace

TEST_CASE("qcow2: blobs of many workers lie one behind the other, over the ends of clusters",
          "[qcow2][write][compressed][interop][long]") {
    if (no_qemu()) return;
    const std::string type = GENERATE("zlib", "zstd");
    const auto [cluster, size] = GENERATE(
        table<uint64_t, uint64_t>({{512, 300'032}, {4096, 1'000'448}, {65536, 5'000'192}, {2 << 20, 21'000'192}}));
    const std::string more = cluster == 65536 ? GENERATE("", ",extended_l2=on") : std::string();
    INFO(type << " " << cluster << more);
    WriteFixture f;
    const std::string path =
        f.create(fmt::format("-o compression_type={},cluster_size={}{}", type, cluster, more), size);
    const std::vector<uint8_t> data = mixed(size, 500, 7);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.rt.run_on_io(Workers::all({f.channel, &data, cluster, 0, {}}, 8)) == "");
    auto read = f.read(0, size);
    REQUIRE(read);
    CHECK(*read == data);
    f.close();
    CHECK(f.check(path) == 0);
    CHECK(f.contents(path) == data);
    // Of the smallest clusters some do not shrink.
    const json::object report =
        schema::parse_json(shell("qemu-img check --output=json " + path).output).value().as_object();
    const uint64_t clusters = (size + cluster - 1) / cluster;
    const auto compressed = report.at("compressed-clusters").to_number<uint64_t>();
    CHECK((cluster == 512 ? compressed > clusters * 9 / 10 : compressed == clusters));
    // A blob is more than half a cluster: apart from each other they would take as much as the data.
    if (cluster >= 4096) CHECK(WriteFixture::allocated_bytes(path) < size * 3 / 4 + 6 * cluster);

    // Overwritten in part and whole, and zeroed.
    REQUIRE(f.open_image(path) == "");
    REQUIRE(f.write(cluster / 2, cluster, 'n') == "");
    REQUIRE(f.write(4 * cluster, cluster, 'c', WriteFlags::kCompressed) == "");
    REQUIRE(f.zero(6 * cluster, cluster, WriteFlags::kMayUnmap) == "");
    f.close();
    CHECK(f.check(path) == 0);
    std::vector<uint8_t> now = data;
    const auto fill = [&](uint64_t at, uint8_t byte) {
        std::fill_n(now.begin() + static_cast<ptrdiff_t>(at), cluster, byte);
    };
    fill(cluster / 2, 'n');
    fill(4 * cluster, 'c');
    fill(6 * cluster, 0);
    CHECK(f.contents(path) == now);
}

TEST_CASE("qcow2: what cannot be compressed is stored, among blobs", "[qcow2][write][compressed][interop]") {
    if (no_qemu()) return;
    const std::string type = GENERATE("zlib", "zstd");
    constexpr uint64_t kSize = 3'000'320, kCluster = 16384;
    WriteFixture f;
    const std::string path = f.create("-o cluster_size=16k,compression_type=" + type, kSize);
    std::vector<uint8_t> data = mixed(kSize, 300, 3);
    std::mt19937 random(9);
    for (uint64_t at = 0; at < kSize; at += 3 * kCluster) {
        for (uint64_t i = at; i < std::min(at + kCluster, kSize); i++) data[i] = static_cast<uint8_t>(random());
    }
    REQUIRE(f.open_image(path) == "");
    CHECK(f.rt.run_on_io(Workers::all({f.channel, &data, kCluster, 0, {}}, 8)) == "");
    f.close();
    CHECK(f.check(path) == 0);
    CHECK(f.contents(path) == data);
    REQUIRE(f.open_image(path) == "");
    auto noise = f.status(0, 1), blob = f.status(kCluster, 1);
    REQUIRE(noise);
    REQUIRE(blob);
    CHECK_FALSE(noise->compressed);
    CHECK(blob->compressed);
}

TEST_CASE("qcow2: compressed and encrypted do not go together", "[qcow2][write][compressed][crypto][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    REQUIRE(f.rt.run(f.graph->secrets().add({{"qom-type", "secret"}, {"id", "s"}, {"data", "sesame"}})));
    const std::string path =
        f.create("--object secret,id=s,data=sesame -o encrypt.format=aes,encrypt.key-secret=s", 1 << 20);
    REQUIRE(f.open_image(path, {{"encrypt", json::object{{"format", "aes"}, {"key-secret", "s"}}}}) == "");
    CHECK_THAT(f.write(0, 65536, 1, WriteFlags::kCompressed), Catch::Contains("encrypt"));
    CHECK(f.filled_with(0, 65536) == 0);
}
