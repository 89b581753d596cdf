// ClusterAllocator: places for guest data, from runs whose refcounts are raised ahead.

#pragma once

#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/refcounts.h"

namespace gantry::block::qcow2 {

/// Clusters in a row.
struct HostRun {
    uint64_t offset = 0;  // bytes
    uint64_t clusters = 0;
    /// Never held anything since it became part of the file: reads as zeroes.
    bool fresh = false;
};

/// A reservation is a run of free clusters whose counts are 1 in memory although nothing refers to them yet. Taking
/// from it is a few instructions under a leaf lock; refilling it is done under Metadata::mutex(). What a crash leaves
/// reserved leaks and is found again at open. settle() returns the rest.
///
/// Holes of the file are filled before it grows, those too small for a useful run only when they are an eighth of it.
///
/// Lock order: Metadata::mutex(), then mutex_ (leaf).
class ClusterAllocator {
  public:
    ClusterAllocator(Refcounts& refcounts, ImageFile& file, uint32_t cluster_bits);

    /// At most `clusters` in a row from the reservation, at `near` (a host offset) when a reserved run begins there and
    /// `near` is not 0. Empty (clusters == 0): call refill(). Any loop, no I/O.
    HostRun take(uint64_t clusters, uint64_t near);
    /// Never linked: back to the reservation, where it adjoins if it does. Not fresh any more when `written`. Any loop.
    void give_back(HostRun run, bool written);

    // ---- Under Metadata::mutex() ----

    /// Reserves at least `clusters` more (as a rule many times more: 1 MiB or 16 clusters at first, twice as much each
    /// time, at most 64 MiB or 1/16 of the file). kNoSpace, kTooLarge, kIo, kCorrupt.
    Task<Result<>> refill(uint64_t clusters);
    /// Exactly `clusters` in a row for metadata, counted 1, not from the reservation; not fresh unless the result says.
    Task<Result<HostRun>> allocate_row(uint64_t clusters);
    /// Counts of [offset, +bytes) drop by one; clusters that fall to 0 may be handed out again at once. Returns those
    /// that fell to 0 (merged), for discards. The caller has waited for quarantine and stability.
    Task<Result<std::vector<HostRun>>> free(uint64_t offset, uint64_t bytes);
    /// Returns the reservation; counts are exact afterwards (in memory).
    Task<Result<>> settle();

    // ---- Compressed clusters: a byte cursor ----

    /// Room for `bytes` (one cluster at most) of a blob, packed behind the one before where possible; counts of every
    /// cluster touched are raised. Under Metadata::mutex().
    Task<Result<uint64_t>> allocate_bytes(uint64_t bytes);

    /// Clusters at or above it were never used. Bytes.
    uint64_t fresh_from() const;
    /// Clusters reserved and not taken.
    uint64_t reserved() const;

  private:
    uint64_t cluster_size() const { return uint64_t{1} << cluster_bits_; }
    uint64_t to_clusters(uint64_t bytes) const { return (bytes + cluster_size() - 1) >> cluster_bits_; }
    /// In clusters; what lies behind was never used.
    uint64_t fresh_line() const;
    Task<Result<ClusterRun>> choose(uint64_t clusters, uint64_t want);
    Task<Result<>> reserve(uint64_t clusters);
    /// Counts `run` 1; parts on both sides of the fresh line apart.
    Task<Result<std::vector<HostRun>>> claim(ClusterRun run, std::string_view what);
    void put(HostRun run);
    bool take_at(uint64_t offset);
    Task<Result<bool>> append(uint64_t bytes);
    void move_cursor(uint64_t end);
    Error no_space(uint64_t clusters) const;

    Refcounts& refcounts_;
    ImageFile& file_;
    const uint32_t cluster_bits_;
    mutable std::mutex mutex_;
    std::vector<HostRun> reserved_;  // few; the last one is the current run
    uint64_t fresh_from_ = 0;        // clusters; the end of what was handed out. Under mutex_
    uint64_t next_refill_ = 0;       // clusters; 0: as at first
    uint64_t byte_cursor_ = 0;       // 0: none; in the cluster that refcounts_ watches; under Metadata::mutex()
};

}  // namespace gantry::block::qcow2
