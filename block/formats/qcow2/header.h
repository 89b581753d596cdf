// The header: decoding and validation (spec/qcow2.md section 1). Pure; no I/O.

#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/extensions.h"
#include "block/formats/qcow2/layout.h"
#include "runtime/error.h"

namespace gantry::block::qcow2 {

/// Fields with the names of the specification. For version 2 those of version 3 have their implied values.
struct Header {
    uint32_t version = 0;
    uint64_t backing_file_offset = 0;
    uint32_t backing_file_size = 0;
    uint32_t cluster_bits = 0;
    uint64_t size = 0;
    uint32_t crypt_method = 0;
    uint32_t l1_size = 0;
    uint64_t l1_table_offset = 0;
    uint64_t refcount_table_offset = 0;
    uint32_t refcount_table_clusters = 0;
    uint32_t nb_snapshots = 0;
    uint64_t snapshots_offset = 0;
    uint64_t incompatible_features = 0;
    uint64_t compatible_features = 0;
    uint64_t autoclear_features = 0;
    uint32_t refcount_order = 4;
    uint32_t header_length = kHeaderBytesV2;
    uint8_t compression_type = 0;
    std::vector<uint8_t> unknown_fields;  // bytes from 112 up to header_length; survive a rewrite

    uint64_t cluster_size() const { return uint64_t{1} << cluster_bits; }
    bool has_incompatible(uint64_t bit) const { return (incompatible_features & bit) != 0; }
    bool has_compatible(uint64_t bit) const { return (compatible_features & bit) != 0; }
    bool has_autoclear(uint64_t bit) const { return (autoclear_features & bit) != 0; }
    /// Where the extensions end: before the backing file name or with the first cluster.
    uint64_t extensions_end() const { return backing_file_offset ? backing_file_offset : cluster_size(); }
    Geometry geometry() const;
};

/// Decodes the first bytes of an image (kHeaderBytesKnown, or the whole file when it is shorter) and checks what the
/// layout of the first cluster depends on: magic, version, cluster_bits, header_length, backing file name. Bytes of
/// `head` between the known fields and header_length become unknown_fields; those beyond `head` are zeroes. Errors:
/// kInvalid (not this format), kUnsupported (version), kCorrupt.
Result<Header> parse_header(std::span<const uint8_t> head, std::string_view node);

/// Everything else that the fields and the extensions must satisfy; no table is looked at. Errors: kUnsupported
/// (features, with their names from the feature name table), kCorrupt.
Result<> validate_header(const Header& header, const Extensions& extensions, std::string_view node);

/// The refusal of unknown incompatible bits; success when there are none. Comes before anything else is believed.
Result<> check_features(const Header& header, const Extensions& extensions, std::string_view node);

/// An L1 table (the active one or a snapshot's) of `entries` at `offset` for a disk of `disk_size` bytes. `what`:
/// "Active" or "Snapshot".
Result<> check_l1(const Geometry& geometry, uint64_t offset, uint64_t entries, uint64_t disk_size,
                  std::string_view what, std::string_view node);

}  // namespace gantry::block::qcow2
