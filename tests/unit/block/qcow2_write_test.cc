// Writing: what ends up in the file, case by case. Random operations: qcow2_write_model_test.cc.

#include <catch2/catch.hpp>

#include <sys/mman.h>

#include <filesystem>
#include <fstream>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/compress.h"
#include "tests/unit/block/qcow2_write_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::WriteFlags;

namespace {

Task<void> drain_once(block::Graph* graph, block::Node* node) {
    auto guard = co_await graph->mutex().lock();
    block::Node* nodes[] = {node};
    co_await graph->drain(nodes);
    co_await graph->undrain(nodes);
}

}  // namespace

TEST_CASE("qcow2: what is written into a fresh image is there for qemu", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string path = f.create("", 4 << 20);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.write(70'000, 5'000, 'x') == "");
    CHECK(f.write(1 << 20, 300'000, 'y') == "");
    CHECK(f.try_write(70'100, 10, 'z') == 0);  // in place now
    CHECK(f.filled_with(70'000, 100) == 'x');
    CHECK(f.filled_with(70'110, 4'890) == 'x');
    CHECK(f.filled_with(65'536, 4'464) == 0);
    f.close();
    CHECK(f.check(path) == 0);
    const std::vector<uint8_t> disk = f.contents(path);
    CHECK(all_of(disk, 70'000, 100, 'x'));
    CHECK(all_of(disk, 70'100, 10, 'z'));
    CHECK(all_of(disk, 1 << 20, 300'000, 'y'));
    CHECK(all_of(disk, (1 << 20) + 300'000, 1'000'000, 0));
}

TEST_CASE("qcow2: a write into a shared cluster copies it first", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string path = f.create("", 1 << 20);
    Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -P 7 0 1M' " + path);
    Qcow2Fixture::sh("qemu-img snapshot -c before " + path);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.try_write(1000, 10, 9) == -EAGAIN);
    CHECK(f.write(1000, 10, 9) == "");
    CHECK(f.filled_with(1000, 10) == 9);
    CHECK(f.filled_with(0, 1000) == 7);
    CHECK(f.filled_with(1010, 1'000'000) == 7);
    f.close();
    CHECK(f.check(path) == 0);
    REQUIRE(f.open_file(path, {{"snapshot", "before"}}) == "");
    CHECK(f.filled_with(0, 1 << 20) == 7);
}

TEST_CASE("qcow2: zeroes and discards give space back, over a backing file they hide it", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    const bool extended = GENERATE(false, true);
    WriteFixture f;
    const std::string base = f.dir.file("base.raw");
    std::ofstream(base) << std::string(4 << 20, 'b');
    const std::string path = f.create(
        fmt::format("-b {} -F raw -o cluster_size=64k,extended_l2={}", base, extended ? "on" : "off"), 4 << 20);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.write(0, 2 << 20, 'w') == "");
    CHECK(f.flush() == "");
    const uint64_t full = WriteFixture::allocated_bytes(path);
    CHECK(f.discard(0, 1 << 20) == "");
    CHECK(f.zero(1 << 20, 1 << 20, WriteFlags::kMayUnmap) == "");
    CHECK(f.zero(3 << 20, 1 << 19) == "");  // was never written here
    CHECK(f.filled_with(0, 2 << 20) == 0);
    CHECK(f.filled_with(2 << 20, 1 << 20) == 'b');
    CHECK(f.filled_with(3 << 20, 1 << 19) == 0);
    CHECK(f.flush() == "");
    CHECK(WriteFixture::allocated_bytes(path) + (1 << 20) < full);
    // A part of a cluster whose rest is zero anyway.
    CHECK(f.zero(100, 1000, WriteFlags::kNoFallback) == "");
    CHECK(f.zero((2 << 20) + 100, 1000, WriteFlags::kNoFallback) != "");
    f.close();
    CHECK(f.check(path) == 0);
    const std::vector<uint8_t> disk = f.contents(path);
    CHECK(all_of(disk, 0, 2 << 20, 0));
    CHECK(all_of(disk, 2 << 20, 1 << 20, 'b'));
    CHECK(all_of(disk, 3 << 20, 1 << 19, 0));
}

TEST_CASE("qcow2: zeroes that must stay allocated keep their clusters for the next write", "[qcow2][write]") {
    WriteFixture f;
    REQUIRE(f.open_tiny(TinyImage()) == "");
    CHECK(f.zero(0, 512) == "");
    CHECK(f.filled_with(0, 512) == 0);
    CHECK(f.write(100, 10, 'n') == "");
    auto s = f.status(100, 10);
    REQUIRE(s);
    CHECK(s->host_offset == TinyImage::kData + 100);  // where it was
    CHECK(f.filled_with(0, 100) == 0);
    CHECK(f.filled_with(110, 402) == 0);
}

TEST_CASE("qcow2: with discard-no-unref a discarded cluster keeps its place", "[qcow2][write]") {
    WriteFixture f;
    REQUIRE(f.open_tiny(TinyImage(), {{"discard-no-unref", true}}) == "");
    CHECK(f.discard(0, 512) == "");
    CHECK(f.filled_with(0, 512) == 0);
    CHECK(f.write(0, 512, 'n') == "");
    auto s = f.status(0, 512);
    REQUIRE(s);
    CHECK(s->host_offset == TinyImage::kData);
}

TEST_CASE("qcow2: zeroes over a huge absent range touch nothing", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string path = f.create("", uint64_t{64} << 40);
    REQUIRE(f.open_image(path) == "");
    const uint64_t before = std::filesystem::file_size(path);
    CHECK(f.zero(4096, (uint64_t{64} << 40) - 8192, WriteFlags::kMayUnmap) == "");
    CHECK(f.discard(0, uint64_t{64} << 40) == "");
    CHECK(f.image().slice_loads() == 0);
    f.close();
    CHECK(std::filesystem::file_size(path) == before);
}

TEST_CASE("qcow2: version 2 writes real zeroes where it has no zero state", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string base = f.dir.file("base.raw");
    std::ofstream(base) << std::string(1 << 20, 'b');
    const std::string path = f.create(fmt::format("-b {} -F raw -o compat=0.10", base), 1 << 20);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.zero(0, 65536, WriteFlags::kNoFallback) != "");
    CHECK(f.filled_with(0, 65536) == 'b');
    CHECK(f.zero(0, 65536, WriteFlags::kMayUnmap) == "");
    CHECK(f.filled_with(0, 65536) == 0);
    CHECK(f.discard(0, 65536) == "");  // ignored: the backing file would show
    CHECK(f.filled_with(0, 65536) == 0);
    f.close();
    CHECK(f.check(path) == 0);
    CHECK(all_of(f.contents(path), 0, 65536, 0));
}

TEST_CASE("qcow2: compressed writes are packed, read back and overwritten", "[qcow2][write][compressed][interop]") {
    if (no_qemu()) return;
    const std::string type = GENERATE("zlib", "zstd");
    WriteFixture f;
    const std::string path = f.create("-o compression_type=" + type, 1'000'448);  // the last cluster is a part
    REQUIRE(f.open_image(path) == "");
    for (unsigned i = 0; i < 16; i++) {
        const uint64_t at = i * 65536, length = std::min<uint64_t>(65536, 1'000'448 - at);
        CHECK(f.write(at, length, static_cast<uint8_t>('A' + i), WriteFlags::kCompressed) == "");
    }
    auto s = f.status(0, 1000);
    REQUIRE(s);
    CHECK(s->compressed);
    // Not to be compressed: stored as it is.
    std::vector<uint8_t> noise(65536);
    std::mt19937 random(3);
    for (uint8_t& b : noise) b = static_cast<uint8_t>(random());
    CHECK(f.write_bytes(65536, noise, WriteFlags::kCompressed) == "");
    CHECK(f.write(2 * 65536 + 100, 50, 'w') == "");
    CHECK(f.write(3 * 65536, 65536, 'W', WriteFlags::kCompressed) == "");
    CHECK(f.filled_with(3 * 65536, 65536) == 'W');
    CHECK(f.filled_with(2 * 65536 + 100, 50) == 'w');
    f.close();
    CHECK(f.check(path) == 0);
    CHECK(WriteFixture::allocated_bytes(path) < 800'000);
    const std::vector<uint8_t> disk = f.contents(path);
    CHECK(all_of(disk, 0, 65536, 'A'));
    CHECK(std::equal(noise.begin(), noise.end(), disk.begin() + 65536));
    CHECK(all_of(disk, 2 * 65536, 100, 'C'));
    CHECK(all_of(disk, 2 * 65536 + 100, 50, 'w'));
    CHECK(all_of(disk, 2 * 65536 + 150, 65536 - 150, 'C'));
    CHECK(all_of(disk, 3 * 65536, 65536, 'W'));
    CHECK(all_of(disk, 15 * 65536, 1'000'448 - 15 * 65536, 'P'));
}

TEST_CASE("qcow2: compressed writes are refused where the format has none", "[qcow2][write][compressed][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string path = f.create("-o data_file=" + f.dir.file("d.raw"), 1 << 20);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.write(0, 65536, 1, WriteFlags::kCompressed) ==
          "node 'q': images with an external data file hold no compressed clusters");
    CHECK(f.filled_with(0, 65536) == 0);
}

TEST_CASE("qcow2: a write that would hit metadata marks the image corrupt", "[qcow2][write][corrupt]") {
    WriteFixture f;
    TinyImage image;
    image.put64(TinyImage::kL2, TinyImage::kL1 | TinyImage::kCopied);
    REQUIRE(f.open_tiny(image) == "");
    CHECK(f.filled_with(0, 8) != -2);  // reading it is harmless
    CHECK(f.try_write(0, 512, 'x') == -EAGAIN);
    CHECK(f.write(0, 512, 'x') ==
          "node 'q': image is corrupt: Preventing invalid write on metadata (overlaps with active L1 table)");
    CHECK(f.write(8192, 512, 'x') == "node 'q': the image is marked corrupt and takes no more writes");
    CHECK(f.zero(8192, 512) != "");
    CHECK(f.discard(8192, 512) != "");
    CHECK(f.flush() != "");
    f.settle();
    REQUIRE(f.observer.events.size() == 1);
    CHECK(f.observer.events[0].fatal);
    CHECK(f.observer.events[0].offset == TinyImage::kL1);
    CHECK(f.observer.events[0].size == 512);
    const auto disk = MemoryDisk::named("image");
    CHECK(disk->bytes(72, 8)[7] == 2);
    CHECK(disk->bytes(TinyImage::kL1, 8) == std::vector<uint8_t>{0x80, 0, 0, 0, 0, 0, 8, 0});
}

TEST_CASE("qcow2: a mapping far beyond the file does not make it grow", "[qcow2][write][corrupt]") {
    WriteFixture f;
    TinyImage image;
    image.put64(TinyImage::kL2, uint64_t{1} << 50 | TinyImage::kCopied);
    REQUIRE(f.open_tiny(image) == "");
    CHECK(f.write(0, 512, 'x').find("beyond the end of the file") != std::string::npos);
    CHECK(MemoryDisk::named("image")->size() < 65536);
}

TEST_CASE("qcow2: opening and closing without a write leaves the file as it is", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string path = f.create("", 1 << 20);
    Qcow2Fixture::sh("qemu-io -f qcow2 -c 'write -P 7 0 100k' " + path);
    const std::vector<uint8_t> before = Qcow2Fixture::bytes_of(path);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.filled_with(0, 100 << 10) == 7);
    f.close();
    CHECK(Qcow2Fixture::bytes_of(path) == before);
    REQUIRE(f.open_file(path) == "");
    f.close();
    CHECK(Qcow2Fixture::bytes_of(path) == before);
}

TEST_CASE("qcow2: unknown autoclear bits are gone before the first write", "[qcow2][write]") {
    WriteFixture f;
    TinyImage image;
    image.autoclear(uint64_t{1} << 40);
    REQUIRE(f.open_memory(image) == "");
    CHECK(MemoryDisk::named("image")->bytes(88, 8)[2] == 1);
    REQUIRE(f.open_tiny(image) == "");
    CHECK(MemoryDisk::named("image")->bytes(88, 8) == std::vector<uint8_t>(8));
}

TEST_CASE("qcow2: after a crash the next writable open finds what was flushed and no leak", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    const std::string options = GENERATE("cluster_size=4k", "lazy_refcounts=on,cluster_size=4k", "compat=0.10");
    INFO(options);
    WriteFixture f;
    const std::string path = f.create("-o " + options, 8 << 20);
    REQUIRE(f.open_image(path) == "");
    for (unsigned i = 0; i < 50; i++) CHECK(f.write(i * 100'000, 9'000, static_cast<uint8_t>(i + 1)) == "");
    CHECK(f.flush() == "");
    for (unsigned i = 0; i < 20; i++) CHECK(f.write(i * 100'000 + 50'000, 5'000, 0xaa) == "");
    const std::string copy = f.dir.file("copy.qcow2");
    std::filesystem::copy_file(path, copy);  // what kill -9 leaves
    f.close();
    CHECK(f.check(path) == 0);

    if (options.find("lazy") == std::string::npos) CHECK((f.check(copy) == 0 || f.check(copy) == 3));
    REQUIRE(f.open_image(copy) == "");
    for (unsigned i = 0; i < 50; i++) CHECK(f.filled_with(i * 100'000, 9'000) == static_cast<int>(i + 1));
    CHECK(f.write(7 << 20, 10, 1) == "");
    f.close();
    CHECK(f.check(copy) == 0);
}

TEST_CASE("qcow2: with a mapping log an acknowledged write survives a crash", "[qcow2][write][interop]") {
    if (no_qemu()) return;
    const std::string options =
        GENERATE("cluster_size=4k", "lazy_refcounts=on,cluster_size=4k", "extended_l2=on", "cluster_size=512");
    INFO(options);
    WriteFixture f;
    const std::string path = f.create("-o " + options, 8 << 20);
    UniqueFd log(::memfd_create("mapping-log", MFD_CLOEXEC));
    REQUIRE(log);
    f.graph->mapping_log_source = [&](const std::string&) -> Result<UniqueFd> { return UniqueFd(::dup(log.get())); };
    REQUIRE(f.open_image(path) == "");
    for (unsigned i = 0; i < 200; i++) CHECK(f.write(i * 40'000, 9'000, static_cast<uint8_t>(i + 1)) == "");
    CHECK(f.discard(0, 65'536) == "");
    const std::string copy = f.dir.file("copy.qcow2");
    std::filesystem::copy_file(path, copy);
    UniqueFd kept(::memfd_create("mapping-log-copy", MFD_CLOEXEC));
    std::vector<uint8_t> bytes(1 << 20);
    const ssize_t length = ::pread(log.get(), bytes.data(), bytes.size(), 0);
    REQUIRE(length == static_cast<ssize_t>(bytes.size()));
    REQUIRE(::pwrite(kept.get(), bytes.data(), bytes.size(), 0) == length);
    f.close();
    CHECK(f.check(path) == 0);

    log = std::move(kept);
    REQUIRE(f.open_image(copy) == "");
    CHECK(f.filled_with(0, 9'000) == 0);
    for (unsigned i = 2; i < 200; i++) {
        INFO(i);
        CHECK(f.filled_with(i * 40'000, 9'000) == static_cast<uint8_t>(i + 1));
    }
    f.close();
    CHECK(f.check(copy) == 0);
}

TEST_CASE("qcow2: a node goes from read-only to writable and back", "[qcow2][write][reopen][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string path = f.create("-o cluster_size=4k", 1 << 20);
    const json::object file{{"driver", "file"}, {"filename", path}};
    const auto definition = [&](bool read_only, json::object more = {}) {
        more["driver"] = "qcow2";
        more["node-name"] = "q";
        more["file"] = file;
        more["read-only"] = read_only;
        return more;
    };
    REQUIRE(f.open(definition(true)) == "");
    const auto reopen = [&](json::object options) {
        std::vector<json::object> list;
        list.push_back(std::move(options));
        return WriteFixture::text_of(f.rt.run(f.graph->reopen(std::move(list))));
    };
    const block::EdgePerms reads{block::Perm::kConsistentRead, block::Perm::kAll};
    const block::EdgePerms writes{block::Perm::kConsistentRead | block::Perm::kWrite, block::Perm::kAll};
    CHECK(f.write(0, 512, 1) != "");
    CHECK(reopen(definition(false)) == "");
    CHECK_FALSE(f.node->read_only());
    REQUIRE(f.rt.run(f.graph->set_perms(*f.root, writes)));
    CHECK(f.write(5000, 512, 1) == "");
    CHECK(reopen(definition(false, {{"discard-no-unref", true}, {"overlap-check", "all"}})) == "");
    CHECK(f.write(50'000, 512, 2) == "");
    CHECK(reopen(definition(true)) != "");  // somebody writes
    CHECK(f.write(60'000, 512, 3) == "");
    REQUIRE(f.rt.run(f.graph->set_perms(*f.root, reads)));
    CHECK(reopen(definition(true)) == "");
    CHECK(f.node->read_only());
    CHECK(f.check(path) == 0);
    CHECK(f.filled_with(5000, 512) == 1);
    CHECK(f.filled_with(50'000, 512) == 2);
    CHECK(f.filled_with(60'000, 512) == 3);
    CHECK(reopen(definition(true, {{"cluster-size", 1}})) != "");
}

TEST_CASE("qcow2: changed tables reach the file without a flush", "[qcow2][write][slow][interop]") {
    if (no_qemu()) return;
    WriteFixture f;
    const std::string path = f.create("-o cluster_size=4k", 1 << 20);
    REQUIRE(f.open_image(path) == "");
    CHECK(f.write(0, 4096, 1) == "");
    CHECK(f.image().l2_cache().dirty_count() == 1);
    CHECK(f.rt.run(wait_until([&] { return f.image().l2_cache().dirty_count() == 0; }, std::chrono::seconds(30))));
    f.rt.run(drain_once(f.graph.get(), f.node));  // what was taken is written
    const std::string copy = f.dir.file("copy.qcow2");
    std::filesystem::copy_file(path, copy);
    CHECK(all_of(f.contents(copy), 0, 4096, 1));
}

TEST_CASE("qcow2: what does not get smaller is not compressed", "[qcow2][compressed]") {
    using namespace block::qcow2;
    const Compression type = GENERATE(Compression::kDeflate, Compression::kZstd);
    std::vector<uint8_t> cluster(65536, 'a'), blob(65535), back(65536);
    const auto used = compress(type, cluster, blob);
    REQUIRE(used);
    CHECK(*used < 1000);
    REQUIRE(decompress(type, std::span(blob).first(*used), back));
    CHECK(back == cluster);
    std::mt19937 random(5);
    for (uint8_t& b : cluster) b = static_cast<uint8_t>(random());
    CHECK_FALSE(compress(type, cluster, blob));
}

TEST_CASE("qcow2: the words of compressed clusters say where they lie", "[qcow2][compressed]") {
    using namespace block::qcow2;
    const uint32_t bits = GENERATE(9, 16, 21);
    Geometry g{.cluster_bits = bits};
    for (const uint64_t host : {uint64_t{512}, uint64_t{1023}, uint64_t{0x123456789}, (uint64_t{1} << 49) - 512}) {
        for (const uint64_t bytes : {uint64_t{1}, uint64_t{511}, (uint64_t{1} << bits) - 1}) {
            const uint64_t word = compressed_word(g, host, bytes);
            REQUIRE(word != 0);
            const Blob blob = blob_of(g, {.word = word});
            CHECK(blob.host == host);
            CHECK(blob.bytes >= bytes);
            CHECK(blob.bytes < bytes + 512);
        }
    }
    CHECK(compressed_word(Geometry{.cluster_bits = 21}, uint64_t{1} << 49, 1) == 0);
}
