// FormatNode: an image format is a translation; moving the bytes is written once, here.

#pragma once

#include <functional>
#include <memory>

#include "block/extent.h"
#include "block/node.h"
#include "block/request_epochs.h"
#include "block/tracked_requests.h"
#include "runtime/sync.h"

namespace gantry::block {

/// Where the bytes of a write go. Made by plan_write, ended by exactly one of commit_write / abort_write.
struct WritePlan {
    uint64_t guest_offset = 0;  // first byte covered; equals the asked offset
    uint64_t length = 0;        // > 0, at most what was asked; FormatNode loops for the rest
    Node* node = nullptr;
    uint64_t host_offset = 0;  // where guest_offset lands; contiguous for the whole plan, the copied edges included
    bool in_place = false;     // an existing mapping: nothing to copy, commit does nothing
    uint64_t copy_begin =
        0;  // guest range [copy_begin, guest_offset) and [guest_offset + length, copy_end) must be filled from the
    uint64_t copy_end = 0;  // old contents (cluster or subcluster edges); equal to the ends when nothing is to be
                            // copied. May lie beyond size(): what is there is filled with zeroes
    bool fresh_reads_zero = false;    // the new place is known to read as zeroes: zero edges need no write
    bool flush_copied_first = false;  // copied bytes must be stable before commit_write (spec/qcow2.md section 12)
    bool copied = false;              // set by FormatNode before commit_write: edges were written, zeroes included
    std::unique_ptr<struct PlanState> state;  // the format's own

    WritePlan();
    WritePlan(WritePlan&&) noexcept;
    WritePlan& operator=(WritePlan&&) noexcept;
    ~WritePlan();
};
/// Formats derive their per-plan data from it.
struct PlanState {
    virtual ~PlanState() = default;
};

/// Reads, the backing chain, copy-on-write of partial clusters, zeroes and block_status over a format's map.
///
/// In-flight list: whoever changes mappings (a plan, zeroes, discard, a compressed write) first claims the units it
/// touches; claims that overlap run one after the other, in order of arrival. Reads and writes into existing mappings
/// need no claim: a map stays valid until the request that asked ends, because a format hands freed places to retire()
/// before it uses them again. Lock order: a claim, then the format's own locks.
class FormatNode : public Node {
  public:
    FormatNode(std::string_view driver, std::string name, NodeFlags flags);
    ~FormatNode() override;

    // ---- What a format implements ----

    enum class MapResult : uint8_t { kHit, kNeedIo, kError };
    /// A plain call on any loop: kHit fills `out`; kNeedIo: call load_map. kError never for lack of metadata in memory.
    /// `length` > 0, the range lies inside size().
    virtual MapResult map(uint64_t offset, uint64_t length, Extent& out) = 0;
    /// Brings the metadata in, then answers. kCorrupt / kIo on damage.
    virtual Task<Result<Extent>> load_map(Request& rq, uint64_t offset, uint64_t length) = 0;
    /// kEncoded extents: decode guest bytes [offset, +iov.bytes) (inside the extent) into iov. On the blocking pool
    /// where it computes.
    virtual Task<Result<>> read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov);
    /// transform extents: the bytes of [guest offset, host offset) were read / will be written; changed in place.
    virtual Task<Result<>> decode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov);
    virtual Task<Result<>> encode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov);

    // Writable formats. They call recycle_places() if space can be freed or moved while requests run.

    /// Size of the aligned unit around `offset` that must belong to one plan: a cluster while it has no place, a
    /// subcluster once it has one. Power of two; a plain call on any loop. Default: cluster_size(), at least 1.
    virtual uint32_t write_unit(uint64_t offset);
    /// Called with [offset, offset + length) claimed, rounded out to write_unit(). Looks at the mapping under the
    /// format's own lock: it may exist meanwhile (in_place). Edges to be copied lie inside the claim.
    virtual Task<Result<WritePlan>> plan_write(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    /// Data and copies are written (and, if asked, flushed): make the mapping visible. On an error the format has
    /// undone the plan itself; abort_write is not called.
    virtual Task<Result<>> commit_write(Request& rq, WritePlan& plan);
    /// The bytes could not be written: the old mapping stays.
    virtual Task<void> abort_write(Request& rq, WritePlan& plan);
    /// Bytes written to a plan's place need encode_in_place first.
    virtual bool transforms_writes() const { return false; }
    /// Whether an existing mapping may be written to: false where something else lies there. A plain call on any loop,
    /// cheap; asked before every write in place.
    virtual bool write_allowed(uint64_t host_offset, uint64_t length) { return true; }
    /// The error of a write that write_allowed() forbade.
    virtual Task<Error> write_refused(Request& rq, uint64_t host_offset, uint64_t length);
    /// Whole units only (zeroes_alignment / discard_alignment; the last one ends at size()); no plan is in flight in
    /// any cluster it touches. kUnsupported (with nothing changed): data is written.
    virtual Task<Result<>> zero_mapped(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    virtual Task<Result<>> discard_mapped(Request& rq, uint64_t offset, uint64_t length);
    /// One whole cluster (the last one ends at size()), claimed. kUnsupported: it is written plainly.
    virtual Task<Result<>> write_compressed(Request& rq, uint64_t offset, IoVec iov);
    /// Writes back metadata in its order, then FormatNode flushes the data child and the file child.
    virtual Task<Result<>> flush_metadata(Request& rq);

    // ---- Written once ----
    Task<Result<>> do_read(Request& rq, uint64_t offset, IoVec iov) override;
    Task<Result<>> do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) override;
    Task<Result<>> do_write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override;
    Task<Result<>> do_discard(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> do_flush(Request& rq) override;
    Task<Result<>> do_preload(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<BlockStatus>> do_block_status(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<size_t>> do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                           std::span<BlockStatus> out) override;
    /// Answers when every extent of the range is a hit and is zero or kData in a node that answers try_read.
    int do_try_read(Request& rq, uint64_t offset, const IoVec& iov) override;
    /// Answers when the whole range is one kData extent that needs no copy and no transform.
    int do_try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) override;
    void children_changed() override { cache_children(); }

  protected:
    /// Null when there is none. Re-pointed while drained.
    Node* backing() const { return backing_ ? backing_->node.get() : nullptr; }
    Node& file() const { return *file_->node; }
    Node& data() const { return data_ ? *data_->node : *file_->node; }
    /// Looks up the children by role. The graph calls it through children_changed().
    void cache_children();
    /// Once, before the first request: from now on requests are counted, so that retire() can wait for them.
    void recycle_places() { recycles_ = true; }
    /// Runs `fn` when every request on this node that began before now has ended: no map in use names the place any
    /// more. A plain function, on any thread; at once when no request runs, so the caller holds no lock that `fn`
    /// takes.
    void retire(std::function<void()> fn) { epochs_.retire(std::move(fn)); }

  private:
    /// A request that uses maps, for retire().
    class Pass {
      public:
        explicit Pass(FormatNode& node) : node_(node.recycles_ ? &node : nullptr) {
            if (node_) token_ = node_->epochs_.enter();
        }
        ~Pass() {
            if (node_) node_->epochs_.leave(token_);
        }
        Pass(const Pass&) = delete;

      private:
        FormatNode* node_;
        RequestEpochs::Token token_;
    };

    /// Follows a hit with the next ones as long as they continue it; `wanted` bounds the result's length.
    void extend(uint64_t offset, uint64_t wanted, Extent& extent);
    /// A map joined with what continues it; false: ask miss().
    bool hit(uint64_t offset, uint64_t length, Extent& extent);
    Task<Result<Extent>> miss(Request& rq, uint64_t offset, uint64_t length);

    Task<Result<>> read_pass(Request& rq, uint64_t offset, IoVec iov);
    /// The loop over extents; inside somebody's Pass. Large and encoded extents of one request are read side by side.
    Task<Result<>> read_extents(Request& rq, uint64_t offset, IoVec iov);
    struct SideBySide;
    Task<Result<>> read_extent(Request& rq, const Extent& extent, uint64_t offset, IoVec iov);
    /// The bytes [skip, + extent.length) of `iov`; for SideBySide, which `rq` and `iov` outlive.
    Task<void> read_beside(Request& rq, Extent extent, uint64_t offset, IoVec iov, uint64_t skip, SideBySide* reads);
    Task<Result<>> read_backing(Request& rq, uint64_t offset, IoVec iov);
    Task<Result<>> read_transformed(Request& rq, Extent extent, uint64_t offset, IoVec iov);
    Task<Result<BlockStatus>> status_of(Request& rq, Extent extent, uint64_t offset, uint64_t length);
    /// What the extent alone tells; false: the backing file must be asked.
    bool own_status(const Extent& extent, uint64_t offset, uint64_t length, BlockStatus& status) const;
    /// Whether the whole of [begin, end) reads as zeroes, as far as maps tell. What lies beyond size() does.
    Task<Result<bool>> reads_as_zero(Request& rq, uint64_t begin, uint64_t end);

    Task<Result<>> write_extents(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags);
    Task<Result<>> write_in_place(Request& rq, Node* node, uint64_t host, bool transform, uint64_t offset, IoVec iov);
    /// One plan for the beginning of the range; the bytes done, 0: map again.
    Task<Result<uint64_t>> write_planned(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags);
    Task<Result<>> write_plan_bytes(Request& rq, WritePlan& plan, IoVec iov);
    /// What an edge held before; zeroes beyond size().
    Task<Result<>> read_edge(Request& rq, uint64_t offset, IoVec iov);
    Task<Result<>> write_encoded(Request& rq, Node* node, uint64_t host, uint64_t offset, IoVec iov);
    /// The same for one compressed cluster; 0: write plainly.
    Task<Result<uint64_t>> write_one_compressed(Request& rq, uint64_t offset, IoVec iov);
    Task<Result<>> write_zero_data(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);

    Child* file_ = nullptr;
    Child* data_ = nullptr;
    Child* backing_ = nullptr;
    TrackedRequests claims_;
    bool recycles_ = false;
    RequestEpochs epochs_;
};

}  // namespace gantry::block
