// Where everything of a new image goes: from front to back, without a gap. Pure.

#pragma once

#include <cstdint>
#include <span>

#include "block/formats/qcow2/create_options.h"
#include "block/formats/qcow2/image.h"

namespace gantry::block::qcow2 {

/// Offsets and lengths in bytes, whole clusters; an empty part has length 0.
///
///   header | refcount table | refcount blocks | L1 | encryption header | L2 tables | data clusters
///
/// L2 tables and data are there with preallocation only, data only without an external data file. Every cluster up to
/// `clusters` is counted once.
struct CreateLayout {
    uint64_t refcount_table_offset = 0, refcount_table_bytes = 0;
    uint64_t refcount_block_offset = 0, refcount_blocks = 0;
    uint64_t l1_offset = 0, l1_entries = 0;
    uint64_t crypto_offset = 0, crypto_bytes = 0;
    uint64_t l2_offset = 0, l2_tables = 0;
    uint64_t data_offset = 0;  // also the end of the metadata
    uint64_t mapped = 0;       // guest clusters that have an L2 entry
    uint64_t clusters = 0;     // of the file

    // What the entries say.
    Geometry geometry;
    uint32_t refcount_order = 4;
    bool zero_entries = false;  // places are reserved, and read as zeroes whatever is there

    uint64_t file_bytes() const { return clusters << geometry.cluster_bits; }
    uint64_t data_bytes() const { return file_bytes() - data_offset; }
};

/// `crypto_bytes`: of the encryption header, 0: none. kTooLarge when the refcount table would be larger than the format
/// allows.
Result<CreateLayout> plan_layout(const CreateOptions& options, uint64_t crypto_bytes);

/// The bytes [offset, offset + to.size()) of the file, both whole multiples of 8, inside the metadata and behind the
/// first cluster. The encryption header's are zeroes: it is written by whoever makes it.
void fill_metadata(const CreateLayout& layout, uint64_t offset, std::span<uint8_t> to);

/// What the first cluster is made of, ready for encode_header_cluster(). `data_file`: the name to store.
/// `crypto_bytes` as for plan_layout().
Image new_image(const CreateOptions& options, const CreateLayout& layout, std::string data_file, uint64_t crypto_bytes);

/// Refcount table and blocks for `clusters` other clusters, and themselves.
struct RefcountSpace {
    uint64_t table_clusters = 0;
    uint64_t blocks = 0;
};
RefcountSpace refcount_space(uint64_t clusters, uint32_t cluster_bits, uint32_t refcount_order);

}  // namespace gantry::block::qcow2
