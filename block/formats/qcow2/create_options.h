// What a new qcow2 image is to be: from blockdev-create's options and from the words of the command line. Pure.

#pragma once

#include <cstdint>
#include <string>

#include "block/create.h"
#include "block/formats/qcow2/layout.h"
#include "schema/options.h"

namespace gantry::block::qcow2 {

struct CreateOptions {
    uint64_t size = 0;  // bytes of the disk, whole sectors
    uint32_t version = 3;
    uint32_t cluster_bits = 16;
    uint32_t refcount_order = 4;
    bool extended_l2 = false;
    bool lazy_refcounts = false;
    uint8_t compression_type = 0;
    Preallocation preallocation = Preallocation::kOff;
    bool data_file = false;
    bool data_file_raw = false;
    std::string backing_file, backing_format;  // as they are stored
    json::object encrypt;                      // QCryptoBlockCreateOptions; empty: none

    uint64_t cluster_size() const { return uint64_t{1} << cluster_bits; }
    uint64_t disk_clusters() const { return (size + cluster_size() - 1) >> cluster_bits; }
    Geometry geometry() const;
};

/// From validated BlockdevCreateOptionsQcow2. Errors: kInvalid, the reference's refusals of combinations; kTooLarge for
/// a disk that no L1 table covers.
Result<CreateOptions> create_options(const schema::Options& options);

/// The words that `gantry image create -o` takes for this format.
std::span<const CreationOption> creation_words();

/// Words in the tool's spelling (compat, cluster_size, ...) as members of BlockdevCreateOptionsQcow2, without the
/// nodes: `file` and `data-file` are for the caller to add. Values are validated; combinations are create_options()'s.
/// `size` is rounded up to whole sectors. Errors: kInvalid.
Result<json::object> options_from_words(const CreationWords& words);

}  // namespace gantry::block::qcow2
