// What references begin at, as check_references.cc and check_snapshots.cc find it.

#pragma once

#include <cstdint>
#include <vector>

#include "block/formats/qcow2/check_references.h"

namespace gantry::block::qcow2 {

/// An L1 table, by as many snapshots as share it.
struct L1Root {
    MetadataRange place;
    bool active = false;
    uint64_t times = 1;
};

struct Roots {
    std::vector<L1Root> tables;
    std::vector<MetadataRange> fixed;  // metadata whose place is sure: no L2 table can be there
};

/// Adds the L1 tables of snapshots and the place of their table; an incomplete table is mended when the run repairs.
Task<Result<>> take_snapshots(CheckRun& run, Roots& roots);

}  // namespace gantry::block::qcow2
