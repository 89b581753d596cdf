// Metadata: everything that changes in an image while it is open for writing.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "block/flush_state.h"
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
///   write-back:  T0   mark the log; take the places freed so far; copy changed L1 entries, then dirty slices; take the
///                     barrier (in this order: each later one covers what the earlier ones saw)
///                1    write refcount blocks;  if entries follow and blocks were written, a barrier is due or the file
///                     has grown: flush data file and image file
///                2    write the slices and L1 entries copied at T0; the log's records before the mark are done with
///                3    flush; then the places freed before T0 lose their reference and may be used again
///
/// A change of an entry is made in the cache only after the bytes it points to are written (commit_write), its cluster
/// is counted in memory and need_barrier() is said where it is due; so whatever T0 copies is covered by step 1. New L2
/// tables are initialised in the file (zeroes, or a copy of a shared one) before their L1 entry is changed in memory.
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
        /// Called with or without mutex(), perhaps within a write-back: it takes no lock of ours.
        virtual Task<Error> corrupt_on_write(std::string message, uint64_t offset, uint64_t bytes) = 0;
        /// Null: guest data lives in the image file.
        virtual Node* data_file() = 0;
        /// A write of the header failed, and so did putting back what it said before: nobody knows what it names, so
        /// nothing may be written any more.
        virtual void header_lost(const Error& error) = 0;
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
    /// cluster it touches is dropped once the loss is stable and no request holds it; what falls to 0 goes back to the
    /// host as `by` says. No I/O. Does nothing for images with an external data file: its clusters have no counts, and
    /// a late discard would meet what was written there since, so the verb that holds the claim passes discards on.
    void free_later(uint64_t offset, uint64_t bytes, FreedBy by);
    /// The next write-back must flush data before it writes entries (copied bytes, places that are not fresh, old
    /// contents that were not zero). Before the entry is stored.
    void need_barrier() { barrier_.store(true, std::memory_order_release); }

    // ---- L2 ----

    /// Makes the L1 entry of `l1_index` point to a table of our own: allocates an empty one, or copies a shared one.
    /// Returns at once when it is so already. kCorrupt (the image is marked): the entry cannot be believed.
    Task<Result<>> own_l2_table(uint64_t l1_index);
    /// A slice that stays in the cache until unpinned, read from the file when it is not there; its table is owned. A
    /// plain look when it is there. Waits (and writes back) when every place of its set is taken, so the caller holds
    /// neither mutex() nor another pin.
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
    /// The file is shorter than it was: what is written behind its end now makes it grow anew. Drained.
    void file_was_cut() { stable_size_ = std::min(stable_size_, file_.size()); }
    /// With places waiting, many dirty slices or a log half full: asks for a background write-back.
    bool wants_write_back() const;

    // ---- Header (under mutex(), or drained on the main loop) ----

    /// One write of `after` at `offset` of the file, then a flush. What was there is put back when that fails, so that
    /// the file says what memory says, on an error too; see Host::header_lost().
    Task<Result<>> switch_header(uint64_t offset, std::span<const uint8_t> after);
    /// Rewrites the first cluster from image().header and image().extensions; one write, then a flush; image() says
    /// afterwards what the file says. kTooLarge when it does not fit. Nothing has changed then.
    Task<Result<>> write_header();
    /// The feature words alone (24 bytes at 72, one sector), then a flush. Version 3.
    Task<Result<>> write_features();
    /// The header says something new about the disk after a drained operation: caches of L2 are dropped, L1 is read
    /// again; where active L1 and L2 lie is marked anew. Nothing is dirty.
    Task<Result<>> reload_mapping();
    /// The same for who knows the entries of the L1 table that the header names; cannot fail.
    void replace_mapping(std::span<const uint64_t> l1);
    /// kCorrupt: the L1 table lies on other metadata, so none of its entries may be written.
    Result<> check_l1_place() const;

  private:
    struct Freed {
        uint64_t offset, bytes;
        FreedBy by;
    };
    struct Taken;
    struct FileWrite;

    uint64_t cluster_size() const { return image_.geometry.cluster_size(); }
    uint64_t slices_per_table() const { return cluster_size() / l2_.slice_bytes(); }

    // metadata.cc
    Task<Result<>> load_l1();
    void mark_active_tables();
    void unmark_active_tables();
    Task<Result<>> mark_snapshots();
    Task<Result<>> mark_inactive_tables(uint64_t l1_offset, uint64_t entries);
    void add_freed(Freed freed);
    bool many_freed() const;
    bool has_freed() const;
    Task<Error> corrupt(std::string message, uint64_t offset);

    // l2_tables.cc
    bool owns_table(uint64_t l1_index) const;
    Task<Result<>> make_table(uint64_t l1_index, bool& log_full);
    Task<Result<uint64_t>> take_table();
    Task<Result<>> copy_table(uint64_t from, uint64_t to);
    Task<Result<>> check_l1_entry(uint64_t l1_index);
    Task<Result<Buffer>> read_slice(uint64_t slice);

    // write_back.cc
    Task<Result<>> write_back_locked(bool final_flush);
    Task<void> take(Taken& taken, bool with_freed);
    Task<Result<>> put_down(Taken& taken, bool final_flush);
    Task<void> put_back(Taken& taken);
    Task<Result<>> write_counts();
    Task<Result<>> flush_files();
    Task<Result<>> write_entries(const Taken& taken);
    Task<Result<>> write_joined(std::vector<FileWrite> writes, std::string_view what);
    Task<Result<>> apply_freed(std::vector<Freed> freed);
    bool passes_discard(FreedBy by) const;

    // session.cc
    Task<Result<>> change_header(std::span<const uint8_t> before, std::span<const uint8_t> after);
    Task<Result<>> return_reserved();
    Task<Result<>> end_session();

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
    FlushState flushes_, write_backs_;
    std::atomic<bool> barrier_{false}, in_session_{false};
    bool marks_left_ = false;  // a session is over, but its marks could not be taken off; main loop, drained
    /// Offsets of L2 tables that cannot be right (on other metadata, of two L1 entries, behind the file, off the
    /// clusters): nothing is written there. Changed drained.
    std::unordered_set<uint64_t> bad_tables_;
    std::optional<Structure> l1_overlaps_;  // other metadata that the L1 table lies on
    uint64_t marked_l1_ = 0;                // host offset of what the overlap map knows as active L1; drained
    HostRun spare_tables_;                  // counted, all zeroes, no entry names them; under mutex()
    uint64_t next_spare_tables_ = 1;        // under mutex()
    uint64_t stable_size_ = 0;              // bytes of the file that a flush has made stable; under write_back_mutex_
    bool unflushed_ = false;                // counts or a barrier wait for a flush; under write_back_mutex_
    std::atomic<bool> strict_{false};       // lazy refcounts are written, too: settling
    mutable std::mutex pending_mutex_;
    std::vector<Freed> freed_;  // no request holds them; waiting for T0
    uint64_t freed_bytes_ = 0;
};

}  // namespace gantry::block::qcow2
