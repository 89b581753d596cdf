#include <algorithm>
#include <catch2/catch.hpp>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/header_writer.h"
#include "tests/unit/block/qcow2_tiny_image.h"

using namespace gantry;
using namespace gantry::block::qcow2;
using test::TinyImage;

namespace {

Image sample(uint32_t version, uint32_t cluster_bits) {
    Image image;
    Header& h = image.header;
    h.version = version;
    h.cluster_bits = cluster_bits;
    h.size = 3 << 20;
    h.l1_size = 7;
    h.l1_table_offset = uint64_t{3} << cluster_bits;
    h.refcount_table_offset = uint64_t{1} << cluster_bits;
    h.refcount_table_clusters = 2;
    h.nb_snapshots = 4;
    h.snapshots_offset = uint64_t{9} << cluster_bits;
    if (version >= 3) {
        h.incompatible_features = kIncompatDirty | kIncompatCompression;
        h.compatible_features = kCompatLazyRefcounts | uint64_t{1} << 50;
        h.autoclear_features = kAutoclearBitmaps;
        h.refcount_order = 3;
        h.compression_type = 1;
    }
    return image;
}

/// Everything that goes into a file, for comparison.
std::string text_of(const Image& image) {
    const Header& h = image.header;
    const Extensions& e = image.extensions;
    std::string text = fmt::format(
        "v{} cb{} size{} crypt{} l1 {}@{} rt {}@{} snap {}@{} inc{:x} com{:x} aut{:x} order{} comp{}", h.version,
        h.cluster_bits, h.size, h.crypt_method, h.l1_size, h.l1_table_offset, h.refcount_table_clusters,
        h.refcount_table_offset, h.nb_snapshots, h.snapshots_offset, h.incompatible_features, h.compatible_features,
        h.autoclear_features, h.refcount_order, h.compression_type);
    for (const uint8_t b : h.unknown_fields) text += fmt::format(" {:02x}", b);
    text += fmt::format(" backing '{}' format '{}' data '{}'", image.backing_name, e.backing_format, e.data_file);
    if (e.bitmaps)
        text +=
            fmt::format(" bitmaps {} {} {}", e.bitmaps->count, e.bitmaps->directory_size, e.bitmaps->directory_offset);
    if (e.crypto) text += fmt::format(" crypto {} {}", e.crypto->offset, e.crypto->length);
    if (e.session) text += fmt::format(" session {} {}", e.session->session, e.session->flags);
    for (const UnknownExtension& u : e.unknown) {
        text += fmt::format(" unknown {:x}", u.type);
        for (const uint8_t b : u.data) text += fmt::format(" {:02x}", b);
    }
    return text;
}

Image round_trip(const Image& image) {
    auto cluster = encode_header_cluster(image);
    if (!cluster) throw std::runtime_error(cluster.error().message());
    CHECK(cluster->size() == image.header.cluster_size());
    Image back;
    auto taken = take_header_cluster(back, *cluster, "q");
    if (!taken) throw std::runtime_error(taken.error().message());
    return back;
}

std::string refusal(const Image& image) {
    auto cluster = encode_header_cluster(image);
    if (cluster) return {};
    CHECK(cluster.error().kind() == ErrorKind::kTooLarge);
    return cluster.error().message();
}

}  // namespace

TEST_CASE("qcow2: an encoded first cluster reads back as it was", "[qcow2][header_writer]") {
    const uint32_t version = GENERATE(2u, 3u);
    const uint32_t cluster_bits = GENERATE(9u, 12u, 16u, 21u);
    Image image = sample(version, cluster_bits);
    SECTION("bare") {}
    SECTION("with names") {
        image.backing_name = "../base images/base.img";
        image.extensions.backing_format = "raw";
        image.extensions.data_file = "disk.data";
    }
    SECTION("with LUKS") {
        image.header.crypt_method = 2;
        image.extensions.crypto = CryptoExtension{uint64_t{4} << cluster_bits, 0x1f9000};
    }
    SECTION("with bitmaps") {
        if (version == 2) return;
        image.extensions.bitmaps = BitmapsExtension{3, 96, uint64_t{11} << cluster_bits};
    }
    SECTION("with what only others know") {
        image.extensions.unknown = {{0x12345678, {1, 2, 3}}, {0xabcdef01, {}}, {0x12345678, std::vector<uint8_t>(16)}};
        image.extensions.session = SessionExtension{77, kSessionOpen};
        if (version == 3) image.header.unknown_fields = {9, 8, 7, 6, 5, 4, 3, 2};
    }
    const Image back = round_trip(image);
    CHECK(text_of(back) == text_of(image));
    CHECK(back.header.header_length == (version == 2 ? 72 : 112 + image.header.unknown_fields.size()));
    CHECK((back.header.backing_file_offset != 0) == !image.backing_name.empty());
    if (cluster_bits > 9) CHECK(back.extensions.features.size() == (version == 3 ? 8 : 0));
}

TEST_CASE("qcow2: an extension without data behind its head reads back", "[qcow2][header_writer]") {
    Image image = sample(3, 9);
    image.header.autoclear_features = 0;
    image.extensions.unknown = {{0x11, {}}};
    // Up to the last byte: 112 header + 8 extension + 8 end + name.
    image.backing_name = std::string(512 - 128, 'n');
    CHECK(text_of(round_trip(image)) == text_of(image));
    image.backing_name += 'n';
    CHECK_THAT(refusal(image), Catch::StartsWith("The image header does not fit into the first cluster; "));
    CHECK_THAT(refusal(image), Catch::Contains("need 513 bytes, a cluster has 512"));
}

TEST_CASE("qcow2: optional extensions make room for names", "[qcow2][header_writer]") {
    Image image = sample(3, 9);
    image.header.autoclear_features = 0;
    image.extensions.session = SessionExtension{5, kSessionOpen};
    image.backing_name = std::string(512 - 120 - 24, 'n');
    CHECK(round_trip(image).extensions.session.has_value());
    image.backing_name += 'n';
    const Image back = round_trip(image);
    CHECK_FALSE(back.extensions.session.has_value());
    CHECK(back.backing_name == image.backing_name);
}

TEST_CASE("qcow2: the session goes before the table of names", "[qcow2][header_writer]") {
    Image image = sample(3, 10);
    image.header.autoclear_features = 0;
    // 120 + 392 + 24 = 536; one byte more than what leaves room for both.
    image.extensions.session = SessionExtension{5, kSessionOpen};
    image.backing_name = std::string(1024 - 536, 'n');
    CHECK(round_trip(image).extensions.features.size() == 8);
    image.backing_name += 'n';
    const Image back = round_trip(image);
    CHECK(back.extensions.features.empty());
    CHECK(back.extensions.session.has_value());
}

TEST_CASE("qcow2: names that no reader would take are refused", "[qcow2][header_writer]") {
    Image image = sample(3, 16);
    image.backing_name = std::string(1024, 'n');
    CHECK_THAT(refusal(image), Catch::StartsWith("Backing file name too long; it has 1024 bytes"));
    image.backing_name.resize(1023);
    CHECK(refusal(image).empty());
    image.extensions.backing_format = "sixteen_letters_";
    CHECK_THAT(refusal(image), Catch::StartsWith("Backing format name too long; 'sixteen_letters_' has 16 bytes"));
}

TEST_CASE("qcow2: the table of names is left out when one byte is missing", "[qcow2][header_writer]") {
    Image image = sample(3, 10);
    image.header.autoclear_features = 0;
    image.backing_name = std::string(1024 - 512, 'n');
    CHECK(round_trip(image).extensions.features.size() == 8);
    image.backing_name += 'n';
    CHECK(round_trip(image).extensions.features.empty());
}

TEST_CASE("qcow2: bitmaps that are not trusted leave the header", "[qcow2][header_writer]") {
    TinyImage tiny;
    tiny.bitmaps_extension(1, 0, 32, 2560).autoclear(0);
    Image image;
    REQUIRE(take_header_cluster(image, std::span(tiny.bytes).first(512), "q"));
    auto cluster = encode_header_cluster(image);
    REQUIRE(cluster);
    // The table of names fills the rest of these 512 bytes.
    CHECK(load_be32(cluster->data() + TinyImage::kExtensions) == kExtensionFeatureTable);
}

TEST_CASE("qcow2: a session extension of another length is not ours", "[qcow2][header_writer]") {
    TinyImage tiny;
    tiny.extension(TinyImage::kExtensions, kExtensionSession, "twenty-four bytes long..");
    Image image;
    REQUIRE(take_header_cluster(image, std::span(tiny.bytes).first(512), "q"));
    CHECK_FALSE(image.extensions.session.has_value());
    REQUIRE(image.extensions.unknown.size() == 1);
    CHECK(image.extensions.unknown[0].data.size() == 24);
    CHECK(text_of(round_trip(image)) == text_of(image));
}

TEST_CASE("qcow2: a cluster that is no header is not taken", "[qcow2][header_writer]") {
    Image image;
    std::vector<uint8_t> nothing(512);
    CHECK_FALSE(take_header_cluster(image, nothing, "q"));
    TinyImage tiny;
    CHECK_FALSE(take_header_cluster(image, std::span(tiny.bytes).first(300), "q"));
    CHECK(image.header.version == 0);
}
