#include <catch2/catch.hpp>

#include "block/formats/qcow2/bitmap_directory.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/snapshot_table.h"
#include "tests/unit/block/qcow2_tiny_image.h"

using namespace gantry;
using namespace gantry::block::qcow2;
using test::TinyImage;

namespace {

/// What opening does with the first cluster; "" or the refusal.
std::string header_refusal(const std::vector<uint8_t>& bytes) {
    const std::span<const uint8_t> file(bytes);
    auto header = parse_header(file.first(std::min<size_t>(file.size(), kHeaderBytesKnown)), "q");
    if (!header) return header.error().message();
    const size_t from = std::min<size_t>(file.size(), header->header_length);
    const auto area = file.subspan(from, std::min<size_t>(file.size() - from, header->extensions_end() - from));
    if (auto r = check_features(*header, parse_feature_names(area), "q"); !r) return r.error().message();
    auto extensions = parse_extensions(*header, area, "q");
    if (!extensions) return extensions.error().message();
    auto valid = validate_header(*header, *extensions, "q");
    return valid ? std::string() : valid.error().message();
}

std::string refusal(const TinyImage& image) { return header_refusal(image.bytes); }

struct Patch {
    const char* name;
    uint64_t offset;
    unsigned width;  // bytes
    uint64_t value;
    const char* sentence;  // how the refusal begins
    const char* detail;    // what it says about the place and the value
};

constexpr Patch kPatches[] = {
    {"magic", 0, 4, 0x12345678, "Image is not in qcow2 format", "51 46 49 fb"},
    {"version 1", 4, 4, 1, "Unsupported qcow2 version 1", "byte 4"},
    {"version 4", 4, 4, 4, "Unsupported qcow2 version 4", "byte 4"},
    {"cluster_bits 8", 20, 4, 8, "Unsupported cluster size: 2^8", "byte 20 is 8"},
    {"cluster_bits 22", 20, 4, 22, "Unsupported cluster size: 2^22", "byte 20 is 22"},
    {"cluster_bits huge", 20, 4, 0xffffffff, "Unsupported cluster size", "byte 20"},
    {"header_length short", 100, 4, 96, "qcow2 header too short", "byte 100 is 96"},
    {"header_length odd", 100, 4, 105, "qcow2 header length is not a multiple of 8", "byte 100 is 105"},
    {"header_length long", 100, 4, 520, "qcow2 header exceeds cluster size", "byte 100 is 520"},
    {"unknown feature", 72, 8, uint64_t{1} << 40,
     "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000", "byte 72"},
    {"next unknown feature", 72, 8, 0x20, "Unsupported qcow2 feature(s): Unknown incompatible feature: 20", "byte 72"},
    {"extended L2 with small clusters", 72, 8, 16, "Unsupported subcluster size: 16", "byte 20 is 9"},
    {"refcount_order", 96, 4, 7, "Reference count entry width too large; may not exceed 64 bits", "byte 96 is 7"},
    {"crypt_method", 32, 4, 3, "Unsupported encryption method 3", "byte 32 is 3"},
    {"LUKS without extension", 32, 4, 2, "Missing CRYPTO header for crypt method 2", "0x0537be77"},
    {"compression bit alone", 72, 8, 8, "qcow2: Compression type incompatible feature bit must not be set",
     "byte 104 is 0"},
    {"compression type alone", 104, 1, 1, "qcow2: Compression type incompatible feature bit must be set",
     "byte 104 is 1"},
    {"compression type 2", 104, 1, 2, "qcow2: unknown compression type: 2", "byte 104 is 2"},
    {"raw external alone", 88, 8, 2, "data-file-raw requires a data file", "byte 88"},
    {"no refcount table", 56, 4, 0, "Image does not contain a reference count table", "byte 56 is 0"},
    {"refcount table large", 56, 4, 16385, "Reference count table too large", "byte 56 is 16385"},
    {"refcount table huge", 56, 4, 0xffffffff, "Reference count table too large", "byte 56"},
    {"refcount table unaligned", 48, 8, 0x201, "Reference count table offset invalid", "0x201"},
    {"refcount table wraps", 48, 8, 0x7ffffffffffffe00, "Reference count table offset invalid", "0x7ffffffffffffe00"},
    {"refcount table beyond", 48, 8, 0xfffffffffffffe00, "Reference count table offset invalid", "0xfffffffffffffe00"},
    {"L1 large", 36, 4, 4194305, "Active L1 table too large", "4194305"},
    {"L1 huge", 36, 4, 0xffffffff, "Active L1 table too large", "4294967295"},
    {"L1 unaligned", 40, 8, 0x601, "Active L1 table offset invalid", "0x601"},
    {"L1 in the header", 40, 8, 0, "Active L1 table offset invalid", "lie in the header"},
    {"L1 wraps", 40, 8, 0x8000000000000000, "Active L1 table offset invalid", "0x8000000000000000"},
    {"L1 too small", 36, 4, 0, "L1 table is too small", "0 entries"},
    {"disk beyond L1", 24, 8, 32769, "L1 table is too small", "32769"},
    {"disk beyond any L1", 24, 8, uint64_t{1} << 62, "Image is too big", "4611686018427387904"},
    {"disk negative", 24, 8, uint64_t{1} << 63, "Image is too big", "9223372036854775808"},
    {"disk of all ones", 24, 8, ~uint64_t{0}, "Image is too big", "18446744073709551615"},
    {"many snapshots", 60, 4, 65537, "Snapshot table too large", "byte 60 is 65537"},
    {"backing name before the end of the header", 8, 8, 100, "Invalid backing file offset", "byte 8 is 0x64"},
    {"backing name outside cluster 0", 8, 8, 513, "Invalid backing file offset", "byte 8 is 0x201"},
    {"backing name far outside", 8, 8, 0x7ffffffffffffff0, "Invalid backing file offset", "byte 8"},
};

}  // namespace

TEST_CASE("qcow2: the header of a sound image is accepted", "[qcow2][header]") {
    CHECK(refusal(TinyImage()) == "");
    auto header = parse_header(std::span<const uint8_t>(TinyImage().bytes).first(112), "q");
    REQUIRE(header);
    CHECK(header->version == 3);
    CHECK(header->size == 32768);
    CHECK(header->l1_table_offset == 1536);
    CHECK(header->geometry().l1_shift() == 15);
    CHECK(header->geometry().l1_entries_for(32768) == 1);
    CHECK(header->geometry().l1_entries_for(32769) == 2);
}

TEST_CASE("qcow2: version 2 implies what its header lacks", "[qcow2][header]") {
    TinyImage image;
    image.put32(4, 2);
    image.put64(72, 0).put64(80, 0).put64(88, 0).put64(96, 0).put64(104, 0);
    CHECK(refusal(image) == "");
    auto header = parse_header(std::span<const uint8_t>(image.bytes).first(72), "q");
    REQUIRE(header);
    CHECK(header->refcount_order == 4);
    CHECK(header->header_length == 72);
    CHECK_FALSE(header->geometry().zero_flag);
}

TEST_CASE("qcow2: each broken header field is refused with its place and value", "[qcow2][header][malformed]") {
    for (const Patch& patch : kPatches) {
        TinyImage image;
        if (patch.width == 1) image.put8(patch.offset, static_cast<uint8_t>(patch.value));
        if (patch.width == 4) image.put32(patch.offset, static_cast<uint32_t>(patch.value));
        if (patch.width == 8) image.put64(patch.offset, patch.value);
        const std::string text = refusal(image);
        INFO(patch.name << ": " << text);
        CHECK(text.starts_with(patch.sentence));
        CHECK(text.find(patch.detail) != std::string::npos);
        CHECK(text.find("node 'q'") != std::string::npos);
    }
}

TEST_CASE("qcow2: combinations of header fields that contradict each other are refused", "[qcow2][header][malformed]") {
    CHECK(refusal(TinyImage().incompatible(8).put8(104, 2)).starts_with("qcow2: unknown compression type: 2"));
    CHECK(refusal(TinyImage().incompatible(8).put8(104, 1)) == "");
    CHECK(refusal(TinyImage().incompatible(4).autoclear(2).put64(8, 256).put32(16, 3))
              .starts_with("Backing file and data-file-raw cannot be used at the same time"));
    CHECK(refusal(TinyImage().snapshots(1, 0x201)).starts_with("Snapshot table offset invalid"));
    CHECK(refusal(TinyImage().snapshots(1, 0x7ffffffffffffe00)).starts_with("Snapshot table offset invalid"));
    CHECK(refusal(TinyImage().put64(8, 256).put32(16, 1024)).starts_with("Backing file name too long"));
    CHECK(refusal(TinyImage().put64(8, 500).put32(16, 13)).starts_with("Backing file name too long"));
    CHECK(refusal(TinyImage().put64(8, 500).put32(16, 12)) == "");
    // compression_type is absent when the header ends at 104: byte 104 belongs to the extensions then.
    CHECK(refusal(TinyImage().put32(100, 104)) == "");
}

TEST_CASE("qcow2: files shorter than their header are refused at every length", "[qcow2][header][malformed]") {
    const TinyImage image;
    for (size_t length = 0; length < 104; length++) {
        const std::string text =
            header_refusal({image.bytes.begin(), image.bytes.begin() + static_cast<ptrdiff_t>(length)});
        INFO(length << ": " << text);
        CHECK(text.starts_with(length < 4 ? "Image is not in qcow2 format" : "qcow2 header too short"));
    }
    CHECK(header_refusal({image.bytes.begin(), image.bytes.begin() + 112}) == "");
}

TEST_CASE("qcow2: unknown features are named from the image's own table", "[qcow2][extensions]") {
    std::string table(96, '\0');
    table[1] = 40;
    table.replace(2, 11,
                  "flux\x01"
                  "buffer");
    table[48] = 1;  // a compatible feature of the same number: not meant
    table[49] = 41;
    table.replace(50, 5, "wrong");
    const std::string text = refusal(TinyImage().incompatible(uint64_t{3} << 40).extension(112, 0x6803f857, table));
    CHECK(text.starts_with("Unsupported qcow2 feature(s): flux?buffer, Unknown incompatible feature: 20000000000;"));
}

TEST_CASE("qcow2: extensions are read in any order and unknown ones kept", "[qcow2][extensions]") {
    TinyImage image;
    image.extension(112, 0x11223344, "abc")
        .extension(128, 0xe2792aca, "raw")
        .extension(144, 0x44415441, "d.raw")
        .put32(160, 0);
    auto header = parse_header(std::span<const uint8_t>(image.bytes).first(112), "q");
    REQUIRE(header);
    auto e = parse_extensions(*header, std::span<const uint8_t>(image.bytes).subspan(112, 400), "q");
    REQUIRE(e);
    CHECK(e->backing_format == "raw");
    CHECK(e->data_file == "d.raw");
    REQUIRE(e->unknown.size() == 1);
    CHECK(e->unknown[0].type == 0x11223344);
    CHECK(e->unknown[0].data == std::vector<uint8_t>{'a', 'b', 'c'});
}

TEST_CASE("qcow2: malformed extensions are refused", "[qcow2][extensions][malformed]") {
    const auto with = [](uint32_t type, uint32_t length) {
        return refusal(TinyImage().put32(112, type).put32(116, length));
    };
    CHECK(with(0x12345678, 512).starts_with("Header extension too large"));
    CHECK(with(0x12345678, 393).starts_with("Header extension too large"));
    CHECK(with(0x12345678, 392) == "");
    CHECK(with(0x12345678, 0xfffffff9).starts_with("Header extension too large"));
    CHECK(with(0x12345678, 0xffffffff).find("byte 112 announces 4294967295 bytes") != std::string::npos);
    CHECK(with(0xe2792aca, 16).starts_with("ERROR: ext_backing_format: len=16 too large (>=16)"));
    CHECK(with(0xe2792aca, 15) == "");
    CHECK(with(0x0537be77, 16).starts_with("CRYPTO header extension only expected with LUKS encryption method"));
    CHECK(with(0x23852875, 16).starts_with("bitmaps_ext: Invalid extension length"));
    // The backing file name ends the space.
    CHECK(refusal(TinyImage().put64(8, 120).put32(16, 4).put32(112, 0x12345678).put32(116, 8))
              .starts_with("Header extension too large"));
    CHECK(refusal(TinyImage().extension(112, 0xe2792aca, "raw").extension(128, 0xe2792aca, "raw"))
              .starts_with("Duplicate header extension"));

    const auto luks = [](uint32_t length, uint64_t offset, uint64_t bytes) {
        return refusal(
            TinyImage().put32(32, 2).put32(112, 0x0537be77).put32(116, length).put64(120, offset).put64(128, bytes));
    };
    CHECK(luks(8, 0, 0).starts_with("CRYPTO header extension size 8, but expected size 16"));
    CHECK(luks(16, 1, 0).starts_with("Encryption header offset '1' is not a multiple of cluster size '512'"));
    CHECK(luks(16, 1024, ~uint64_t{0}).starts_with("Encryption header does not fit"));
    CHECK(luks(16, 1024, (uint64_t{256} << 20) + 1).starts_with("Encryption header too large"));
    CHECK(luks(16, 1024, 512) == "");
}

TEST_CASE("qcow2: malformed bitmaps extensions are refused", "[qcow2][bitmaps][malformed]") {
    const auto with = [](uint32_t count, uint32_t reserved, uint64_t size, uint64_t offset) {
        return refusal(TinyImage().bitmaps_extension(count, reserved, size, offset));
    };
    CHECK(with(1, 0, 32, 4096) == "");
    CHECK(with(0, 0, 32, 4096).starts_with("found bitmaps extension with zero bitmaps"));
    CHECK(with(65536, 0, 32, 4096).starts_with("bitmaps_ext: too many bitmaps"));
    CHECK(with(1, 1, 32, 4096).starts_with("bitmaps_ext: Reserved field is not zero"));
    CHECK(with(1, 0, 32, 4097).starts_with("bitmaps_ext: invalid bitmap directory offset"));
    CHECK(with(1, 0, 32, 0x8000000000000000).starts_with("bitmaps_ext: invalid bitmap directory offset"));
    CHECK(with(1, 0, 0, 4096).starts_with("Requested bitmap directory size is zero"));
    CHECK(with(1, 0, uint64_t{1} << 30, 4096)
              .starts_with(
                  "bitmaps_ext: bitmap directory size (1073741824) exceeds the maximum supported size (67107840)"));
    // Without the autoclear bit nothing in it counts.
    CHECK(refusal(TinyImage().bitmaps_extension(0, 1, 0, 1).autoclear(0)) == "");
}

TEST_CASE("qcow2: bitmap directories are read, malformed ones refused", "[qcow2][bitmaps][malformed]") {
    const Geometry geometry{.cluster_bits = 9};
    const auto parse = [&](const TinyImage& image, uint32_t count, uint64_t size) {
        return parse_bitmap_directory(std::span<const uint8_t>(image.bytes).subspan(4096, size), {count, size, 4096},
                                      geometry, "q");
    };
    const auto refused = [&](const TinyImage& image, uint32_t count = 1, uint64_t size = 32) {
        auto r = parse(image, count, size);
        return r ? std::string() : r.error().message();
    };
    const auto entry = [](uint64_t table, uint32_t entries, uint32_t flags, uint8_t type, uint8_t granularity,
                          std::string_view name) {
        TinyImage image;
        image.grow(8192);
        return image.bitmap_entry(4096, table, entries, flags, type, granularity, name);
    };
    auto good = parse(entry(8192, 1, 2, 1, 16, "b0"), 1, 32);
    REQUIRE(good);
    CHECK(good->at(0).name == "b0");
    CHECK(good->at(0).granularity() == 65536);
    CHECK(good->at(0).consistent(geometry, 32768));
    CHECK_FALSE(good->at(0).consistent(geometry, uint64_t{1} << 40));  // would need more table entries

    CHECK(refused(entry(8192, 1, 0, 2, 16, "b")).find("type 0x2") != std::string::npos);
    CHECK(refused(entry(8192, 1, 8, 1, 16, "b")).find("unknown flags 0x8") != std::string::npos);
    CHECK(refused(entry(8192, 1, 0, 1, 16, "")).starts_with("Bitmap '' doesn't satisfy the constraints"));
    CHECK(refused(entry(8192, 1, 0, 1, 8, "b")).find("granularity bits 0x8") != std::string::npos);
    CHECK(refused(entry(8192, 1, 0, 1, 32, "b")).find("granularity bits 0x20") != std::string::npos);
    CHECK(refused(entry(8193, 1, 0, 1, 16, "b")).find("table offset 0x2001") != std::string::npos);
    CHECK(refused(entry(0, 1, 0, 1, 16, "b")).find("table offset 0x0") != std::string::npos);
    CHECK(refused(entry(8192, 0, 0, 1, 16, "b")).find("table entries 0x0") != std::string::npos);
    CHECK(refused(entry(8192, 0xffffffff, 0, 1, 16, "b")).find("table entries 0xffffffff") != std::string::npos);
    CHECK(refused(entry(8192, 1, 0, 1, 16, "b").put16(4096 + 18, 1024), 1, 1048).find("name length 0x400") !=
          std::string::npos);
    CHECK(refused(entry(8192, 1, 0, 1, 16, "b").put32(4096 + 20, 0xffffffff)).find("runs past the directory") !=
          std::string::npos);
    CHECK(refused(entry(8192, 1, 0, 1, 16, "b"), 2, 32).find("entry 1 of 2") != std::string::npos);
    CHECK(refused(entry(8192, 1, 0, 1, 16, "b"), 1, 64).find("1 entries end at byte 32") != std::string::npos);
    auto twice = entry(8192, 1, 0, 1, 16, "b").bitmap_entry(4096 + 32, 8192, 1, 0, 1, 16, "b");
    CHECK(refused(twice, 2, 64).starts_with("Bitmap 'b' appears twice"));
}

TEST_CASE("qcow2: snapshot tables are read in pieces, malformed ones refused", "[qcow2][snapshot][malformed]") {
    TinyImage image;
    image.snapshot_entry(4096, 1536, 1, '7', 'n', 32768).snapshot_entry(4096 + 64, 1536, 1, 'n', '7', 512);
    const auto table = std::span<const uint8_t>(image.bytes).subspan(4096, 128);
    auto whole = parse_snapshot_table(table, 2, true, "q");
    REQUIRE(whole);
    REQUIRE(whole->has_value());
    const std::vector<Snapshot>& snapshots = **whole;
    CHECK(snapshots[0].id == "7");
    CHECK(snapshots[0].name == "n");
    CHECK(snapshots[0].disk_size == 32768);
    CHECK(snapshots[0].date_sec == 1234);
    CHECK(find_snapshot(snapshots, "7") == &snapshots[0]);  // an id goes before a name
    CHECK(find_snapshot(snapshots, "n") == &snapshots[1]);
    CHECK(find_snapshot(snapshots, "x") == nullptr);

    for (size_t length = 0; length < 122; length++) {
        INFO(length);
        auto part = parse_snapshot_table(table.first(length), 2, false, "q");
        REQUIRE(part);
        CHECK_FALSE(part->has_value());
        auto cut = parse_snapshot_table(table.first(length), 2, true, "q");
        REQUIRE_FALSE(cut);
        CHECK(cut.error().message().starts_with("Failed to read snapshot table"));
    }
    image.put32(4096 + 36, 1025);
    auto extra = parse_snapshot_table(table, 2, true, "q");
    REQUIRE_FALSE(extra);
    CHECK(extra.error().message().starts_with("Too much extra metadata in snapshot table entry 0"));
}
