#include "block/formats/qcow2/extensions.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kFeatureRowBytes = 48;
constexpr size_t kSessionBytes = 16;

std::vector<FeatureName> feature_rows(std::span<const uint8_t> data) {
    std::vector<FeatureName> rows;
    for (size_t at = 0; at + kFeatureRowBytes <= data.size(); at += kFeatureRowBytes) {
        const uint8_t* row = data.data() + at;
        if (row[0] > 2 || row[1] > 63) continue;
        std::string name;
        for (size_t i = 2; i < kFeatureRowBytes && row[i] != 0; i++) {
            name += row[i] >= 0x20 && row[i] < 0x7f ? static_cast<char>(row[i]) : '?';
        }
        rows.push_back({static_cast<FeatureWord>(row[0]), row[1], std::move(name)});
    }
    return rows;
}

/// Text up to the first NUL: names are C strings to every other program.
std::string text_of(std::span<const uint8_t> data) {
    return std::string(data.begin(), std::find(data.begin(), data.end(), 0));
}

struct Parser {
    const Header& header;
    std::string_view node;
    Extensions out;
    bool seen_format = false, seen_data_file = false, seen_features = false;

    Result<> take(uint32_t type, std::span<const uint8_t> data, uint64_t at);
    Result<> once(bool seen, uint32_t type, uint64_t at) const;
    Result<> take_bitmaps(std::span<const uint8_t> data, uint64_t at);
    Result<> take_crypto(std::span<const uint8_t> data, uint64_t at);
};

Result<> Parser::once(bool seen, uint32_t type, uint64_t at) const {
    if (!seen) return {};
    return refuse_corrupt(node, "Duplicate header extension",
                          "the extension {:#010x} at byte {} appears a second time; each may appear once", type, at);
}

Result<> Parser::take_bitmaps(std::span<const uint8_t> data, uint64_t at) {
    if (data.size() != 24) {
        return refuse_corrupt(node, "bitmaps_ext: Invalid extension length",
                              "the bitmaps extension at byte {} has {} bytes, not 24", at, data.size());
    }
    // Without the autoclear bit somebody wrote to the image who does not know bitmaps: nothing here may be believed.
    if (!header.has_autoclear(kAutoclearBitmaps)) return {};
    const uint32_t count = load_be32(data.data());
    const uint32_t reserved = load_be32(data.data() + 4);
    const uint64_t size = load_be64(data.data() + 8);
    const uint64_t offset = load_be64(data.data() + 16);
    if (reserved != 0) {
        return refuse_corrupt(node, "bitmaps_ext: Reserved field is not zero",
                              "the reserved field of the bitmaps extension at byte {} is {:#x}", at + 12, reserved);
    }
    if (count == 0) {
        return refuse_corrupt(node, "found bitmaps extension with zero bitmaps", "the bitmaps extension is at byte {}",
                              at);
    }
    if (count > kMaxBitmaps) {
        return refuse_corrupt(node, "bitmaps_ext: too many bitmaps",
                              "the bitmaps extension at byte {} announces {} bitmaps, more than {}", at, count,
                              kMaxBitmaps);
    }
    if (offset == 0 || offset % header.cluster_size() != 0 || wraps(offset, size)) {
        return refuse_corrupt(
            node, "bitmaps_ext: invalid bitmap directory offset",
            "the bitmap directory of {} bytes at offset {:#x} (bitmaps extension at byte {}) does not start "
            "on a cluster of {} bytes",
            size, offset, at, header.cluster_size());
    }
    if (size == 0) {
        return refuse_corrupt(node, "Requested bitmap directory size is zero", "the bitmaps extension is at byte {}",
                              at);
    }
    if (size > kMaxBitmapDirectoryBytes) {
        return refuse_corrupt(
            node,
            fmt::format("bitmaps_ext: bitmap directory size ({}) exceeds the maximum supported size ({})", size,
                        kMaxBitmapDirectoryBytes),
            "the bitmaps extension is at byte {}", at);
    }
    out.bitmaps = BitmapsExtension{count, size, offset};
    return {};
}

Result<> Parser::take_crypto(std::span<const uint8_t> data, uint64_t at) {
    if (header.crypt_method != 2) {
        return refuse_corrupt(node, "CRYPTO header extension only expected with LUKS encryption method",
                              "the extension at byte {} meets crypt_method {} at byte 32", at, header.crypt_method);
    }
    if (data.size() != 16) {
        return refuse_corrupt(node, fmt::format("CRYPTO header extension size {}, but expected size 16", data.size()),
                              "the extension is at byte {}", at);
    }
    const CryptoExtension crypto{load_be64(data.data()), load_be64(data.data() + 8)};
    if (crypto.offset % header.cluster_size() != 0) {
        return refuse_corrupt(node,
                              fmt::format("Encryption header offset '{}' is not a multiple of cluster size '{}'",
                                          crypto.offset, header.cluster_size()),
                              "the extension is at byte {}", at);
    }
    if (wraps(crypto.offset, crypto.length)) {
        return refuse_corrupt(node, "Encryption header does not fit",
                              "the extension at byte {} announces {:#x} bytes at offset {:#x}", at, crypto.length,
                              crypto.offset);
    }
    if (crypto.length > kMaxCryptoHeaderBytes) {
        return refuse_corrupt(node, "Encryption header too large",
                              "the extension at byte {} announces {:#x} bytes, more than {:#x}", at, crypto.length,
                              kMaxCryptoHeaderBytes);
    }
    out.crypto = crypto;
    return {};
}

Result<> Parser::take(uint32_t type, std::span<const uint8_t> data, uint64_t at) {
    switch (type) {
        case kExtensionBackingFormat:
            CHECK_OK(once(std::exchange(seen_format, true), type, at));
            if (data.size() > kMaxBackingFormatBytes) {
                return refuse_corrupt(node,
                                      fmt::format("ERROR: ext_backing_format: len={} too large (>=16)", data.size()),
                                      "the extension is at byte {}", at);
            }
            out.backing_format = text_of(data);
            return {};
        case kExtensionDataFile:
            CHECK_OK(once(std::exchange(seen_data_file, true), type, at));
            out.data_file = text_of(data);
            return {};
        case kExtensionFeatureTable:
            CHECK_OK(once(std::exchange(seen_features, true), type, at));
            out.features = feature_rows(data);
            return {};
        case kExtensionBitmaps:
            CHECK_OK(once(out.bitmaps.has_value(), type, at));
            return take_bitmaps(data, at);
        case kExtensionCrypto:
            CHECK_OK(once(out.crypto.has_value(), type, at));
            return take_crypto(data, at);
        case kExtensionSession:
            // Of another length it is not ours, or of a program that knows more: carried along.
            if (data.size() != kSessionBytes || out.session) break;
            out.session = SessionExtension{load_be64(data.data()), load_be64(data.data() + 8)};
            return {};
        default:
            break;
    }
    out.unknown.push_back({type, std::vector<uint8_t>(data.begin(), data.end())});
    return {};
}

/// Calls visit(type, data, offset of the extension in `area`) for each extension. False from it ends the walk.
/// Returns the offset of an extension that does not fit into `space` bytes, with its length; nullopt when all was well.
struct BadExtension {
    uint64_t at, length;
};
template <class Visit>
std::optional<BadExtension> walk(std::span<const uint8_t> area, uint64_t space, Visit visit) {
    uint64_t at = 0;
    while (space - at >= 8 && at + 8 <= area.size()) {
        const uint32_t type = load_be32(area.data() + at);
        const uint64_t length = load_be32(area.data() + at + 4);
        if (type == kExtensionEnd) break;
        if (length > space - at - 8 || length > area.size() - at - 8) return BadExtension{at, length};
        if (!visit(type, area.subspan(at + 8, length), at)) break;
        at += 8 + ((length + 7) & ~uint64_t{7});
        if (at > space) break;  // the padding of the last one is cut off
    }
    return std::nullopt;
}

}  // namespace

Result<Extensions> parse_extensions(const Header& header, std::span<const uint8_t> area, std::string_view node) {
    Parser parser{header, node, {}};
    Result<> result;
    const uint64_t space = header.extensions_end() - header.header_length;
    auto bad = walk(area, space, [&](uint32_t type, std::span<const uint8_t> data, uint64_t at) {
        result = parser.take(type, data, header.header_length + at);
        return result.has_value();
    });
    if (!result) return std::unexpected(std::move(result).error());
    if (bad) {
        return refuse_corrupt(node, "Header extension too large",
                              "the extension at byte {} announces {} bytes; extensions end at byte {} of the file",
                              header.header_length + bad->at, bad->length,
                              header.header_length + std::min<uint64_t>(space, area.size()));
    }
    return std::move(parser.out);
}

Extensions parse_feature_names(std::span<const uint8_t> area) {
    Extensions out;
    walk(area, area.size(), [&](uint32_t type, std::span<const uint8_t> data, uint64_t) {
        if (type != kExtensionFeatureTable) return true;
        out.features = feature_rows(data);
        return false;
    });
    return out;
}

}  // namespace gantry::block::qcow2
