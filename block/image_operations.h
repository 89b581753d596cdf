// ImageOperations: what an image format can do to its image as a whole, beyond reading and writing the disk in it.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "block/bitmap.h"
#include "runtime/error.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::block {

class Node;

/// How far a long operation is. Called on the main loop; false: stop at the next point where the image is whole
/// (kCancelled).
using Progress = std::function<bool(uint64_t done, uint64_t total)>;

/// ImageCheck of the QMP schema.
struct ImageCheck {
    uint64_t check_errors = 0;
    uint64_t corruptions = 0, leaks = 0;
    uint64_t corruptions_fixed = 0, leaks_fixed = 0;
    std::optional<uint64_t> image_end_offset;
    std::optional<uint64_t> total_clusters, allocated_clusters, fragmented_clusters, compressed_clusters;
    /// A line for each finding, as they were met; the first kMaxFindings.
    std::vector<std::string> findings;
    static constexpr size_t kMaxFindings = 1000;
};
enum class CheckRepair : uint8_t { kNone, kLeaks, kAll };

struct SnapshotSpec {
    std::string name;
    uint32_t date_sec = 0, date_nsec = 0;
    uint64_t vm_clock_ns = 0;
};

enum class Preallocation : uint8_t { kOff, kMetadata, kFalloc, kFull };

/// All on the main loop; the graph has drained the node and holds its mutex (block/image_control.h does both). Each is
/// crash-safe: after a power cut at any point the image holds the old or the new state. An image opened read-only
/// refuses what changes it (kReadOnly). What a format cannot do: kUnsupported, with the reference's sentence.
class ImageOperations {
  public:
    virtual ~ImageOperations() = default;

    virtual Task<Result<ImageCheck>> check(CheckRepair repair, Progress progress);
    /// Grow or shrink; `preallocation` applies to what is added.
    virtual Task<Result<>> resize(uint64_t new_size, Preallocation preallocation, bool allow_shrink, Progress progress);

    virtual Task<Result<>> snapshot_create(SnapshotSpec spec);
    virtual Task<Result<>> snapshot_apply(std::string id_or_name);
    /// By id, by name or by both (then both must match). Returns nothing when found; kNotFound.
    virtual Task<Result<>> snapshot_delete(std::string id, std::string name);

    /// `options`: a validated member of BlockdevAmendOptions (QMP) with the additional members of image creation that
    /// amend may change, by their creation names (compat, lazy_refcounts, refcount_bits, size, data_file, ...).
    virtual Task<Result<>> amend(json::object options, bool force, Progress progress);
    /// Empty `file`: none.
    virtual Task<Result<>> change_backing(std::string file, std::string format);
    /// Drops every allocated cluster so that the backing file shows again (after a commit into it).
    virtual Task<Result<>> make_empty();
    /// Moves what lies high into holes further down and cuts the file.
    virtual Task<Result<>> compact(Progress progress);

    /// Whether a bitmap could be stored (name, granularity, count, room).
    virtual Result<> can_store_bitmap(const std::string& name, uint32_t granularity);
    /// Takes a stored bitmap out of the image.
    virtual Task<Result<>> remove_stored_bitmap(const std::string& name);
};

}  // namespace gantry::block
