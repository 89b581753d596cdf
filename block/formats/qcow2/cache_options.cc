#include "block/formats/qcow2/cache_options.h"

#include <algorithm>
#include <bit>
#include <climits>

#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kDefaultMaxL2Bytes = uint64_t{32} << 20;
constexpr uint64_t kDefaultSliceBytes = 4096;
constexpr uint64_t kMinRefcountClusters = 4;

Result<> not_negative(const schema::Options& o, std::string_view name) {
    if (o.integer(name) >= 0) return {};
    return fail(ErrorKind::kInvalid, "Parameter '{}' expects a non-negative number below 2^64", name);
}

}  // namespace

Result<CacheSizes> cache_sizes(const schema::Options& o, const Geometry& g, uint64_t disk_size, std::string_view node) {
    for (const auto name : {"cache-size", "l2-cache-size", "refcount-cache-size", "l2-cache-entry-size"}) {
        CHECK_OK(not_negative(o, name));
    }
    CacheSizes sizes;
    const uint64_t slice = o.size("l2-cache-entry-size", std::min(kDefaultSliceBytes, g.cluster_size()));
    if (!std::has_single_bit(slice) || slice < 512 || slice > g.cluster_size()) {
        return refuse(ErrorKind::kInvalid, node,
                      fmt::format("L2 cache entry size must be a power of two between 512 and the cluster size ({})",
                                  g.cluster_size()),
                      "l2-cache-entry-size is {}", slice);
    }
    sizes.l2_slice_bytes = static_cast<uint32_t>(slice);

    // Whole L2 tables, or as much of one as the disk uses.
    const uint64_t clusters = (disk_size >> g.cluster_bits) + (g.offset_in_cluster(disk_size) != 0);
    const uint64_t needed = (clusters * g.l2_entry_bytes() + slice - 1) / slice * slice;
    const uint64_t min_refcount = kMinRefcountClusters << g.cluster_bits;
    const bool combined = o.has("cache-size"), l2 = o.has("l2-cache-size"), refcount = o.has("refcount-cache-size");
    const uint64_t total = o.size("cache-size");
    sizes.l2_bytes = std::min(needed, l2 ? o.size("l2-cache-size") : kDefaultMaxL2Bytes);
    sizes.refcount_bytes = refcount ? o.size("refcount-cache-size") : min_refcount;
    if (combined) {
        if (l2 && refcount) {
            return refuse(ErrorKind::kInvalid, node,
                          "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                          "leave one of the three out");
        }
        if (l2 && o.size("l2-cache-size") > total) {
            return refuse(ErrorKind::kInvalid, node, "l2-cache-size may not exceed cache-size", "{} is more than {}",
                          o.size("l2-cache-size"), total);
        }
        if (refcount && sizes.refcount_bytes > total) {
            return refuse(ErrorKind::kInvalid, node, "refcount-cache-size may not exceed cache-size",
                          "{} is more than {}", sizes.refcount_bytes, total);
        }
        if (l2) {
            sizes.refcount_bytes = total - o.size("l2-cache-size");
        } else if (refcount) {
            sizes.l2_bytes = std::min(needed, total - sizes.refcount_bytes);
        } else {
            sizes.refcount_bytes = std::min(total, min_refcount);
            sizes.l2_bytes = std::min(needed, total - sizes.refcount_bytes);
        }
    }
    sizes.l2_bytes = std::max(sizes.l2_bytes, 2 * slice);
    sizes.refcount_bytes = std::max(sizes.refcount_bytes, min_refcount);
    if (sizes.l2_bytes / slice > INT_MAX) {
        return refuse(ErrorKind::kInvalid, node, "L2 cache size too big",
                      "{} bytes are more than {} entries of {} bytes", sizes.l2_bytes, INT_MAX, slice);
    }
    if (sizes.refcount_bytes >> g.cluster_bits > INT_MAX) {
        return refuse(ErrorKind::kInvalid, node, "Refcount cache size too big", "{} bytes are more than {} clusters",
                      sizes.refcount_bytes, INT_MAX);
    }
    if (const int64_t interval = o.integer("cache-clean-interval", 600); interval < 0 || interval > UINT_MAX) {
        return refuse(ErrorKind::kInvalid, node, "Cache clean interval too big", "{} seconds are not within 0 and {}",
                      interval, UINT_MAX);
    } else {
        sizes.clean_interval_s = static_cast<uint64_t>(interval);
    }
    return sizes;
}

}  // namespace gantry::block::qcow2
