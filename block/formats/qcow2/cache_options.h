// The sizes of the metadata caches (spec/qcow2.md section 13): options, defaults, refusals. Pure.

#pragma once

#include <cstdint>
#include <string_view>

#include "block/formats/qcow2/layout.h"
#include "runtime/error.h"
#include "schema/options.h"

namespace gantry::block::qcow2 {

struct CacheSizes {
    uint32_t l2_slice_bytes = 4096;
    uint64_t l2_bytes = 0;            // never more than the whole disk needs; at least two slices
    uint64_t refcount_bytes = 0;      // at least four clusters
    uint64_t clean_interval_s = 600;  // 0: never
};

/// From cache-size, l2-cache-size, refcount-cache-size, l2-cache-entry-size and cache-clean-interval. kInvalid.
Result<CacheSizes> cache_sizes(const schema::Options& options, const Geometry& geometry, uint64_t disk_size,
                               std::string_view node);

}  // namespace gantry::block::qcow2
