// Node: a vertex of the block graph. The public verbs are the request layer (block/request_layer.cc); drivers implement
// do_*.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "block/flush_state.h"
#include "block/permissions.h"
#include "block/request.h"
#include "block/tracked_requests.h"
#include "runtime/error.h"
#include "runtime/iovec.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::block {

class Graph;
class Root;
class Node;
class DirtyBitmap;
class ImageOperations;

enum class DiscardMode : uint8_t { kIgnore, kUnmap };
enum class DetectZeroes : uint8_t { kOff, kOn, kUnmap };

/// The options every node has, after inheritance (spec/qmp.md section 9.1).
struct NodeFlags {
    bool read_only = false;
    bool auto_read_only = false;
    bool force_share = false;
    bool cache_direct = false;
    bool cache_no_flush = false;
    DiscardMode discard = DiscardMode::kIgnore;
    DetectZeroes detect_zeroes = DetectZeroes::kOff;
    bool operator==(const NodeFlags&) const = default;
};

/// What an edge is for; decides default permissions and where block_status and backing lookups go.
enum class ChildRole : uint8_t {
    kFiltered,  // a filter's (or raw's) only data child
    kFile,      // metadata, and data when there is no kData child
    kData,      // external data file
    kBacking,   // what unallocated ranges read from
};

/// An edge parent -> child. Owned by the parent node. Changed on the main loop while both ends are drained.
struct Child {
    Node* parent = nullptr;
    std::string name;  // "file", "backing", "data-file", "children.0"
    ChildRole role = ChildRole::kFile;
    std::shared_ptr<Node> node;
    EdgePerms perms;         // as committed
    bool is_inline = false;  // defined inside the parent's options: vanishes with it
};

/// One internal snapshot, for ImageInfo.
struct SnapshotInfo {
    std::string id, name;
    uint64_t vm_state_size = 0;
    uint32_t date_sec = 0, date_nsec = 0;
    uint64_t vm_clock_ns = 0;
    std::optional<int64_t> icount;
};

/// ImageInfo of the QMP schema.
struct ImageInfo {
    uint64_t virtual_size = 0;
    std::optional<uint64_t> actual_size;
    std::optional<uint64_t> cluster_size;
    std::optional<bool> dirty;
    std::optional<bool> encrypted;
    std::optional<bool> compressed;
    std::string backing_filename, full_backing_filename, backing_format;  // empty: none
    std::vector<SnapshotInfo> snapshots;
    json::object format_specific;  // {type, data}; empty: none
};

/// Threads: verbs with a Request run on the request's loop, any loop; everything else on the main loop unless noted.
/// A node is kept alive by its parents (shared_ptr) on the control path and by drained graph changes on the data path.
class Node : public std::enable_shared_from_this<Node> {
  public:
    Node(std::string_view driver, std::string name, NodeFlags flags);
    virtual ~Node();
    Node(const Node&) = delete;
    Node& operator=(const Node&) = delete;

    const std::string& name() const { return name_; }
    std::string_view driver() const { return driver_; }
    const NodeFlags& flags() const { return flags_; }
    /// Effective: what reopen, auto-read-only and permissions made of it. Any loop.
    bool read_only() const { return read_only_.load(std::memory_order_relaxed); }
    /// Guest-visible size in bytes (exact, not rounded). Any loop.
    uint64_t size() const { return size_.load(std::memory_order_acquire); }
    const Limits& limits() const { return limits_; }

    // ---- Verbs (any loop). Memory stays valid until completion. Never short: all or an error. ----

    /// Reads the whole of `iov` from `offset`. Beyond size(): zeroes.
    Task<Result<>> read(Request& rq, uint64_t offset, IoVec iov);
    /// Errors: kReadOnly, kNoSpace (beyond size() and not growable), kIo, ... Serialised against overlapping
    /// read-modify-writes.
    Task<Result<>> write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags = WriteFlags::kNone);
    /// The range reads as zeroes afterwards; falls back to writing zeroes in bounded pieces unless kNoFallback.
    Task<Result<>> write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    /// A hint: shrinks inward to the discard alignment; ends here unless flags().discard is kUnmap. kUnsupported is
    /// swallowed.
    Task<Result<>> discard(Request& rq, uint64_t offset, uint64_t length);
    /// Everything acknowledged before the call is stable after it. Concurrent callers share one flush. After a failure
    /// that leaves the page cache untrustworthy every later flush fails too.
    Task<Result<>> flush(Request& rq);
    /// Brings [offset, +length) near (page cache, copy-on-read). Errors are hints too.
    Task<Result<>> preload(Request& rq, uint64_t offset, uint64_t length);
    /// About the first part of [offset, offset + length), length > 0, inside size(). Looks through backing files.
    Task<Result<BlockStatus>> block_status(Request& rq, uint64_t offset, uint64_t length);
    /// The same for the parts that follow each other from `offset` on: how many of `out` (not empty) are filled, at
    /// least one. Stops early when going on would take long.
    Task<Result<size_t>> block_statuses(Request& rq, uint64_t offset, uint64_t length, std::span<BlockStatus> out);

    /// Non-blocking attempts, plain calls: 0 = done, -EAGAIN = use the coroutine, other -errno = failed.
    /// try_read answers only when map and page cache can; try_write only without flags and when the driver may write
    /// inline now.
    int try_read(Request& rq, uint64_t offset, const IoVec& iov) {
        return fast_read_.load(std::memory_order_relaxed) && offset <= size() && iov.bytes <= size() - offset
                   ? do_try_read(rq, offset, iov)
                   : -11 /* EAGAIN */;
    }
    int try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) {
        if (!fast_write_.load(std::memory_order_relaxed) || offset > size() || iov.bytes > size() - offset) return -11;
        if ((flags & ~WriteFlags::kUnchanged) != WriteFlags::kNone) return -11;
        int r = do_try_write(rq, offset, iov, flags);
        if (r == 0) note_highest(offset + iov.bytes);
        return r;
    }
    /// A request at `offset` (any number) comes next: what finding its place needs may begin to move into the CPU's
    /// cache. Changes nothing; under the same rules as try_read.
    virtual void expect(uint64_t offset) const {}

    // ---- Driver part: called by the request layer with aligned, in-bounds, split requests ----

    virtual Task<Result<>> do_read(Request& rq, uint64_t offset, IoVec iov) = 0;
    virtual Task<Result<>> do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags);  // default: kReadOnly
    virtual Task<Result<>> do_write_zeroes(Request& rq, uint64_t offset, uint64_t length,
                                           WriteFlags flags);                          // kUnsupported
    virtual Task<Result<>> do_discard(Request& rq, uint64_t offset, uint64_t length);  // kUnsupported
    virtual Task<Result<>> do_flush(Request& rq);                                      // ok
    virtual Task<Result<>> do_preload(Request& rq, uint64_t offset, uint64_t length);  // ok
    /// Default: all data.
    virtual Task<Result<BlockStatus>> do_block_status(Request& rq, uint64_t offset, uint64_t length);
    /// Default: one, by do_block_status().
    virtual Task<Result<size_t>> do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                                   std::span<BlockStatus> out);
    virtual int do_try_read(Request& rq, uint64_t offset, const IoVec& iov) { return -11; }
    virtual int do_try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) { return -11; }
    /// New size in bytes; main loop, drained. Default: kUnsupported "Image format driver does not support resize".
    virtual Task<Result<>> do_resize(uint64_t new_size);

    // ---- Life cycle (main loop) ----

    /// The last step of opening: children are attached, no request has come yet. On failure the node is closed again.
    virtual Task<Result<>> opened() { co_return Result<>(); }
    /// Stops / restarts the node's own activity (write-back, timers, prefetch); requests are already drained.
    virtual Task<void> quiesce() { co_return; }
    virtual void unquiesce() {}
    /// A drain that covers this node begins / has ended. Requests that wait inside the node (for a budget, for a lost
    /// server) are let go meanwhile, so that the drain is bounded. drain_started() comes before requests are waited for
    /// and before quiesce().
    virtual void drain_started() {}
    virtual void drain_ended() {}
    /// A child was re-pointed, attached or detached, or its size changed (drained): sizes, limits and cached pointers
    /// are taken again.
    virtual void children_changed() {}
    /// Flushes and releases resources; no request will follow. Errors are logged.
    virtual Task<void> close() { co_return; }

    /// What this node takes on `child`, given what its own parents take (union) and share (intersection). The default
    /// follows the role.
    virtual EdgePerms child_perms(const Child& child, EdgePerms from_parents) const;
    /// Two-phase permission change on the final graph: prepare may fail and reopens or locks; then commit (cannot fail)
    /// or abort. `perms` = union taken / intersection shared by all parents. Called when they changed, and once at
    /// opening.
    virtual Task<Result<>> prepare_perms(EdgePerms perms) { co_return Result<>(); }
    virtual void commit_perms(EdgePerms perms) {}
    virtual void abort_perms() {}

    /// Reopen with a new set of validated options: prepare checks and readies (nothing visible changes), commit
    /// switches, abort forgets. The graph handles children and NodeFlags itself. Default: refuses a change of any
    /// driver option
    /// ("Cannot change the option 'X'").
    virtual Task<Result<>> prepare_reopen(const json::object& options, const NodeFlags& flags);
    virtual void commit_reopen() {}
    virtual void abort_reopen() {}
    /// After commit or abort of the whole reopen, permissions included, still drained: what needs I/O with the new
    /// rights, or to take back what prepare did. A failure is reported; the node is read-only then.
    virtual Task<Result<>> reopened(bool committed) { co_return Result<>(); }

    /// The plain name when driver and path alone describe the node, else "json:{...}"; at most 1023 bytes.
    virtual std::string filename() const;
    /// Whether an option says how the node works and not what it shows: filename() leaves it out.
    virtual bool is_tuning(std::string_view option) const;
    /// Whether driver and path lead to what this node shows.
    virtual bool path_suffices() const;
    virtual Task<Result<ImageInfo>> image_info();
    /// What can be done to the image as a whole; null: nothing (protocols, filters).
    virtual ImageOperations* image_operations() { return nullptr; }
    /// Cluster size for default granularities; 0 = none.
    virtual uint32_t cluster_size() const { return 0; }
    /// {driver: ..., counters} of query-blockstats; empty: none.
    virtual json::object driver_stats() const { return {}; }
    /// A plain descriptor that holds the guest's bytes at guest offset + `offset`; nullopt with the reason otherwise.
    struct Passthrough {
        int fd = -1;
        uint64_t offset = 0;
    };
    virtual Result<Passthrough> passthrough() {
        return fail(ErrorKind::kUnsupported, "driver '{}' keeps no plain file", driver_);
    }
    /// Network leaves: fails what is in flight so that a drain can end.
    virtual void cancel_in_flight() {}

    // ---- Graph side (main loop) ----

    Child* child(std::string_view name) const;
    const std::vector<std::unique_ptr<Child>>& children() const { return children_; }
    const std::vector<Child*>& parents() const { return parents_; }
    const std::vector<Root*>& roots() const { return roots_; }
    bool monitor_owned() const { return monitor_owned_; }
    /// No longer part of the graph: closed, or about to be.
    bool closed() const { return closed_; }
    /// Union of what all parents take / intersection of what they share, as committed.
    EdgePerms cumulative_perms() const { return perms_; }
    const json::object& options() const { return options_; }  // as opened or last reopened, validated
    const std::vector<std::shared_ptr<DirtyBitmap>>& bitmaps() const { return bitmaps_; }
    /// Main loop, drained. The name is not taken yet.
    void add_bitmap(std::shared_ptr<DirtyBitmap> bitmap);
    void remove_bitmap(const DirtyBitmap& bitmap);
    uint64_t wr_highest_offset() const { return wr_highest_.load(std::memory_order_relaxed); }
    /// From now on writes are tracked, so that kSerialising requests can exclude others. Main loop, drained (or before
    /// the first request); whoever will send kSerialising requests calls it first. Nodes with request_alignment > 1
    /// need no call.
    void track_requests();

  protected:
    void set_size(uint64_t bytes) { size_.store(bytes, std::memory_order_release); }
    /// Raises size() to at least `bytes` (a growing write); any loop.
    void grow_size(uint64_t bytes);
    void set_read_only(bool ro);
    /// Whether try_read/try_write may skip the request layer, as far as the driver is concerned. Main loop.
    void allow_fast_paths(bool read, bool write);
    Limits limits_;

  private:
    friend class Graph;
    friend class GraphTransaction;
    friend class OpenContext;
    friend class Root;
    friend struct RequestLayer;
    friend class PermissionPass;
    friend class Reopen;

    /// Combines what the driver allows with limits, bitmaps, detect-zeroes, tracking and read-only; whoever changes one
    /// of those calls it (main loop, drained).
    void update_fast_paths();
    /// wr_highest_offset() is at least `end` afterwards; any loop.
    void note_highest(uint64_t end) {
        uint64_t seen = wr_highest_.load(std::memory_order_relaxed);
        while (seen < end && !wr_highest_.compare_exchange_weak(seen, end, std::memory_order_relaxed)) {
        }
    }

    std::string driver_;
    std::string name_;
    NodeFlags flags_;
    std::atomic<bool> read_only_{false};
    std::atomic<uint64_t> size_{0};
    std::atomic<uint64_t> wr_highest_{0};
    std::atomic<bool> fast_read_{false}, fast_write_{false};
    bool fast_read_allowed_ = false, fast_write_allowed_ = false;
    bool monitor_owned_ = false;
    bool closed_ = false;
    bool perms_known_ = false;  // prepare_perms() has run once
    uint32_t quiesce_count_ = 0;
    uint32_t pins_ = 0;  // held by an operation in progress: stays open without users
    EdgePerms perms_;
    NodeFlags inherited_;  // what a definition without flags of its own would have got
    json::object options_;
    std::span<const std::string_view> reopen_options_;  // of its Driver
    std::vector<std::unique_ptr<Child>> children_;
    std::vector<Child*> parents_;
    std::vector<Root*> roots_;
    std::vector<std::shared_ptr<DirtyBitmap>> bitmaps_;
    bool track_ = false;       // track_requests() was called
    TrackedRequests tracked_;  // used when read-modify-write or serialising requests can happen
    FlushState flush_state_;
};

/// Forwards every verb to its only child "file" (or the name given); a filter overrides what differs.
class Filter : public Node {
  public:
    using Node::Node;
    Task<Result<>> do_read(Request& rq, uint64_t offset, IoVec iov) override;
    Task<Result<>> do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) override;
    Task<Result<>> do_write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override;
    Task<Result<>> do_discard(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> do_flush(Request& rq) override;
    Task<Result<>> do_preload(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<BlockStatus>> do_block_status(Request& rq, uint64_t offset, uint64_t length) override;
    int do_try_read(Request& rq, uint64_t offset, const IoVec& iov) override;
    int do_try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) override;
    Task<Result<>> do_resize(uint64_t new_size) override;
    Result<Passthrough> passthrough() override;

  protected:
    /// The filtered child; the graph sets it before the node is used and re-points it while drained.
    Node& below() const { return *children().front()->node; }
};

}  // namespace gantry::block
