#include "block/formats/qcow2/header.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

Geometry Header::geometry() const {
    Geometry g;
    g.cluster_bits = cluster_bits;
    g.extended_l2 = has_incompatible(kIncompatExtendedL2);
    g.zero_flag = version >= 3;
    g.external_data = has_incompatible(kIncompatDataFile);
    g.raw_external_data = g.external_data && has_autoclear(kAutoclearRawData);
    return g;
}

Result<Header> parse_header(std::span<const uint8_t> head, std::string_view node) {
    const uint8_t* p = head.data();
    if (head.size() < 4 || load_be32(p) != kMagic) {
        return refuse(ErrorKind::kInvalid, node, "Image is not in qcow2 format",
                      "the file does not begin with the bytes 51 46 49 fb");
    }
    if (head.size() < kHeaderBytesV2) {
        return refuse_corrupt(node, "qcow2 header too short", "the file ends after {} bytes, the header needs {}",
                              head.size(), kHeaderBytesV2);
    }
    Header h;
    h.version = load_be32(p + 4);
    h.backing_file_offset = load_be64(p + 8);
    h.backing_file_size = load_be32(p + 16);
    h.cluster_bits = load_be32(p + 20);
    h.size = load_be64(p + 24);
    h.crypt_method = load_be32(p + 32);
    h.l1_size = load_be32(p + 36);
    h.l1_table_offset = load_be64(p + 40);
    h.refcount_table_offset = load_be64(p + 48);
    h.refcount_table_clusters = load_be32(p + 56);
    h.nb_snapshots = load_be32(p + 60);
    h.snapshots_offset = load_be64(p + 64);
    if (h.version != 2 && h.version != 3) {
        return refuse(ErrorKind::kUnsupported, node, fmt::format("Unsupported qcow2 version {}", h.version),
                      "the version at byte 4 is {}; 2 and 3 are known", h.version);
    }
    if (h.cluster_bits < kMinClusterBits || h.cluster_bits > kMaxClusterBits) {
        return refuse_corrupt(node, fmt::format("Unsupported cluster size: 2^{}", h.cluster_bits),
                              "cluster_bits at byte 20 is {}, outside {} to {}", h.cluster_bits, kMinClusterBits,
                              kMaxClusterBits);
    }
    if (h.version == 3) {
        if (head.size() < kHeaderBytesV3) {
            return refuse_corrupt(node, "qcow2 header too short", "the file ends after {} bytes, the header needs {}",
                                  head.size(), kHeaderBytesV3);
        }
        h.incompatible_features = load_be64(p + 72);
        h.compatible_features = load_be64(p + 80);
        h.autoclear_features = load_be64(p + 88);
        h.refcount_order = load_be32(p + 96);
        h.header_length = load_be32(p + 100);
        if (h.header_length < kHeaderBytesV3) {
            return refuse_corrupt(node, "qcow2 header too short", "header_length at byte 100 is {}, less than {}",
                                  h.header_length, kHeaderBytesV3);
        }
        // A field is absent when the header ends before it.
        if (h.header_length > kHeaderBytesV3 && head.size() > kHeaderBytesV3) h.compression_type = p[104];
    }
    if (h.header_length > h.cluster_size()) {
        return refuse_corrupt(node, "qcow2 header exceeds cluster size",
                              "header_length at byte 100 is {}, a cluster {}", h.header_length, h.cluster_size());
    }
    if (h.backing_file_offset != 0) {
        if (h.backing_file_offset < h.header_length || h.backing_file_offset > h.cluster_size()) {
            return refuse_corrupt(
                node, "Invalid backing file offset",
                "backing_file_offset at byte 8 is {:#x}, not between the header's end {} and the end of "
                "the first cluster {}",
                h.backing_file_offset, h.header_length, h.cluster_size());
        }
        const uint64_t room = std::min<uint64_t>(kMaxBackingNameBytes, h.cluster_size() - h.backing_file_offset);
        if (h.backing_file_size > room) {
            return refuse_corrupt(node, "Backing file name too long",
                                  "backing_file_size at byte 16 is {}; there is room for {} bytes at {:#x}",
                                  h.backing_file_size, room, h.backing_file_offset);
        }
    }
    if (h.header_length > kHeaderBytesKnown) {
        h.unknown_fields.resize(h.header_length - kHeaderBytesKnown);
        const size_t end = std::min<size_t>(head.size(), h.header_length);
        if (end > kHeaderBytesKnown) std::copy(p + kHeaderBytesKnown, p + end, h.unknown_fields.begin());
    }
    return h;
}

Result<> check_features(const Header& h, const Extensions& extensions, std::string_view node) {
    uint64_t unknown = h.incompatible_features & ~kIncompatKnown;
    if (unknown == 0) return {};
    std::string names;
    const auto add = [&](std::string_view text) {
        if (!names.empty()) names += ", ";
        names += text;
    };
    for (const FeatureName& feature : extensions.features) {
        const uint64_t bit = uint64_t{1} << feature.bit;
        if (feature.word != FeatureWord::kIncompatible || !(unknown & bit) || feature.name.empty()) continue;
        add(feature.name);
        unknown &= ~bit;
    }
    if (unknown) add(fmt::format("Unknown incompatible feature: {:x}", unknown));
    return refuse(ErrorKind::kUnsupported, node, fmt::format("Unsupported qcow2 feature(s): {}", names),
                  "incompatible_features at byte 72 are {:#x}, known are {:#x}", h.incompatible_features,
                  kIncompatKnown);
}

Result<> check_l1(const Geometry& g, uint64_t offset, uint64_t entries, uint64_t disk_size, std::string_view what,
                  std::string_view node) {
    if (entries > kMaxL1Entries) {
        return refuse_corrupt(node, fmt::format("{} L1 table too large", what), "it has {} entries, more than {}",
                              entries, kMaxL1Entries);
    }
    if (offset % g.cluster_size() != 0 || wraps(offset, entries * 8) || (offset == 0 && entries != 0)) {
        return refuse_corrupt(node, fmt::format("{} L1 table offset invalid", what),
                              "{} entries at offset {:#x} lie in the header, do not start on a cluster of {} bytes or "
                              "go past the largest offset",
                              entries, offset, g.cluster_size());
    }
    const uint64_t needed = g.l1_entries_for(disk_size);
    if (disk_size > kMaxOffset || needed > kMaxL1Entries) {
        return refuse_corrupt(node, "Image is too big", "a disk of {} bytes needs {} L1 entries, more than {}",
                              disk_size, needed, kMaxL1Entries);
    }
    if (entries < needed) {
        return refuse_corrupt(node, "L1 table is too small", "it has {} entries, a disk of {} bytes needs {}", entries,
                              disk_size, needed);
    }
    return {};
}

namespace {

Result<> check_v3_words(const Header& h, std::string_view node) {
    if (h.header_length % 8 != 0) {
        return refuse_corrupt(node, "qcow2 header length is not a multiple of 8", "header_length at byte 100 is {}",
                              h.header_length);
    }
    if (h.has_incompatible(kIncompatExtendedL2) && h.cluster_bits < kMinClusterBitsExtended) {
        return refuse_corrupt(node, fmt::format("Unsupported subcluster size: {}", h.cluster_size() / 32),
                              "cluster_bits at byte 20 is {}; extended L2 entries need {} or more", h.cluster_bits,
                              kMinClusterBitsExtended);
    }
    if (h.refcount_order > 6) {
        return refuse_corrupt(node, "Reference count entry width too large; may not exceed 64 bits",
                              "refcount_order at byte 96 is {}, more than 6", h.refcount_order);
    }
    if (h.compression_type > 1) {
        return refuse(ErrorKind::kUnsupported, node,
                      fmt::format("qcow2: unknown compression type: {}", h.compression_type),
                      "the compression type at byte 104 is {}; 0 (deflate) and 1 (zstd) are known", h.compression_type);
    }
    if (h.has_incompatible(kIncompatCompression) != (h.compression_type != 0)) {
        return refuse_corrupt(node,
                              h.compression_type ? "qcow2: Compression type incompatible feature bit must be set"
                                                 : "qcow2: Compression type incompatible feature bit must not be set",
                              "the compression type at byte 104 is {}, incompatible_features at byte 72 are {:#x}",
                              h.compression_type, h.incompatible_features);
    }
    return {};
}

Result<> check_tables(const Header& h, std::string_view node) {
    if (h.refcount_table_clusters == 0) {
        return refuse_corrupt(node, "Image does not contain a reference count table",
                              "refcount_table_clusters at byte 56 is 0");
    }
    const uint64_t refcount_bytes = uint64_t{h.refcount_table_clusters} << h.cluster_bits;
    if (refcount_bytes > kMaxRefcountTableBytes) {
        return refuse_corrupt(node, "Reference count table too large",
                              "refcount_table_clusters at byte 56 is {}: {} bytes, more than {}",
                              h.refcount_table_clusters, refcount_bytes, kMaxRefcountTableBytes);
    }
    if (h.refcount_table_offset % h.cluster_size() != 0 || wraps(h.refcount_table_offset, refcount_bytes)) {
        return refuse_corrupt(node, "Reference count table offset invalid",
                              "refcount_table_offset at byte 48 is {:#x}, not on a cluster of {} bytes or too high",
                              h.refcount_table_offset, h.cluster_size());
    }
    if (h.nb_snapshots > kMaxSnapshots) {
        return refuse_corrupt(node, "Snapshot table too large", "nb_snapshots at byte 60 is {}, more than {}",
                              h.nb_snapshots, kMaxSnapshots);
    }
    if (h.nb_snapshots != 0 &&
        (h.snapshots_offset % h.cluster_size() != 0 || wraps(h.snapshots_offset, kMaxSnapshotTableBytes))) {
        return refuse_corrupt(node, "Snapshot table offset invalid",
                              "snapshots_offset at byte 64 is {:#x}, not on a cluster of {} bytes or too high",
                              h.snapshots_offset, h.cluster_size());
    }
    return check_l1(h.geometry(), h.l1_table_offset, h.l1_size, h.size, "Active", node);
}

}  // namespace

Result<> validate_header(const Header& h, const Extensions& extensions, std::string_view node) {
    CHECK_OK(check_features(h, extensions, node));
    CHECK_OK(check_v3_words(h, node));
    if (h.crypt_method > 2) {
        return refuse(ErrorKind::kUnsupported, node, fmt::format("Unsupported encryption method {}", h.crypt_method),
                      "crypt_method at byte 32 is {}; 0, 1 and 2 are known", h.crypt_method);
    }
    if (h.crypt_method == 2 && !extensions.crypto) {
        return refuse_corrupt(node, "Missing CRYPTO header for crypt method 2",
                              "crypt_method at byte 32 is 2 (LUKS) and the extension {:#010x} is absent",
                              kExtensionCrypto);
    }
    if (h.has_autoclear(kAutoclearRawData)) {
        if (!h.has_incompatible(kIncompatDataFile)) {
            return refuse_corrupt(node, "data-file-raw requires a data file",
                                  "autoclear_features at byte 88 are {:#x}, incompatible_features at byte 72 {:#x}",
                                  h.autoclear_features, h.incompatible_features);
        }
        if (h.backing_file_offset != 0) {
            return refuse_corrupt(node, "Backing file and data-file-raw cannot be used at the same time",
                                  "backing_file_offset at byte 8 is {:#x}, autoclear_features at byte 88 are {:#x}",
                                  h.backing_file_offset, h.autoclear_features);
        }
    }
    return check_tables(h, node);
}

}  // namespace gantry::block::qcow2
