// Header extensions (spec/qcow2.md section 2). Pure; no I/O.

#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"

namespace gantry::block::qcow2 {

struct Header;

enum class FeatureWord : uint8_t { kIncompatible = 0, kCompatible = 1, kAutoclear = 2 };

struct FeatureName {
    FeatureWord word;
    uint8_t bit;
    std::string name;  // printable characters only
};

struct BitmapsExtension {
    uint32_t count = 0;
    uint64_t directory_size = 0;
    uint64_t directory_offset = 0;
};

struct CryptoExtension {
    uint64_t offset = 0;
    uint64_t length = 0;
};

/// Our own: the state of writing (layout.h).
struct SessionExtension {
    uint64_t session = 0;
    uint64_t flags = 0;
};

/// An extension this program does not know; a rewritten header carries it along.
struct UnknownExtension {
    uint32_t type = 0;
    std::vector<uint8_t> data;
};

struct Extensions {
    std::string backing_format;
    std::string data_file;
    std::vector<FeatureName> features;
    std::optional<BitmapsExtension> bitmaps;
    std::optional<CryptoExtension> crypto;
    std::optional<SessionExtension> session;
    std::vector<UnknownExtension> unknown;
};

/// `area`: the bytes of the file from header_length up to extensions_end(), fewer when the file ends before (what is
/// missing reads as zeroes, which end the list). Errors: kCorrupt.
Result<Extensions> parse_extensions(const Header& header, std::span<const uint8_t> area, std::string_view node);

/// Only the feature name table, from an area that need not make sense otherwise.
Extensions parse_feature_names(std::span<const uint8_t> area);

}  // namespace gantry::block::qcow2
