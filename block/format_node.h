// FormatNode: an image format is a translation; moving the bytes is written once, here.

#pragma once

#include <memory>

#include "block/extent.h"
#include "block/node.h"
#include "runtime/sync.h"

namespace gantry::block {

/// Where the bytes of a write go. Made by plan_write, ended by exactly one of commit_write / abort_write.
struct WritePlan {
    uint64_t guest_offset = 0;       // first byte covered; equals the asked offset
    uint64_t length = 0;             // > 0, at most what was asked; FormatNode loops for the rest
    Node* node = nullptr;
    uint64_t host_offset = 0;        // where guest_offset lands; contiguous for the whole plan, the copied edges included
    bool in_place = false;           // an existing mapping: nothing to copy, commit does nothing
    uint64_t copy_begin = 0;         // guest range [copy_begin, guest_offset) and [guest_offset + length, copy_end) must be filled from the
    uint64_t copy_end = 0;           // old contents (cluster or subcluster edges); equal to the ends when nothing is to be copied
    bool fresh_reads_zero = false;   // the new place is known to read as zeroes: zero edges need no write
    bool flush_copied_first = false; // copied bytes must be stable before commit_write (spec/qcow2.md section 12)
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
/// In-flight list: a plan that is not in_place registers [copy_begin, copy_end); a write, zero or discard that overlaps waits
/// until that plan ended and maps again; reads need not wait (they see the old or the new mapping).
class FormatNode : public Node {
 public:
    using Node::Node;
    ~FormatNode() override;

    // ---- What a format implements ----

    enum class MapResult : uint8_t { kHit, kNeedIo, kError };
    /// A plain call on any loop: kHit fills `out`; kNeedIo: call load_map. kError never for lack of metadata in memory. `length` > 0,
    /// the range lies inside size().
    virtual MapResult map(uint64_t offset, uint64_t length, Extent& out) = 0;
    /// Brings the metadata in, then answers. kCorrupt / kIo on damage.
    virtual Task<Result<Extent>> load_map(Request& rq, uint64_t offset, uint64_t length) = 0;
    /// kEncoded extents: decode guest bytes [offset, +iov.bytes) (inside the extent) into iov. On the blocking pool where it computes.
    virtual Task<Result<>> read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov);
    /// transform extents: the bytes of [guest offset, host offset) were read / will be written; changed in place.
    virtual Task<Result<>> decode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov);
    virtual Task<Result<>> encode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov);

    // Writable formats.
    virtual Task<Result<WritePlan>> plan_write(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    /// Data and copies are written (and, if asked, flushed): make the mapping visible.
    virtual Task<Result<>> commit_write(Request& rq, WritePlan& plan);
    virtual Task<void> abort_write(Request& rq, WritePlan& plan);
    /// Bytes written to a plan's place need encode_in_place first.
    virtual bool transforms_writes() const { return false; }
    /// Whole units only (zeroes_alignment / discard_alignment); the range overlaps no plan in flight. kUnsupported: data is written.
    virtual Task<Result<>> zero_mapped(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    virtual Task<Result<>> discard_mapped(Request& rq, uint64_t offset, uint64_t length);
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
    /// The format calls it when children are in place (the graph does after open and after each re-pointing).
    void cache_children();

 private:
    friend class Graph;
    struct InFlight;
    Task<Result<Extent>> lookup(Request& rq, uint64_t offset, uint64_t length);
    Child* file_ = nullptr;
    Child* data_ = nullptr;
    Child* backing_ = nullptr;
    std::unique_ptr<InFlight> in_flight_;
};

}  // namespace gantry::block
