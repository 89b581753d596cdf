// Qcow2Node: an open image.

#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "block/format_node.h"
#include "block/formats/qcow2/bitmap_directory.h"
#include "block/formats/qcow2/cache_options.h"
#include "block/formats/qcow2/cluster_cipher.h"
#include "block/formats/qcow2/decoded_clusters.h"
#include "block/formats/qcow2/decompress.h"
#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/image.h"
#include "block/formats/qcow2/l2_slice_cache.h"
#include "block/formats/qcow2/mapping_run.h"
#include "block/formats/qcow2/metadata.h"
#include "block/formats/qcow2/snapshot_table.h"
#include "block/image_operations.h"
#include "runtime/buffer.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::block {
class Graph;
class Observer;
}  // namespace gantry::block

namespace gantry::block::qcow2 {

/// kReadOnly: marked corrupt, or opened at an internal snapshot.
Result<> check_may_be_written(const Image& image, std::string_view node);

/// Threads: map, load_map, read_encoded and the verbs of writing on any loop; the rest on the main loop.
///
/// One class over several files, by verb: map.cc, read_encoded.cc (reading), write_plan.cc, write_zero.cc,
/// write_compressed.cc (writing), writable.cc (from read-only to writable and back), qcow2_node.cc (life, facts), and
/// one file for each operation on the image as a whole.
class Qcow2Node final : public FormatNode, public ImageOperations, private Metadata::Host {
  public:
    /// What opening found out besides the image itself.
    struct Setup {
        WriteOptions write;
        bool writable = false;                  // becomes so in opened()
        std::unique_ptr<ClusterCipher> cipher;  // of an encrypted image
    };
    /// The slice cache's address space may be refused (kNoMemory).
    static Result<std::shared_ptr<Qcow2Node>> create(std::string name, NodeFlags flags, Image image, Setup setup,
                                                     Graph& graph);
    ~Qcow2Node() override;

    // ---- Reading ----
    MapResult map(uint64_t offset, uint64_t length, Extent& out) override;
    Task<Result<Extent>> load_map(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov) override;
    Task<Result<>> decode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) override;

    // ---- Writing: metadata() exists ----
    Task<Result<>> encode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) override;
    bool transforms_writes() const override { return cipher_ != nullptr; }
    bool write_allowed(uint64_t host_offset, uint64_t length) override;
    Task<Error> write_refused(Request& rq, uint64_t host_offset, uint64_t length) override;
    uint32_t write_unit(uint64_t offset) override;
    Task<Result<WritePlan>> plan_write(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override;
    Task<Result<>> commit_write(Request& rq, WritePlan& plan) override;
    Task<void> abort_write(Request& rq, WritePlan& plan) override;
    Task<Result<>> zero_mapped(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override;
    Task<Result<>> discard_mapped(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> write_compressed(Request& rq, uint64_t offset, IoVec iov) override;
    Task<Result<>> do_flush(Request& rq) override;

    // ---- Life (main loop) ----
    Task<Result<>> opened() override;
    Task<Result<>> reopened(bool committed) override;
    Task<Result<ImageInfo>> image_info() override;
    bool is_tuning(std::string_view option) const override;
    bool path_suffices() const override;
    uint32_t cluster_size() const override { return static_cast<uint32_t>(geometry().cluster_size()); }
    Task<void> quiesce() override;
    void unquiesce() override;
    Task<void> close() override;
    void children_changed() override;
    Task<Result<>> prepare_reopen(const json::object& options, const NodeFlags& flags) override;
    void commit_reopen() override;
    void abort_reopen() override;
    Task<Result<>> do_resize(uint64_t new_size) override;

    // ---- Operations on the image as a whole (main loop, drained) ----
    ImageOperations* image_operations() override { return this; }
    Task<Result<ImageCheck>> check(CheckRepair repair, Progress progress) override;
    Task<Result<>> resize(uint64_t new_size, Preallocation preallocation, bool allow_shrink,
                          Progress progress) override;
    Task<Result<>> snapshot_create(SnapshotSpec spec) override;
    Task<Result<>> snapshot_apply(std::string id_or_name) override;
    Task<Result<>> snapshot_delete(std::string id, std::string name) override;
    Task<Result<>> amend(json::object options, bool force, Progress progress) override;
    Task<Result<>> change_backing(std::string file, std::string format) override;
    Task<Result<>> make_empty() override;
    Task<Result<>> compact(Progress progress) override;
    Result<> can_store_bitmap(const std::string& name, uint32_t granularity) override;
    Task<Result<>> remove_stored_bitmap(const std::string& name) override;

    // ---- Steps of becoming writable, or of ceasing to be (writable.cc calls them in this order) ----

    /// Loads refcounts and the rest of L1; repairs when the dirty bit is set, reclaims leaks after a crash, replays the
    /// mapping log; loads persistent bitmaps and marks them in use. On failure the node is read-only as before.
    Task<Result<>> make_writable();
    /// Stores persistent bitmaps, settles; the node is read-only afterwards. Errors leave what a crash would.
    Task<Result<>> make_read_only();
    /// bitmap_store.cc: every consistent bitmap of the image becomes a DirtyBitmap of this node. `writable`: those are
    /// marked in use in the file (flushed) before this returns.
    Task<Result<>> load_bitmaps(bool writable);
    /// Writes the persistent ones of bitmaps() and takes the in-use marks off; flushed.
    Task<Result<>> store_bitmaps();

    const Image& image() const { return image_; }
    Image& mutable_image() { return image_; }
    const Geometry& geometry() const { return image_.geometry; }
    /// Null unless the image is encrypted.
    ClusterCipher* cipher() const { return cipher_.get(); }
    /// Null while the node is read-only.
    Metadata* metadata() const { return metadata_.get(); }
    ImageFile& image_file() { return image_file_; }
    /// kReadOnly with the node's name when there is no metadata(); EIO after corruption.
    Result<> check_writable() const;
    /// New facts of the header about the disk's size reach the graph.
    void take_size(uint64_t bytes) { set_size(bytes); }
    using FormatNode::backing;
    using FormatNode::data;
    using FormatNode::file;

    const L2SliceCache& l2_cache() const { return *l2_cache_; }
    const DecodedClusters& decoded() const { return decoded_; }
    /// Slices read from the file so far.
    uint64_t slice_loads() const { return slice_loads_.load(std::memory_order_relaxed); }
    /// Clusters decompressed so far.
    uint64_t decodes() const { return decodes_.load(std::memory_order_relaxed); }

  private:
    /// One read of a slice that several requests may wait for.
    struct SliceLoad {
        explicit SliceLoad(uint64_t s) : slice(s) {}
        const uint64_t slice;
        AsyncEvent done;
        std::optional<Error> error;
    };
    struct Plan;
    struct NewCaches {
        CacheSizes sizes;
        std::unique_ptr<L2SliceCache> l2;  // null: it stays
    };
    /// A reopen between prepare and commit.
    struct Reopening {
        bool was_writable = false, writable = false;
        bool stored = false;  // bitmaps are stored and unmarked
        WriteOptions options;
        NewCaches caches;
        std::shared_ptr<Metadata> metadata;  // writable before and after, with other options
    };

    Qcow2Node(std::string name, NodeFlags flags, Image image, Setup setup, Graph& graph);

    // ---- map.cc ----
    void expect(uint64_t offset) const override {
        if (offset < size()) l2_cache_->prefetch(slice_of(offset), index_in_slice(offset) * entry_words());
        if (const Node* below = backing()) below->expect(offset);
    }
    uint64_t slice_of(uint64_t offset) const { return offset >> slice_shift_; }
    uint64_t slice_end(uint64_t offset) const { return (slice_of(offset) + 1) << slice_shift_; }
    uint64_t l1_entry(uint64_t offset) const;
    uint64_t l1_entries() const { return metadata_ ? metadata_->l1().size() : image_.l1.size(); }
    /// Adds what memory knows from run.end() on; stops unfinished where a slice is not in memory.
    void extend(MappingRun& run) const;
    Extent to_extent(const MappingRun& run);
    Task<Result<>> extend_from_file(Request& rq, MappingRun& run);
    Error damaged(const MappingRun& run);

    // ---- read_encoded.cc ----
    Task<Result<Buffer>> read_blob(Request& rq, uint64_t host, uint64_t bytes);
    Task<Result<>> decode(Request& rq, const Extent& extent, std::span<uint8_t> cluster);

    // ---- write_plan.cc ----
    /// Words of a cluster's entry, and of cluster `index` in its slice.
    uint32_t entry_words() const { return geometry().extended_l2 ? 2 : 1; }
    uint32_t index_in_slice(uint64_t offset) const {
        return static_cast<uint32_t>((offset & ((uint64_t{1} << slice_shift_) - 1)) >> geometry().cluster_bits);
    }
    Entry entry_in(const L2SliceCache::Pin& pin, uint64_t offset) const;
    /// Session, table of our own, and the slice of `offset`.
    Task<Result<L2SliceCache::Pin>> pin_for_change(uint64_t offset);
    /// Nothing below shows through an unallocated cluster at `offset`.
    bool unallocated_is_zero(uint64_t offset) const;
    /// A contradiction met on the way of a write: the image is marked corrupt.
    Task<Error> damaged_for_write(uint64_t offset, Entry entry, Damage damage);
    Task<Result<>> plan_new_place(WritePlan& plan, Plan& state, uint64_t length);
    void plan_kept_place(WritePlan& plan, Plan& state, uint64_t length) const;
    Task<Result<>> check_place(uint64_t host, uint64_t length);
    Task<Result<>> refuse_place(uint64_t host, uint64_t length);
    uint64_t edge_of(const Entry& old, uint64_t cluster, uint64_t limit, bool is_begin) const;
    Entry entry_after(const Plan& state, const WritePlan& plan, uint64_t cluster, const Entry& old,
                      uint64_t host) const;
    bool commit_plan(WritePlan& plan);
    /// Stores the entries of adjacent clusters, beginning at `offset`, in the pinned slice and in the mapping log.
    /// `words`: entry_words() for each. False: they are stored, but the log had no room; then the places they named
    /// before are given up as ever, and a write-back has to make the entries safe.
    bool store_entries(L2SliceCache::Pin& pin, uint64_t offset, std::span<const uint64_t> words);
    /// The place that an entry named is not named by it any more.
    void free_place(const Entry& old, FreedBy by);

    // ---- write_zero.cc ----
    struct ZeroRequest;
    Task<Result<>> change_to_zero(ZeroRequest z);
    Task<Result<>> change_slice(ZeroRequest z, uint64_t begin, uint64_t end);
    Task<Result<>> check_zeroable(ZeroRequest z);
    Task<Result<>> zero_raw_data(ZeroRequest z);
    bool nothing_below() const;
    bool needs_no_table(uint64_t offset) const;
    Entry zeroed(const ZeroRequest& z, uint64_t cluster, const Entry& old) const;

    // ---- write_compressed.cc ----
    Task<Result<std::optional<Buffer>>> encode(IoVec iov, uint64_t cluster_bytes);
    Task<Result<>> write_blob(Request& rq, uint64_t host, std::span<const uint8_t> blob);
    Task<Result<>> link_blob(uint64_t offset, uint64_t host, uint64_t bytes, bool* linked);

    // ---- qcow2_node.cc, writable.cc ----
    /// Reports damage found while reading (the first time to the observer, each time as kCorrupt).
    Error corrupt(std::string message, std::optional<uint64_t> offset, std::optional<uint64_t> size);
    void tell_observer(std::string message, std::optional<uint64_t> offset, std::optional<uint64_t> size, bool fatal);

    // Metadata::Host
    void retire_places(std::function<void()> fn) override { retire(std::move(fn)); }
    Task<Error> corrupt_on_write(std::string message, uint64_t offset, uint64_t bytes) override;
    Node* data_file() override;
    void header_lost(const Error& error) override;

    // ---- caches.cc ----
    static uint32_t slice_shift_of(const Image& image);
    Task<void> clean_caches();
    /// What `options` make of the caches of the disk as it is.
    Result<NewCaches> prepare_caches(const json::object& options) const;
    /// Drained, nothing is dirty.
    void adopt_caches(NewCaches next);
    /// The disk's size has changed, drained.
    void fit_caches();

    Task<Result<>> become_writable();
    Task<Result<>> repair_after_crash();
    void attach_log();
    Task<Result<>> replay_log();
    Task<Result<>> replay(MappingRecord record);
    std::unexpected<Error> bad_record(const MappingRecord& record) const;
    Task<Result<>> clean_header();
    Task<Result<>> come_to_rest();
    void drop_metadata();
    void keep_l1();
    void start_write_back();
    /// From any loop, after a change: has the main loop write back soon when much is waiting.
    void kick_write_back();
    Task<void> write_back_in_background();

    Image image_;
    ImageFile image_file_;
    Graph& graph_;
    Loop& main_loop_;
    Observer* observer_;
    uint32_t slice_shift_;  // log2 of the guest bytes of a slice; changes drained
    std::unique_ptr<L2SliceCache> l2_cache_;
    WriteOptions write_options_;
    bool wants_writable_;                    // of opened()
    std::shared_ptr<Metadata> metadata_;     // while writable
    std::unique_ptr<ClusterCipher> cipher_;  // encrypted images
    std::optional<Reopening> reopening_;
    AsyncSemaphore decode_slots_;  // bounds the memory that decoding takes: requests beyond it queue
    AsyncSemaphore encode_slots_;  // the same for compressing
    DecodedClusters decoded_;
    std::mutex loads_mutex_;  // guards loads_; held for a search only
    std::vector<std::shared_ptr<SliceLoad>> loads_;
    /// Extended L2: writers of different subclusters of one cluster change its entry one after the other.
    std::array<std::mutex, 16> entry_mutexes_;
    std::atomic<uint64_t> slice_loads_{0}, decodes_{0};
    std::atomic<bool> damage_reported_{false};
    std::atomic<bool> broken_{false};  // marked corrupt, or header_lost_: no write any more
    std::atomic<bool> header_lost_{false};
    Timer clean_timer_;       // main loop
    TaskScope background_;    // main loop
    Timer write_back_timer_;  // main loop
    TaskScope write_back_;    // main loop
    std::atomic<bool> write_back_kicked_{false};
    bool write_back_stops_ = false;
    bool closing_ = false;
};

}  // namespace gantry::block::qcow2
