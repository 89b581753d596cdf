// The trees of an image: an L1 table, its L2 tables and what their entries refer to; counts of all of it, and the
// COPIED flags that follow from the counts (spec/qcow2.md sections 3, 6 and 7).

#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/operation.h"

namespace gantry::block::qcow2 {

/// Bytes of the image file that an entry refers to; bytes == 0: none.
struct Reference {
    uint64_t offset = 0;
    uint64_t bytes = 0;
    bool operator==(const Reference&) const = default;
};
/// Pure. With an external data file standard entries refer to nothing in the image file. kCorrupt with the sentence of
/// damage_text().
Result<Reference> reference_of(const Geometry& geometry, uint64_t entry);

/// An L2 table in memory, as on disk.
class TableWords {
  public:
    static Result<TableWords> create(const Geometry& geometry);
    uint64_t entries() const { return uint64_t{1} << l2_bits_; }
    uint64_t entry(uint64_t index) const;
    void set_entry(uint64_t index, uint64_t entry);
    /// Second word of an extended entry; 0 without.
    uint64_t bitmap(uint64_t index) const;
    void set_bitmap(uint64_t index, uint64_t bitmap);
    std::span<uint8_t> bytes() { return bytes_.span(); }
    /// Reads the table of an L1 entry. kCorrupt when its place is not on a cluster.
    Task<Result<>> load(Operation& op, uint64_t offset);
    /// kCorrupt when something else lies there.
    Task<Result<>> save(Operation& op, uint64_t offset);
    /// Adds up the references of entries [first, end) into runs; blobs stand alone.
    Result<std::vector<Reference>> references(const Geometry& geometry, uint64_t first, uint64_t end) const;

  private:
    Buffer bytes_;
    uint32_t l2_bits_ = 0, entry_shift_ = 3;
};

/// One more count for everything the table refers to: L2 tables and what their entries name. All or nothing: kInvalid
/// "Invalid argument" when a count would not fit.
Task<Result<>> reference_tree(Operation& op, std::span<const uint64_t> l1);
/// One less, after the loss of the tree is stable. finish() is called now and then with `discard`, and must be called
/// at the end.
Task<Result<>> release_tree(Operation& op, std::span<const uint64_t> l1, bool discard);

enum class Copied : uint8_t {
    kByCount,  // set where the count is 1
    kNowhere,  // everything is shared: no count need be looked up
};
/// Makes the COPIED flags of the tables below `l1` right, in the file, and those of `l1` itself, in memory. True: a
/// word of `l1` changed.
Task<Result<bool>> rebuild_copied(Operation& op, std::span<uint64_t> l1, Copied how);

/// Marks (or unmarks) the L2 tables below `l1` in the overlap map.
void mark_tables(OverlapMap& overlap, Structure structure, std::span<const uint64_t> l1, uint64_t cluster_size,
                 bool add);

}  // namespace gantry::block::qcow2
