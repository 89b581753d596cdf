#include "block/formats/qcow2/header_writer.h"

#include <algorithm>
#include <array>

#include "block/formats/qcow2/be.h"
#include "runtime/check.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kFeatureRowBytes = 48;
constexpr size_t kExtensionHead = 8;

size_t padded(size_t bytes) { return (bytes + 7) & ~size_t{7}; }

std::vector<uint8_t> bytes_of(std::string_view text) { return {text.begin(), text.end()}; }

std::vector<uint8_t> numbers(std::initializer_list<uint64_t> values) {
    std::vector<uint8_t> data(values.size() * 8);
    size_t at = 0;
    for (const uint64_t value : values) {
        store_be64(data.data() + at, value);
        at += 8;
    }
    return data;
}

std::vector<uint8_t> bitmaps_data(const BitmapsExtension& bitmaps) {
    std::vector<uint8_t> data = numbers({0, bitmaps.directory_size, bitmaps.directory_offset});
    store_be32(data.data(), bitmaps.count);
    return data;
}

std::vector<uint8_t> feature_table() {
    const auto rows = known_features();
    std::vector<uint8_t> data(rows.size() * kFeatureRowBytes);
    uint8_t* row = data.data();
    for (const FeatureName& feature : rows) {
        row[0] = static_cast<uint8_t>(feature.word);
        row[1] = feature.bit;
        std::ranges::copy(feature.name, row + 2);
        row += kFeatureRowBytes;
    }
    return data;
}

/// Puts the pieces of the first cluster in a row, as long as there is room.
class Cluster {
  public:
    explicit Cluster(uint64_t size) : bytes_(size) {}
    uint8_t* data() { return bytes_.data(); }
    size_t used() const { return used_; }
    size_t room() const { return bytes_.size() - used_; }
    bool fits(size_t bytes) const { return bytes <= room(); }
    static size_t extension_bytes(size_t data_bytes) { return kExtensionHead + padded(data_bytes); }

    void put(std::span<const uint8_t> data) {
        std::ranges::copy(data, bytes_.begin() + static_cast<ptrdiff_t>(used_));
        used_ += data.size();
    }
    void skip(size_t bytes) { used_ += bytes; }
    void put_extension(uint32_t type, std::span<const uint8_t> data) {
        store_be32(bytes_.data() + used_, type);
        store_be32(bytes_.data() + used_ + 4, static_cast<uint32_t>(data.size()));
        std::ranges::copy(data, bytes_.begin() + static_cast<ptrdiff_t>(used_ + kExtensionHead));
        used_ += extension_bytes(data.size());
    }
    std::vector<uint8_t> take() { return std::move(bytes_); }

  private:
    std::vector<uint8_t> bytes_;
    size_t used_ = 0;
};

struct Part {
    uint32_t type;
    std::vector<uint8_t> data;
};

/// Those that the image cannot do without, in the order of the file; the optional ones have their place among them.
std::vector<Part> required_parts(const Image& image) {
    const Extensions& e = image.extensions;
    std::vector<Part> parts;
    if (!e.backing_format.empty()) parts.push_back({kExtensionBackingFormat, bytes_of(e.backing_format)});
    if (!e.data_file.empty()) parts.push_back({kExtensionDataFile, bytes_of(e.data_file)});
    if (e.crypto) parts.push_back({kExtensionCrypto, numbers({e.crypto->offset, e.crypto->length})});
    if (e.bitmaps) parts.push_back({kExtensionBitmaps, bitmaps_data(*e.bitmaps)});
    for (const UnknownExtension& unknown : e.unknown) parts.push_back({unknown.type, unknown.data});
    return parts;
}

Result<> check_names(const Image& image) {
    if (image.backing_name.size() > kMaxBackingNameBytes) {
        return fail(ErrorKind::kTooLarge, "Backing file name too long; it has {} bytes, at most {} can be stored",
                    image.backing_name.size(), kMaxBackingNameBytes);
    }
    if (image.extensions.backing_format.size() > kMaxBackingFormatBytes) {
        return fail(ErrorKind::kTooLarge, "Backing format name too long; '{}' has {} bytes, at most {} can be stored",
                    image.extensions.backing_format, image.extensions.backing_format.size(), kMaxBackingFormatBytes);
    }
    return {};
}

void put_fields(const Header& h, uint32_t header_length, uint64_t backing_offset, uint32_t backing_bytes, uint8_t* p) {
    store_be32(p, kMagic);
    store_be32(p + 4, h.version);
    store_be64(p + 8, backing_offset);
    store_be32(p + 16, backing_bytes);
    store_be32(p + 20, h.cluster_bits);
    store_be64(p + 24, h.size);
    store_be32(p + 32, h.crypt_method);
    store_be32(p + 36, h.l1_size);
    store_be64(p + 40, h.l1_table_offset);
    store_be64(p + 48, h.refcount_table_offset);
    store_be32(p + 56, h.refcount_table_clusters);
    store_be32(p + 60, h.nb_snapshots);
    store_be64(p + 64, h.snapshots_offset);
    if (h.version < 3) return;
    store_be64(p + 72, h.incompatible_features);
    store_be64(p + 80, h.compatible_features);
    store_be64(p + 88, h.autoclear_features);
    store_be32(p + 96, h.refcount_order);
    store_be32(p + 100, header_length);
    p[104] = h.compression_type;
    std::ranges::copy(h.unknown_fields, p + kHeaderBytesKnown);
}

}  // namespace

std::span<const FeatureName> known_features() {
    static const std::array<FeatureName, 8> kRows = {{
        {FeatureWord::kIncompatible, 0, "dirty bit"},
        {FeatureWord::kIncompatible, 1, "corrupt bit"},
        {FeatureWord::kIncompatible, 2, "external data file"},
        {FeatureWord::kIncompatible, 3, "compression type"},
        {FeatureWord::kIncompatible, 4, "extended L2 entries"},
        {FeatureWord::kCompatible, 0, "lazy refcounts"},
        {FeatureWord::kAutoclear, 0, "bitmaps"},
        {FeatureWord::kAutoclear, 1, "raw external data"},
    }};
    return kRows;
}

Result<std::vector<uint8_t>> encode_header_cluster(const Image& image) {
    const Header& h = image.header;
    CHECK(h.version == 2 || h.version == 3, "a header has a version that exists");
    CHECK_OK(check_names(image));
    const size_t header_length =
        h.version == 2 ? size_t{kHeaderBytesV2} : padded(kHeaderBytesKnown + h.unknown_fields.size());

    std::vector<Part> parts = required_parts(image);
    size_t needed = header_length + kExtensionHead + image.backing_name.size();  // with the end mark
    for (const Part& part : parts) needed += Cluster::extension_bytes(part.data.size());
    if (needed > h.cluster_size()) {
        return fail(ErrorKind::kTooLarge,
                    "The image header does not fit into the first cluster; header, extensions and backing file name "
                    "need {} bytes, a cluster has {}; use shorter file names or larger clusters",
                    needed, h.cluster_size());
    }
    const auto put_when_it_fits = [&](std::vector<Part>::iterator where, uint32_t type, std::vector<uint8_t> data) {
        const size_t bytes = Cluster::extension_bytes(data.size());
        if (needed + bytes > h.cluster_size()) return;
        needed += bytes;
        parts.insert(where, {type, std::move(data)});
    };
    if (image.extensions.session) {
        const SessionExtension& session = *image.extensions.session;
        put_when_it_fits(parts.end(), kExtensionSession, numbers({session.session, session.flags}));
    }
    if (h.version >= 3) put_when_it_fits(parts.begin(), kExtensionFeatureTable, feature_table());

    Cluster cluster(h.cluster_size());
    cluster.skip(header_length);
    for (const Part& part : parts) cluster.put_extension(part.type, part.data);
    cluster.skip(kExtensionHead);  // the end mark is all zeroes
    const uint64_t backing_offset = image.backing_name.empty() ? 0 : cluster.used();
    cluster.put(bytes_of(image.backing_name));
    put_fields(h, static_cast<uint32_t>(header_length), backing_offset,
               static_cast<uint32_t>(image.backing_name.size()), cluster.data());
    return cluster.take();
}

Result<> take_header_cluster(Image& image, std::span<const uint8_t> cluster, std::string_view node) {
    TRY(Header header, parse_header(cluster, node));
    if (cluster.size() < header.extensions_end() || cluster.size() < header.cluster_size()) {
        return fail(ErrorKind::kCorrupt, "node '{}': the first cluster has {} bytes, not {}", node, cluster.size(),
                    header.cluster_size());
    }
    const auto area = cluster.subspan(header.header_length, header.extensions_end() - header.header_length);
    TRY(Extensions extensions, parse_extensions(header, area, node));
    image.backing_name.clear();
    if (header.backing_file_offset != 0) {
        const auto name = cluster.subspan(header.backing_file_offset, header.backing_file_size);
        image.backing_name.assign(name.begin(), name.end());
    }
    image.header = std::move(header);
    image.extensions = std::move(extensions);
    image.geometry = image.header.geometry();
    return {};
}

}  // namespace gantry::block::qcow2
