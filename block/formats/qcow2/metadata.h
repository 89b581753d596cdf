// Metadata: everything that changes in an image while it is open for writing.

#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "block/formats/qcow2/cluster_allocator.h"
#include "block/formats/qcow2/image.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/l1_table.h"
#include "block/formats/qcow2/l2_slice_cache.h"
#include "block/formats/qcow2/mapping_log.h"
#include "block/formats/qcow2/overlap_map.h"
#include "block/formats/qcow2/refcounts.h"
#include "runtime/sync.h"

namespace gantry::block::qcow2 {

/// Why a cluster is freed: decides whether its space goes back to the host (pass-discard-*).
enum class FreedBy : uint8_t { kRequest, kSnapshot, kOther, kNeverDiscard };

/// Runtime options that govern writing (spec/qcow2.md section 19).
struct WriteOptions {
    bool lazy_refcounts = false;
    bool pass_discard_request = false, pass_discard_snapshot = true, pass_discard_other = false;
    bool discard_no_unref = false;
    StructureSet overlap = kOverlapCached;
};

/// Owner of the write side: refcounts, allocator, L1, dirty L2 slices, header; and of the order in which they reach the
/// disk (spec/qcow2.md section 12):
///
///   write-back:  T0   copy dirty slices, changed L1 entries and the list of places freed so far
///                1    write refcount blocks;  if anything of it or a barrier is due: flush data file and image file
///                2    write the slices and L1 entries copied at T0
///                3    flush; then the places freed before T0 lose their reference and may be used again
///
/// A change of an entry is made in the cache only after the bytes it points to are written (commit_write) and its
/// cluster is counted in memory; so whatever T0 copies is covered by step 1. New L2 tables are initialised in the file
/// (zeroes, or a copy of a shared one) before their L1 entry is changed in memory.
///
/// Lock order: FormatNode claim -> write_back_mutex_ -> mutex() -> leaf locks (allocator, slice stripes,
/// pending_mutex_). Any loop unless noted.
class Metadata {
  public:
    /// What the node does for it.
    struct Host {
        virtual ~Host() = default;
        /// FormatNode::retire: runs fn when no request can hold an old map any more.
        virtual void retire_places(std::function<void()> fn) = 0;
        /// Marks the image corrupt as of section 14: header bit, flushed; events; every later write fails with EIO.
        virtual Task<Error> corrupt_on_write(std::string message, uint64_t offset, uint64_t bytes) = 0;
        /// Null: guest data lives in the image file.
        virtual Node* data_file() = 0;
    };

    Metadata(Host& host, ImageFile& file, Image& image, L2SliceCache& l2, WriteOptions options);
    ~Metadata();

    /// Before the first request: refcount table, overlap map, L1 as loaded.
    Task<Result<>> load();

    AsyncMutex& mutex() { return mutex_; }
    Refcounts& refcounts() { return refcounts_; }
    ClusterAllocator& allocator() { return allocator_; }
    OverlapMap& overlap() { return overlap_; }
    L1Table& l1() { return l1_; }
    const L1Table& l1() const { return l1_; }
    L2SliceCache& l2() { return l2_; }
    ImageFile& file() { return file_; }
    Image& image() { return image_; }
    WriteOptions& options() { return options_; }
    MappingLog& log() { return log_; }

    /// Before the first allocation or change of a reference (cheap when done already): clears unknown autoclear bits,
    /// marks the image as open for writing (session extension), sets the dirty bit with lazy refcounts; flushed.
    Task<Result<>> begin_session();
    bool in_session() const { return in_session_.load(std::memory_order_acquire); }

    // ---- Places of guest data ----

    /// `clusters` or fewer (at least one) in a row, counted; after `near` when possible (0: anywhere). Takes mutex()
    /// only to refill. kNoSpace, kIo.
    Task<Result<HostRun>> allocate(uint64_t clusters, uint64_t near);
    void give_back(HostRun run, bool written) { allocator_.give_back(run, written); }
    /// An entry that pointed at [offset, +bytes) of the image file was replaced in the cache: one reference to each
    /// cluster it touches is dropped once the loss is stable and no request holds it. No I/O. Works for clusters of an
    /// external data file too (they have no counts: only the discard is passed on).
    void free_later(uint64_t offset, uint64_t bytes, FreedBy by);
    /// The next write-back must flush data before it writes entries (copied bytes, places that are not fresh, old
    /// contents that were not zero).
    void need_barrier() { barrier_.store(true, std::memory_order_release); }

    // ---- L2 ----

    /// Makes the L1 entry of `l1_index` point to a table of our own: allocates an empty one, or copies a shared one.
    /// Returns at once when it is so already.
    Task<Result<>> own_l2_table(uint64_t l1_index);
    /// A slice that stays in the cache until unpinned, read from the file when it is not there. Waits (and writes back)
    /// when every place of its set is taken. Its table is owned.
    Task<Result<L2SliceCache::Pin>> pin_slice(uint64_t slice);

    // ---- Stability ----

    /// Everything committed before the call is stable: steps T0 to 3, shared by concurrent callers. Always ends with a
    /// flush of data file and image file.
    Task<Result<>> flush();
    /// The same without the final flush (kill -9 safe, not power-cut safe); for background write-back.
    Task<Result<>> write_back();
    /// Returns the reservation, writes back everything including lazy refcounts, ends the session in the header (dirty
    /// bit, session mark); flushed. The image is exact afterwards: check finds nothing. Writing may go on: the next
    /// allocation begins a session anew. Main loop, drained.
    Task<Result<>> settle();
    /// With places waiting or many dirty slices: asks for a background write-back.
    bool wants_write_back() const;

    // ---- Header (under mutex(), or drained on the main loop) ----

    /// Rewrites the whole first cluster from image().header and image().extensions; one write, then a flush. kTooLarge
    /// when it does not fit. Nothing has changed then.
    Task<Result<>> write_header();
    /// The feature words alone (24 bytes at 72, one sector), then a flush. Version 3.
    Task<Result<>> write_features();
    /// The header says something new about the disk after a drained operation: caches of L2 are dropped, L1 is read
    /// again.
    Task<Result<>> reload_mapping();

  private:
    struct Freed {
        uint64_t offset, bytes;
        FreedBy by;
    };
    struct Taken;
    Task<Result<>> write_back_locked(bool final_flush);
    Task<Result<>> take(Taken& taken);
    Task<Result<>> put_down(Taken& taken);
    Task<Result<>> apply_freed(std::vector<Freed> freed);

    Host& host_;
    ImageFile& file_;
    Image& image_;
    L2SliceCache& l2_;
    WriteOptions options_;
    OverlapMap overlap_;
    Refcounts refcounts_;
    ClusterAllocator allocator_;
    L1Table l1_;
    MappingLog log_;
    AsyncMutex mutex_;
    AsyncMutex write_back_mutex_;
    std::atomic<bool> barrier_{false}, in_session_{false};
    mutable std::mutex pending_mutex_;
    std::vector<Freed> freed_;  // no request holds them; waiting for T0
    uint64_t freed_bytes_ = 0;
};

}  // namespace gantry::block::qcow2
