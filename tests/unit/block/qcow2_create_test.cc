#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <random>

#include "block/create.h"
#include "block/crypto/secrets.h"
#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/create_layout.h"
#include "block/formats/qcow2/entries.h"
#include "tests/unit/block/qcow2_create_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::block::qcow2;
using namespace gantry::test;

namespace {

CreateOptions geometry(uint32_t cluster_bits, uint32_t refcount_order, uint64_t size, Preallocation preallocation) {
    CreateOptions o;
    o.cluster_bits = cluster_bits;
    o.refcount_order = refcount_order;
    o.size = size;
    o.preallocation = preallocation;
    return o;
}

}  // namespace

TEST_CASE("qcow2 create: refcount structures count themselves exactly", "[qcow2][create]") {
    const uint32_t bits = GENERATE(9u, 12u, 16u);
    const uint32_t order = GENERATE(0u, 3u, 4u, 6u);
    const uint64_t per_block = (uint64_t{8} << bits) >> order;
    for (const uint64_t others :
         {uint64_t{2}, per_block - 2, per_block - 1, per_block, per_block * 64, per_block * 65}) {
        const RefcountSpace space = refcount_space(others, bits, order);
        const uint64_t all = others + space.blocks + space.table_clusters;
        CHECK(space.blocks * per_block >= all);
        CHECK(space.table_clusters * (uint64_t{1} << (bits - 3)) >= space.blocks);
        // One less would not do.
        CHECK((space.blocks - 1) * per_block < all);
        CHECK((space.table_clusters - 1) << (bits - 3) < space.blocks);
    }
}

TEST_CASE("qcow2 create: metadata is the same in any pieces", "[qcow2][create]") {
    CreateOptions o = geometry(9, GENERATE(0u, 1u, 2u, 3u, 4u, 5u, 6u), 700 * 512, Preallocation::kMetadata);
    auto layout = plan_layout(o, GENERATE(0, 1300));
    REQUIRE(layout);
    const uint64_t begin = 512, bytes = layout->data_offset - begin;
    std::vector<uint8_t> whole(bytes), pieces(bytes);
    fill_metadata(*layout, begin, whole);
    uint64_t step = 8;
    for (uint64_t at = 0; at < bytes; step = step % 4096 + 24) {
        const uint64_t now = std::min(step, bytes - at);
        fill_metadata(*layout, begin + at, std::span(pieces).subspan(at, now));
        at += now;
    }
    CHECK(whole == pieces);

    // Every cluster of the file has the count 1, and none beyond it.
    const auto at = [&](uint64_t offset) { return whole.data() + (offset - begin); };
    const uint64_t per_block = 4096 >> o.refcount_order;
    uint64_t ones = 0;
    for (uint64_t c = 0; c < layout->refcount_blocks * per_block; c++) {
        const uint64_t block = load_be64(at(layout->refcount_table_offset + c / per_block * 8));
        const uint64_t bit = (c % per_block) << o.refcount_order;
        const uint8_t* p = at(block + bit / 8);
        uint64_t count = 0;
        if (o.refcount_order < 3) {
            count = (*p >> (bit % 8)) & ((1u << (1u << o.refcount_order)) - 1);
        } else {
            for (uint32_t i = 0; i < 1u << (o.refcount_order - 3); i++) count = count << 8 | p[i];
        }
        CHECK(count == (c < layout->clusters ? 1 : 0));
        ones += count;
    }
    CHECK(ones == layout->clusters);
    // The last guest cluster is mapped to the last one of the file.
    const uint64_t l2 = l2_table_offset(load_be64(at(layout->l1_offset + 699 / 64 * 8)));
    CHECK((load_be64(at(l2 + 699 % 64 * 8)) & kOffsetMask) == layout->file_bytes() - 512);
    CHECK(load_be64(at(l2 + (699 % 64 + 1) * 8)) == 0);
}

TEST_CASE("qcow2 create: layouts beyond the limits are refused", "[qcow2][create]") {
    // 128 GiB in clusters of 512 bytes with counts of 64 bits: the refcount table would be 32 MiB.
    auto refused = plan_layout(geometry(9, 6, uint64_t{128} << 30, Preallocation::kMetadata), 0);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind() == ErrorKind::kTooLarge);
    CHECK_THAT(refused.error().message(), Catch::StartsWith("The image size is too large for file format 'qcow2' (try "
                                                            "using a larger cluster size); its refcount table"));
    CHECK(plan_layout(geometry(9, 6, uint64_t{128} << 30, Preallocation::kOff), 0));
    CHECK_FALSE(plan_layout(geometry(21, 4, uint64_t{1} << 61, Preallocation::kMetadata), 0));
    CHECK(plan_layout(geometry(21, 4, uint64_t{1} << 61, Preallocation::kOff), 0));
}

TEST_CASE("qcow2 create: refusals have the reference's sentences", "[qcow2][create]") {
    struct Row {
        const char* members;
        const char* sentence;
    };
    const auto row = GENERATE(values<Row>({
        {"'size': 1000", "Image size must be a multiple of 512 bytes"},
        {"'size': 512, 'cluster-size': 256", "Cluster size must be a power of two between 512 and 2048k"},
        {"'size': 512, 'cluster-size': 5000", "Cluster size must be a power of two between 512 and 2048k"},
        {"'size': 512, 'cluster-size': 0", "Cluster size must be a power of two between 512 and 2048k"},
        {"'size': 512, 'cluster-size': 4194304", "Cluster size must be a power of two between 512 and 2048k"},
        {"'size': 512, 'refcount-bits': 7", "Refcount width must be a power of two and may not exceed 64 bits"},
        {"'size': 512, 'refcount-bits': 0", "Refcount width must be a power of two and may not exceed 64 bits"},
        {"'size': 512, 'refcount-bits': -8", "Refcount width must be a power of two and may not exceed 64 bits"},
        {"'size': 512, 'refcount-bits': 128", "Refcount width must be a power of two and may not exceed 64 bits"},
        {"'size': 512, 'version': 'v2', 'refcount-bits': 8",
         "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"},
        {"'size': 512, 'version': 'v2', 'lazy-refcounts': true",
         "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
        {"'size': 512, 'version': 'v2', 'extended-l2': true",
         "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
        {"'size': 512, 'version': 'v2', 'data-file': 'd'",
         "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"},
        {"'size': 512, 'version': 'v2', 'compression-type': 'zstd'",
         "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or "
         "greater)"},
        {"'size': 512, 'extended-l2': true, 'cluster-size': 8192",
         "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"},
        {"'size': 512, 'data-file-raw': true", "data-file-raw requires data-file"},
        {"'size': 512, 'data-file-raw': true, 'data-file': 'd', 'backing-file': 'b'",
         "Backing file and data-file-raw cannot be used at the same time"},
        {"'size': 512, 'preallocation': 'metadata', 'backing-file': 'b'",
         "Backing file and preallocation can only be used at the same time if extended_l2 is on"},
        {"'size': 512, 'backing-fmt': 'raw'", "Backing format cannot be used without backing file"},
        {"'size': 3377699720527872, 'cluster-size': 65536",
         "The image size is too large for file format 'qcow2' (try using a larger cluster size)"},
        {"'size': 9223372036854775296, 'cluster-size': 2097152",
         "The image size is too large for file format 'qcow2' (try using a larger cluster size)"},
        {"'size': 137438953984, 'cluster-size': 512",
         "The image size is too large for file format 'qcow2' (try using a larger cluster size)"},
        {"'size': 512", "Cannot find device='zz' nor node-name='zz'"},
    }));
    CreateFixture f;
    CHECK_THAT(f.create(fmt::format("{{'driver': 'qcow2', 'file': 'zz', {}}}", row.members)),
               Catch::StartsWith(row.sentence));
    CHECK(f.graph->nodes().empty());
}

TEST_CASE("qcow2 create: the largest disks of a cluster size", "[qcow2][create]") {
    const auto [bits, size] =
        GENERATE(table<int, uint64_t>({{9, uint64_t{128} << 30}, {16, uint64_t{2} << 50}, {21, uint64_t{2} << 60}}));
    CreateFixture f;
    const std::string path = f.dir.file("x");
    REQUIRE(f.create_file("qcow2", path, fmt::format("size={},cluster_size={}", size, 1 << bits)) == "");
    REQUIRE(f.open_file(path) == "");
    CHECK(f.node->size() == size);
    CHECK(f.filled_with(size - 4096, 4096) == 0);
    CHECK(f.create_file("qcow2", path, fmt::format("size={},cluster_size={}", size + 512, 1 << bits)) != "");
}

TEST_CASE("qcow2 create: drivers that make nothing are refused", "[qcow2][create]") {
    CreateFixture f;
    CHECK_THAT(f.create("{'driver': 'raw'}"), Catch::StartsWith("Driver does not support blockdev-create"));
    CHECK_THAT(f.create("{'driver': 'memory'}"), Catch::StartsWith("Driver does not support blockdev-create"));
    CHECK_THAT(f.create_file("memory", f.dir.file("x"), "size=1"),
               Catch::Contains("Format driver 'memory' does not support image creation"));
    CHECK_THAT(f.create_file("nix", f.dir.file("x"), "size=1"), Catch::Contains("Unknown file format 'nix'"));
    CHECK_THAT(f.create_file("raw", f.dir.file("x"), "size=1,cluster_size=512"),
               Catch::Contains("Invalid parameter 'cluster_size'"));
    CHECK_THAT(f.create_file("qcow2", f.dir.file("x"), "size=1,foo=512"), Catch::Contains("Invalid parameter 'foo'"));
    CHECK_THAT(f.create_file("qcow2", f.dir.file("x"), "compat=1.1"),
               Catch::Contains("Image creation needs a size parameter"));
    CHECK_FALSE(std::filesystem::exists(f.dir.file("x")));
}

TEST_CASE("qcow2 create: words that make no sense leave no file", "[qcow2][create]") {
    const auto [words, sentence] = GENERATE(table<const char*, const char*>({
        {"compat=9", "Parameter 'version' does not accept value '9'"},
        {"cluster_size=x", "Parameter 'cluster_size' expects a size"},
        {"lazy_refcounts=maybe", "Parameter 'lazy_refcounts' expects 'on' or 'off'"},
        {"refcount_bits=-1", "Parameter 'refcount_bits' expects a number"},
        {"refcount_bits=3", "Refcount width must be a power of two"},
        {"preallocation=foo", "Parameter 'preallocation' does not accept value 'foo'"},
        {"compression_type=lz4", "Parameter 'compression-type' does not accept value 'lz4'"},
        {"backing_file=b", "Backing file specified without backing format"},
        {"backing_fmt=raw", "Backing format cannot be used without backing file"},
        {"data_file_raw=on", "data-file-raw requires data-file"},
        {"data_file=x", "the data file 'x' is the image itself"},
        {"size=9E", "Invalid image size specified. Must be between 0 and 9223372036854775807;"},
        {"backing_file=b,backing_fmt=a_format_of_sixteen", "Backing format name too long"},
    }));
    CreateFixture f;
    CHECK_THAT(f.create_file("qcow2", f.dir.file("x"), std::string("size=1M,") + words), Catch::Contains(sentence));
    CHECK_FALSE(std::filesystem::exists(f.dir.file("x")));
}

TEST_CASE("qcow2 create: images are what qemu-img makes of the same options", "[qcow2][create][interop][once]") {
    if (!Qcow2Fixture::has_tool("qemu-img")) {
        WARN("skipped: qemu-img is not installed");
        return;
    }
    const std::string cluster = GENERATE("512", "64k", "2M");
    const std::string layout =
        GENERATE("", "refcount_bits=1", "refcount_bits=8", "refcount_bits=64", "compat=0.10", "extended_l2=on",
                 "lazy_refcounts=on,compression_type=zstd", "data_file=DATA", "data_file=DATA,data_file_raw=on",
                 "data_file=DATA,extended_l2=on", "data_file=DATA,data_file_raw=on,extended_l2=on");
    if (layout.find("extended") < layout.size() && cluster == "512") return;
    CreateFixture f;
    const bool plain = layout.empty() || layout == "data_file=DATA" || layout == "extended_l2=on";
    for (const std::string preallocation : {"off", "metadata", "falloc", "full"}) {
        if (!plain && preallocation.starts_with("f")) continue;
        const std::string size = cluster == "2M" ? "33333k" : cluster == "512" ? "333k" : "3333k";
        const auto words = [&](const std::string& data) {
            std::string text = fmt::format("cluster_size={},preallocation={}", cluster, preallocation);
            if (!layout.empty()) text += "," + layout;
            if (const size_t at = text.find("DATA"); at < text.size()) text.replace(at, 4, data);
            return text;
        };
        INFO(words("D"));
        const std::string ours = f.dir.file("ours"), theirs = f.dir.file("theirs");
        // The reference looks for data files where it was started, we where the image is.
        const std::string here = "cd " + f.dir.path() + " && ";
        f.sh(fmt::format("cd {} && qemu-img create -q -f qcow2 -o {} theirs {}", f.dir.path(), words("theirs.data"),
                         size));
        REQUIRE(f.create_file("qcow2", ours, words("ours.data") + ",size=" + size) == "");
        CHECK(f.info(here, ours) == f.info(here, theirs));
        CHECK_THAT(output_of(here + "qemu-img check " + ours),
                   Catch::StartsWith("No errors were found on the image.\n"));
        CHECK_THAT(output_of(here + "qemu-img compare -f qcow2 -F qcow2 -U " + ours + " " + theirs),
                   Catch::StartsWith("Images are identical."));
        // With subclusters the reference maps a raw data file, but calls nothing in it allocated.
        const bool raw_subclusters = layout.find("raw=on,ext") < layout.size();
        CHECK(f.mapped(here, ours) == (raw_subclusters ? f.size_of(size) : f.mapped(here, theirs)));
        // Space was taken where it was asked for.
        if (preallocation.starts_with("f")) {
            const bool beside = layout.starts_with("data_file");
            CHECK(f.blocks(beside ? f.dir.file("ours.data") : ours) * 512 >= f.size_of(size));
        }
        // We read it too.
        REQUIRE(f.open_file(ours) == "");
        CHECK(f.filled_with(0, 333 << 10) == 0);
        f.close();
    }
}

TEST_CASE("qcow2 create: names of other files are stored as given", "[qcow2][create][interop]") {
    if (!Qcow2Fixture::has_tool("qemu-img")) {
        WARN("skipped: qemu-img is not installed");
        return;
    }
    CreateFixture f;
    f.sh("qemu-img create -q -f raw " + f.dir.file("base") + " 1M");
    const std::string compat = GENERATE("0.10", "1.1");
    const std::string here = "cd " + f.dir.path() + " && ";
    const std::string words = "compat=" + compat + ",backing_file=base,backing_fmt=raw";
    REQUIRE(f.create_file("qcow2", f.dir.file("ours"), words + ",size=2M") == "");
    f.sh(here + "qemu-img create -q -f qcow2 -o " + words + " theirs 2M");
    CHECK(f.info(here, f.dir.file("ours")) == f.info(here, f.dir.file("theirs")));
    CHECK_THAT(f.info(here, f.dir.file("ours")), Catch::Contains("backing file: base"));
    CHECK_THAT(output_of(here + "qemu-img check ours"), Catch::StartsWith("No errors"));
    REQUIRE(f.open_file(f.dir.file("ours")) == "");
    CHECK(f.image().image().full_backing_name == f.dir.file("base"));

    // Preallocated subclusters let the backing file show.
    if (compat == "0.10") return;
    f.sh("qemu-io -f raw -c 'write -P 7 0 1M' " + f.dir.file("base") + " > /dev/null");
    REQUIRE(f.create_file("qcow2", f.dir.file("sub"), words + ",size=2M,extended_l2=on,preallocation=metadata") == "");
    CHECK_THAT(output_of(here + "qemu-img check sub"), Catch::StartsWith("No errors"));
    REQUIRE(f.open_file(f.dir.file("sub")) == "");
    CHECK(f.filled_with(0, 1 << 20) == 7);
    CHECK(f.filled_with(1 << 20, 1 << 20) == 0);
}

TEST_CASE("qcow2 create: by command over nodes by name and by definition", "[qcow2][create]") {
    CreateFixture f;
    auto added = f.rt.run(f.graph->add(options_of("{'driver': 'memory', 'node-name': 'm', 'disk': 'image'}")));
    REQUIRE(added);
    // What was there before is gone, however long it was.
    auto disk = MemoryDisk::named("image");
    const std::vector<uint8_t> junk(3 << 20, 0xaa);
    disk->write(0, junk.data(), junk.size());
    REQUIRE(f.rt.run(f.graph->resize(**added, 3 << 20)));
    CHECK(f.create("{'driver': 'qcow2', 'file': 'm', 'size': 1048576, 'cluster-size': 4096}") == "");
    CHECK((*added)->size() < 100000);
    REQUIRE(f.open({{"file", "m"}}) == "");
    CHECK(f.node->size() == 1 << 20);
    CHECK(f.filled_with(0, 1 << 20) == 0);

    // In use by a reader that minds.
    CHECK_THAT(f.create("{'driver': 'qcow2', 'file': 'm', 'size': 1048576}"), Catch::Contains("q"));
    CHECK(f.filled_with(0, 1 << 20) == 0);
    f.close();
    CHECK(f.create("{'driver': 'qcow2', 'file': {'driver': 'memory', 'disk': 'image'}, 'size': 2097152}") == "");
    CHECK(f.graph->nodes().size() == 1);
    CHECK_THAT(f.create("{'driver': 'qcow2', 'size': 512, 'file': {'driver': 'memory', 'disk': 'image', "
                        "'read-only': true}}"),
               Catch::Contains("read-only"));
    CHECK(f.graph->nodes().size() == 1);
}

TEST_CASE("qcow2 create: a device that cannot be resized is zeroed as far as needed", "[qcow2][create]") {
    CreateFixture f;
    auto disk = MemoryDisk::named("image");
    const std::vector<uint8_t> junk(8 << 20, 0xaa);
    disk->write(0, junk.data(), junk.size());
    const std::string device = "{'driver': 'raw', 'size': 8388608, 'file': {'driver': 'memory', 'disk': 'image'}}";
    const std::string preallocation = GENERATE("off", "metadata", "full");
    CHECK(f.create("{'driver': 'qcow2', 'file': " + device + ", 'size': 4194304, 'preallocation': '" + preallocation +
                   "'}") == "");
    REQUIRE(f.open({{"file", options_of(device)}}) == "");
    CHECK(f.filled_with(0, 4 << 20) == 0);
    CHECK(disk->bytes((8 << 20) - 1, 1) == std::vector<uint8_t>{0xaa});
    f.close();
    if (preallocation == "off") return;
    CHECK_THAT(f.create("{'driver': 'qcow2', 'file': " + device + ", 'size': 8388608, 'preallocation': 'metadata'}"),
               Catch::Contains("and it cannot be made larger"));
}

TEST_CASE("qcow2 create: a raw data file keeps what it holds", "[qcow2][create]") {
    CreateFixture f;
    auto data = MemoryDisk::named("data");
    const std::vector<uint8_t> contents(100000, 0x55);
    data->write(0, contents.data(), contents.size());
    const bool raw = GENERATE(true, false);
    const std::string data_file = "{'driver': 'memory', 'disk': 'data'}";
    CHECK(f.create(fmt::format("{{'driver': 'qcow2', 'file': {{'driver': 'memory', 'disk': 'image'}}, 'size': 1048576, "
                               "'data-file': {}, 'data-file-raw': {}, 'preallocation': 'metadata'}}",
                               data_file, raw)) == "");
    CHECK(data->size() == 1 << 20);
    REQUIRE(f.open({{"file", {{"driver", "memory"}, {"disk", "image"}}}, {"data-file", options_of(data_file)}}) == "");
    CHECK(f.filled_with(0, 100000) == (raw ? 0x55 : 0));
    CHECK(f.filled_with(100000, (1 << 20) - 100000) == 0);
    f.close();
    MemoryDisk::forget("data");
}

TEST_CASE("qcow2 create: cancelled, there is no image", "[qcow2][create]") {
    CreateFixture f;
    auto disk = MemoryDisk::named("image");
    TinyImage old;
    f.put_memory(old);
    int calls = 0;
    CHECK(f.create("{'driver': 'qcow2', 'file': {'driver': 'memory', 'disk': 'image'}, 'size': 67108864, "
                   "'preallocation': 'full'}",
                   [&](uint64_t done, uint64_t total) {
                       CHECK(done <= total);
                       return ++calls < 4;
                   }) == "cancelled");
    CHECK_FALSE(parse_header(disk->bytes(0, 112), "q"));
}

TEST_CASE("qcow2 create: a write that fails leaves no image and no file", "[qcow2][create]") {
    CreateFixture f;
    TinyImage old;
    f.put_memory(old);
    auto disk = MemoryDisk::named("image");
    disk->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kWrite ? ENOSPC : 0; });
    CHECK_THAT(f.create("{'driver': 'qcow2', 'file': {'driver': 'memory', 'disk': 'image'}, 'size': 1048576}"),
               Catch::StartsWith("Could not write metadata; "));
    CHECK_FALSE(parse_header(disk->bytes(0, 112), "q"));
}

TEST_CASE("qcow2 create: a power cut leaves the old image, none, or the new one", "[qcow2][create][crash]") {
    // Three journals of different layouts.
    const std::string members = GENERATE("'cluster-size': 512", "'cluster-size': 4096, 'preallocation': 'metadata'",
                                         "'cluster-size': 512, 'preallocation': 'full'");
    CreateFixture f;
    TinyImage old;
    StampClock clock;
    auto disk = std::make_shared<JournalDisk>(clock, old.bytes);
    JournalDisk::publish("cut", disk);
    CHECK(f.create("{'driver': 'qcow2', 'file': {'driver': 'journal', 'disk': 'cut'}, 'size': 65536, " + members +
                   "}") == "");
    JournalDisk::forget("cut");
    const std::vector<uint8_t> made = disk->contents();
    std::mt19937_64 random(7);
    int olds = 0, nones = 0, news = 0;
    for (const Stamp t : disk->moments()) {
        for (const auto loss : {JournalDisk::Loss::kNothing, JournalDisk::Loss::kAll, JournalDisk::Loss::kRandom,
                                JournalDisk::Loss::kTorn}) {
            const std::vector<uint8_t> left = disk->after_cut(t, loss, random);
            if (!parse_header(std::span(left).first(std::min<size_t>(left.size(), 112)), "q")) {
                nones++;
            } else if (left == made) {
                news++;
            } else {
                // Not one byte of the old image is missing.
                REQUIRE(left.size() >= old.bytes.size());
                CHECK(std::equal(old.bytes.begin(), old.bytes.end(), left.begin()));
                olds++;
            }
        }
    }
    CHECK(olds > 0);
    CHECK(nones > 0);
    CHECK(news > 0);
}

TEST_CASE("file create: sizes and space", "[file][create]") {
    CreateFixture f;
    const std::string path = f.dir.file("x");
    CHECK(f.create("{'driver': 'file', 'filename': '" + path + "', 'size': 1000}") == "");
    CHECK(f.length(path) == 1000);
    CHECK(f.create("{'driver': 'file', 'filename': '" + path + "', 'size': 1048576, 'preallocation': 'falloc'}") == "");
    CHECK(f.length(path) == 1 << 20);
    CHECK(f.blocks(path) * 512 >= 1 << 20);
    // The tool rounds up to sectors.
    CHECK(f.create_file("raw", path, "size=1000") == "");
    CHECK(f.length(path) == 1024);
    CHECK(f.blocks(path) == 0);
    CHECK(f.create_file("raw", path, "size=20M,preallocation=full") == "");
    CHECK(f.blocks(path) * 512 >= 20 << 20);
    CHECK(f.create_file("raw", path, "size=0") == "");
    CHECK(f.length(path) == 0);

    CHECK_THAT(f.create("{'driver': 'file', 'filename': '" + path + "', 'size': 512, 'preallocation': 'metadata'}"),
               Catch::StartsWith("Unsupported preallocation mode: metadata"));
    CHECK(f.create("{'driver': 'file', 'filename': '/nix/n', 'size': 1}") ==
          "Could not create '/nix/n': No such file or directory");
    CHECK(f.create("{'driver': 'file', 'filename': '" + f.dir.path() + "', 'size': 1}") ==
          "Could not create '" + f.dir.path() + "': Is a directory");
    CHECK_THAT(f.create("{'driver': 'file', 'filename': '/dev/null', 'size': 1}"),
               Catch::Contains("neither a file nor a block device"));
    const std::string fresh = f.dir.file("fresh");
    CHECK_THAT(f.create("{'driver': 'file', 'filename': '" + fresh + "', 'size': 9223372036854775807}"),
               Catch::StartsWith("Could not resize file"));
    CHECK_FALSE(std::filesystem::exists(fresh));
}

TEST_CASE("file create: a file in use is not touched", "[file][create]") {
    CreateFixture f;
    const std::string path = f.dir.file("x");
    f.put_text(path, "precious\n");
    auto added = f.rt.run(f.graph->add(options_of("{'driver': 'file', 'node-name': 'x', 'filename': '" + path + "'}")));
    REQUIRE(added);
    block::RootOptions writer;
    writer.perms = {Perm::kConsistentRead | Perm::kWrite, Perm::kConsistentRead};
    writer.user = "a guest";
    auto root = f.rt.run(f.graph->attach(**added, std::move(writer)));
    REQUIRE(root);
    const std::string format = GENERATE("raw", "qcow2");
    CHECK_THAT(f.create_file(format, path, "size=1M"), Catch::Contains("lock"));
    CHECK(f.length(path) == 9);
    f.rt.run(f.graph->detach(std::move(*root)));
}

TEST_CASE("qcow2 create: encrypted images open here and in qemu-io", "[qcow2][create][luks][interop][once]") {
    CreateFixture f;
    REQUIRE(f.rt.run(f.graph->secrets().add({{"qom-type", "secret"}, {"id", "s"}, {"data", "a passphrase"}})));
    const std::string more = GENERATE("", ",cluster_size=512", ",preallocation=metadata", ",compat=0.10",
                                      ",extended_l2=on,preallocation=metadata,encrypt.cipher-alg=aes-128");
    const std::string path = f.dir.file("x");
    REQUIRE(f.create_file("qcow2", path,
                          "size=1M,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10" + more) == "");
    REQUIRE(f.open_file(path, {{"encrypt", {{"format", "luks"}, {"key-secret", "s"}}}}) == "");
    CHECK(f.image().image().header.crypt_method == 2);
    CHECK(f.filled_with(0, 1 << 20) == 0);
    f.close();
    if (!Qcow2Fixture::has_tool("qemu-io")) {
        WARN("skipped: qemu-io is not installed");
        return;
    }
    const std::string open =
        " --object secret,id=s,data='a passphrase' --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=" +
        path;
    CHECK_THAT(output_of("qemu-img check" + open), Catch::StartsWith("No errors were found on the image.\n"));
    CHECK_THAT(output_of("qemu-io" + open + " -c 'read -P 0 0 1M' -c 'write -P 5 100k 300k' -c 'read -P 5 100k 300k'"),
               !Catch::Contains("failed") && !Catch::Contains("can't open"));
    CHECK_THAT(output_of("qemu-img check" + open), Catch::StartsWith("No errors were found on the image.\n"));
    REQUIRE(f.open_file(path, {{"encrypt", {{"format", "luks"}, {"key-secret", "s"}}}}) == "");
    CHECK(f.filled_with(100 << 10, 300 << 10) == 5);
    CHECK(f.filled_with(0, 100 << 10) == 0);
}

TEST_CASE("qcow2 create: encryption that cannot be made touches nothing", "[qcow2][create][luks]") {
    const auto [words, sentence] = GENERATE(table<const char*, const char*>({
        {"encrypt.format=luks", "Parameter 'encrypt.key-secret' is required for cipher"},
        {"encrypt.format=luks,encrypt.key-secret=none", "No secret with id 'none'"},
        {"encrypt.format=aes,encrypt.key-secret=s", "are not created any more"},
        {"encryption=on", "are not created any more"},
        {"encryption=on,encrypt.format=luks", "Options encryption and encrypt.format are mutually exclusive"},
        {"encrypt.key-secret=s", "Parameter 'encrypt.format' is missing"},
        {"encrypt.format=foo", "does not accept value 'foo'"},
        {"encrypt.format=luks,encrypt.cipher-alg=rot13", "does not accept value 'rot13'"},
        {"compat=0.10,preallocation=metadata,encrypt.format=luks,encrypt.key-secret=s",
         "Preallocation of encrypted images needs compatibility level 1.1"},
    }));
    CreateFixture f;
    REQUIRE(f.rt.run(f.graph->secrets().add({{"qom-type", "secret"}, {"id", "s"}, {"data", "a passphrase"}})));
    const std::string path = f.dir.file("x");
    f.put_text(path, "precious\n");
    CHECK_THAT(f.create_file("qcow2", path, std::string("size=1M,") + words), Catch::Contains(sentence));
    CHECK(f.length(path) == 9);
}
