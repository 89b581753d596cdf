// Steps of a resize that have files of their own.

#pragma once

#include "block/formats/qcow2/operation.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

/// Mappings from guest byte `cut` (rounded up to a cluster) on go away, the active L1 table gets `l1_entries` entries
/// and the header `disk_size`: a new L1 table, and a new copy of the L2 table that is cut in two, become valid with one
/// write of the header. What only the old ones referred to is free afterwards. Nothing is written when nothing changes.
Task<Result<>> cut_mappings(Operation& op, uint64_t cut, uint64_t l1_entries, uint64_t disk_size);

/// Cuts the file behind the last cluster in use, when refcount structures are that after moving them down. A file that
/// cannot be cut stays as it is.
Task<Result<>> cut_file(Operation& op);

/// Gives every cluster of the guest range a place that reads as zeroes. Nothing is mapped there, or zeroes. The
/// metadata is not locked.
Task<Result<>> preallocate(Qcow2Node& node, uint64_t begin, uint64_t end, Preallocation mode, Progress progress);

}  // namespace gantry::block::qcow2
