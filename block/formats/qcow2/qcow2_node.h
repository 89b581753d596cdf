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
#include "block/formats/qcow2/decoded_clusters.h"
#include "block/formats/qcow2/decompress.h"
#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/l2_slice_cache.h"
#include "block/formats/qcow2/mapping_run.h"
#include "block/formats/qcow2/snapshot_table.h"
#include "runtime/buffer.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::block {
class Graph;
class Observer;
}  // namespace gantry::block

namespace gantry::block::qcow2 {

/// What open() learned from the file; all of it validated.
struct Image {
    Header header;
    Extensions extensions;
    std::string backing_name;       // as stored; empty: none
    std::string full_backing_name;  // resolved against the image's directory
    std::vector<Snapshot> snapshots;
    std::vector<BitmapEntry> bitmaps;
    bool bitmaps_trusted = false;             // the autoclear bit was set
    std::optional<Snapshot> opened_snapshot;  // option `snapshot`
    uint64_t disk_size = 0;                   // of the image, or of the opened snapshot
    std::vector<uint64_t> l1;  // host byte order; what lies beyond the end of the file (zeroes) is left out
    CacheSizes caches;
    Geometry geometry;
};

/// Threads: map, load_map, read_encoded on any loop; the rest on the main loop.
class Qcow2Node final : public FormatNode {
  public:
    /// The slice cache's address space may be refused (kNoMemory).
    static Result<std::shared_ptr<Qcow2Node>> create(std::string name, NodeFlags flags, Image image, Graph& graph);
    ~Qcow2Node() override;

    MapResult map(uint64_t offset, uint64_t length, Extent& out) override;
    Task<Result<Extent>> load_map(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov) override;
    Task<Result<ImageInfo>> image_info() override;
    uint32_t cluster_size() const override { return static_cast<uint32_t>(geometry().cluster_size()); }
    Task<void> close() override;
    Task<Result<>> prepare_reopen(const json::object& options, const NodeFlags& flags) override;

    const Image& image() const { return image_; }
    const Geometry& geometry() const { return image_.geometry; }
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

    Task<void> clean_caches();

    Image image_;
    Loop& main_loop_;
    Observer* observer_;
    const uint32_t slice_shift_;  // log2 of the guest bytes of a slice
    std::unique_ptr<L2SliceCache> l2_cache_;
    AsyncSemaphore decode_slots_;  // bounds the memory that decoding takes: requests beyond it queue
    DecodedClusters decoded_;
    std::mutex loads_mutex_;  // guards loads_; held for a search only
    std::vector<std::shared_ptr<SliceLoad>> loads_;
    std::atomic<uint64_t> slice_loads_{0}, decodes_{0};
    std::atomic<bool> damage_reported_{false};
    Timer clean_timer_;     // main loop
    TaskScope background_;  // main loop
    bool closing_ = false;
};

}  // namespace gantry::block::qcow2
