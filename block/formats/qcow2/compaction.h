// Compaction: clusters from the end of the file move into holes further down. Internal to compact*.cc.

#pragma once

#include <cstdint>
#include <functional>
#include <unordered_set>
#include <vector>

#include "block/formats/qcow2/operation.h"
#include "block/formats/qcow2/tree_refcounts.h"
#include "block/image_operations.h"

namespace gantry::block::qcow2 {

/// What moves: data clusters, also those that snapshots share; compressed clusters; L2 tables. A cluster moves only
/// when the references found to it are exactly those counted, so what belongs to something else (bitmaps, the
/// encryption header) or has leaked stays. Then the L1 tables, the snapshot table and the refcount structures move
/// where there is a lower place for them.
///
/// Each batch: counts of the new places and the copies -> stable -> entries -> stable -> counts of the old places. The
/// map of references is made for a window of the file at a time, so memory stays bounded.
class Compaction {
  public:
    Compaction(Operation& op, Progress progress);
    /// Stops at a point where the image is whole; publishes what the active tables say in any case.
    Task<Result<>> run();
    /// The same for what describes the disk only: L2 and L1 tables, snapshot table, refcount structures.
    Task<Result<>> run_metadata();

  private:
    /// An entry of a table in the file that names a cluster.
    struct Ref {
        uint64_t cluster = 0;  // or, of blobs, the host offset in bytes
        uint64_t table = 0;    // host offset of the table
        uint64_t guest = 0;    // of data
        uint64_t bytes = 0;    // of blobs
        uint32_t index = 0;
        uint64_t paths = 1;  // how often the cluster is counted for this entry
    };
    struct Move {
        uint64_t from = 0, to = 0;  // clusters
        uint64_t count = 0;
        size_t first_ref = 0, refs = 0;  // in refs_
    };
    struct BlobMove {
        uint64_t from = 0, to = 0, bytes = 0;  // host offsets
        uint64_t count = 0;
        size_t first_ref = 0, refs = 0;
    };
    enum class What : uint8_t { kData, kTables, kBlobs };

    // compact.cc
    Task<Result<>> look();
    Task<Result<>> move_all(What what);
    Task<Result<>> move_metadata();
    Task<Result<>> move_pointers();
    Task<Result<>> return_holes();
    void publish();
    Task<Result<>> step(uint64_t clusters);
    uint64_t cluster_bits() const { return op_.geometry().cluster_bits; }
    uint64_t bytes(uint64_t clusters) const { return clusters << cluster_bits(); }

    // compact_collect.cc
    /// Calls for each tree: its L1 words and where they lie.
    Task<Result<>> collect(What what, uint64_t begin, uint64_t end);
    Task<Result<>> collect_tree(What what, uint64_t l1_offset, const std::vector<uint64_t>& l1, uint64_t begin,
                                uint64_t end);
    void collect_table(What what, const TableWords& table, uint64_t offset, uint64_t paths, uint64_t guest,
                       uint64_t begin, uint64_t end);

    // compact_clusters.cc
    Task<Result<>> move_clusters(What what);
    Task<Result<bool>> plan_move(What what, size_t first, size_t refs);
    Task<Result<>> carry_out(What what);
    Task<Result<>> copy_cluster(What what, const Move& move);
    Task<Result<>> change_tables(const std::vector<std::pair<size_t, uint64_t>>& changes);
    Task<Result<>> change_l1(const std::vector<std::pair<size_t, uint64_t>>& changes);
    /// The next free cluster below the target; 0: there is none.
    Task<Result<uint64_t>> next_hole();

    // compact_blobs.cc
    Task<Result<>> move_blobs();
    Task<Result<bool>> place_blob(BlobMove& move);
    Task<Result<>> carry_out_blobs();

    Operation& op_;
    Progress progress_;
    std::vector<uint64_t> active_l1_;  // as the file has it
    std::vector<uint64_t> unsure_l1_;  // but for these entries: writing them may have failed
    std::vector<bool> used_;           // by cluster
    uint64_t target_ = 0;              // clusters in use, so where the file would end without holes
    uint64_t hole_ = 1;                // where next_hole() goes on
    uint64_t done_ = 0, total_ = 0;
    std::vector<Ref> refs_;
    std::vector<Move> moves_;
    std::unordered_set<uint64_t> seen_tables_;
    Buffer cluster_;
    // Blobs: the run of holes that is being filled.
    std::vector<BlobMove> blobs_;
    uint64_t run_begin_ = 0, run_at_ = 0, run_end_ = 0;  // host offsets
    uint64_t source_end_ = 0;                            // of the blob before
};

}  // namespace gantry::block::qcow2
