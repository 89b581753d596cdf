// Qcow2Node: an open image.

#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
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

/// Threads: map, load_map, read_encoded and the verbs of writing on any loop; the rest on the main loop.
///
/// One class over several files, by verb: map.cc, read_encoded.cc (reading), write_plan.cc, write_zero.cc,
/// write_compressed.cc (writing), writable.cc (from read-only to writable and back), qcow2_node.cc (life, facts), and
/// one file for each operation on the image as a whole.
class Qcow2Node final : public FormatNode, public ImageOperations, private Metadata::Host {
  public:
    /// The slice cache's address space may be refused (kNoMemory).
    static Result<std::shared_ptr<Qcow2Node>> create(std::string name, NodeFlags flags, Image image, Graph& graph);
    ~Qcow2Node() override;

    // ---- Reading ----
    MapResult map(uint64_t offset, uint64_t length, Extent& out) override;
    Task<Result<Extent>> load_map(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov) override;
    Task<Result<>> decode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) override;

    // ---- Writing: metadata() exists ----
    Task<Result<>> encode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) override;
    bool transforms_writes() const override { return cipher_ != nullptr; }
    uint32_t write_unit(uint64_t offset) override;
    Task<Result<WritePlan>> plan_write(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override;
    Task<Result<>> commit_write(Request& rq, WritePlan& plan) override;
    Task<void> abort_write(Request& rq, WritePlan& plan) override;
    Task<Result<>> zero_mapped(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override;
    Task<Result<>> discard_mapped(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> write_compressed(Request& rq, uint64_t offset, IoVec iov) override;
    Task<Result<>> do_flush(Request& rq) override;

    // ---- Life (main loop) ----
    Task<Result<ImageInfo>> image_info() override;
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

    Qcow2Node(std::string name, NodeFlags flags, Image image, Graph& graph);

    uint64_t slice_of(uint64_t offset) const { return offset >> slice_shift_; }
    uint64_t l1_entry(uint64_t offset) const;
    /// Adds what memory knows from run.end() on; stops unfinished where a slice is not in memory.
    void extend(MappingRun& run) const;
    Extent to_extent(const MappingRun& run);
    Task<Result<>> extend_from_file(Request& rq, MappingRun& run);
    Error damaged(const MappingRun& run);

    Task<Result<Buffer>> read_blob(Request& rq, uint64_t host, uint64_t bytes);
    Task<Result<>> decode(Request& rq, const Extent& extent, std::span<uint8_t> cluster);

    /// Reports damage found while reading (the first time to the observer, each time as kCorrupt).
    Error corrupt(std::string message, std::optional<uint64_t> offset, std::optional<uint64_t> size);

    // Metadata::Host
    void retire_places(std::function<void()> fn) override { retire(std::move(fn)); }
    Task<Error> corrupt_on_write(std::string message, uint64_t offset, uint64_t bytes) override;
    Node* data_file() override;

    Task<void> clean_caches();

    Image image_;
    ImageFile image_file_;
    Loop& main_loop_;
    Observer* observer_;
    const uint32_t slice_shift_;  // log2 of the guest bytes of a slice
    std::unique_ptr<L2SliceCache> l2_cache_;
    std::unique_ptr<Metadata> metadata_;     // while writable
    std::unique_ptr<ClusterCipher> cipher_;  // encrypted images
    AsyncSemaphore decode_slots_;            // bounds the memory that decoding takes: requests beyond it queue
    DecodedClusters decoded_;
    std::mutex loads_mutex_;  // guards loads_; held for a search only
    std::vector<std::shared_ptr<SliceLoad>> loads_;
    std::atomic<uint64_t> slice_loads_{0}, decodes_{0};
    std::atomic<bool> damage_reported_{false};
    std::atomic<bool> broken_{false};  // marked corrupt: no write any more
    Timer clean_timer_;                // main loop
    TaskScope background_;             // main loop
    bool closing_ = false;
};

}  // namespace gantry::block::qcow2
