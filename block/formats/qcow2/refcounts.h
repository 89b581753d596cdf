// Refcounts: how often each cluster of the image file is referenced (spec/qcow2.md section 6).

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/image_file.h"
#include "runtime/buffer.h"

namespace gantry::block::qcow2 {

class OverlapMap;

/// Reads and writes one count in a refcount block. Pure.
uint64_t refcount_in_block(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t index);
void set_refcount_in_block(std::span<uint8_t> block, uint32_t refcount_order, uint64_t index, uint64_t count);

/// Clusters in a row, by number.
struct ClusterRun {
    uint64_t first = 0;
    uint64_t count = 0;
    uint64_t end() const { return first + count; }
};

/// The refcount table in memory and a cache of its blocks, written back by write_back().
///
/// What this class keeps: a count in memory is at least the number of references that any stable L1 or L2 entry, table
/// or header makes (callers raise counts before they make references and lower them only when the loss of the reference
/// is stable). So blocks may be written at any time, in any order; the one rule for the others is that write_back() and
/// a flush come before a new reference is written.
///
/// Structures of its own (new blocks, a larger table) are made in memory and reach the file in write_back(), in the
/// order contents, flush, reference: whatever write is the last one, each cluster that the table or the header names is
/// counted.
///
/// Damage in the table (entries off the clusters, beyond the file, named twice) refuses those who need the block, not
/// the open: kCorrupt.
///
/// Every coroutine here runs under Metadata::mutex(). Any loop.
class Refcounts {
  public:
    /// `header` is the image's, changed here when the table moves (fields at 48..59). `cache_bytes`: clean blocks
    /// beyond it are dropped; dirty ones are written first. `overlap` may be null; it learns where table and blocks
    /// lie.
    Refcounts(ImageFile& file, Header& header, uint64_t cache_bytes, OverlapMap* overlap);
    /// Under Metadata::mutex(), or drained. A smaller cache gives its blocks up as others are loaded.
    void set_cache_bytes(uint64_t bytes);
    /// Drops what nobody used since the call before and is on the disk. Under Metadata::mutex().
    void clean();

    /// Reads the table. kIo.
    Task<Result<>> load();

    /// 2^63 - 1 at most.
    uint64_t max_count() const;
    uint64_t clusters_per_block() const;
    /// Of cluster number `cluster` (host offset / cluster size); absent blocks and what lies beyond the table: 0.
    Task<Result<uint64_t>> get(uint64_t cluster);
    /// Adds `delta` to `count` counts from `first` on, all or none. kCorrupt: a count would be negative; kInvalid: one
    /// would not fit its width. Makes blocks and grows the table where counts are raised beyond it (kTooLarge at its
    /// limit; kNoSpace on a device without room for them).
    Task<Result<>> change(uint64_t first, uint64_t count, int64_t delta);
    /// The same, for any byte range of the file: every cluster it touches.
    Task<Result<>> change_bytes(uint64_t offset, uint64_t bytes, int64_t delta);

    /// First run of `count` clusters with count 0: holes of the file first when `grow_from` is the file's end in
    /// clusters, only what lies behind the file when it is 0. Never cluster 0. Nothing is counted yet. kTooLarge:
    /// beyond 2^55 bytes; kNoSpace: beyond the end of a device.
    Task<Result<uint64_t>> find_free(uint64_t count, uint64_t grow_from);
    /// First run of at least `least` free clusters inside [from, before), as long as it is but not above `most`; count
    /// 0: there is none. Clusters of `avoid` do not count as free.
    Task<Result<ClusterRun>> find_run(uint64_t from, uint64_t before, uint64_t least, uint64_t most, ClusterRun avoid);
    /// Free clusters below `end`, as far as known without reading blocks again: exact after find_run() over all of it
    /// has failed.
    Task<Result<uint64_t>> count_free(uint64_t end);
    /// The free ones of `count` clusters from `first` on.
    Task<Result<std::vector<ClusterRun>>> free_within(uint64_t first, uint64_t count);
    /// kCorrupt when clusters with count 0 hold metadata after all. `what` is to be put there.
    Result<> check_unused(ClusterRun run, std::string_view what) const;
    /// Everything below the hint is in use.
    uint64_t hint() const { return hint_; }
    void set_hint(uint64_t cluster) { hint_ = std::min(hint_, cluster); }
    /// Where allocation ends, in clusters: 2^55 bytes, or the end of a file that does not grow.
    uint64_t end_limit() const;

    /// One cluster whose fall to count 0 is noticed: watched() is kNothing then.
    static constexpr uint64_t kNothing = ~uint64_t{0};
    void watch(uint64_t cluster) { watched_ = cluster; }
    uint64_t watched() const { return watched_; }

    bool dirty() const { return dirty_.load(std::memory_order_relaxed); }
    /// Writes changed blocks, links new ones, switches to a larger table. The last writes are not flushed. After a
    /// failure it is dirty as before, and may be tried again.
    Task<Result<>> write_back();
    /// The last cluster with a count above 0, plus one.
    Task<Result<uint64_t>> end_of_use();
    /// Forgets everything cached; the table is read again. For those who rewrote the structures (repair, amend,
    /// compact). Nothing is dirty.
    Task<Result<>> reload();

    /// Table entries, host offsets of blocks (0: absent). Under the mutex.
    const std::vector<uint64_t>& table() const { return table_; }

  private:
    struct Block {
        Buffer bytes;
        uint64_t dirty_begin = 0, dirty_end = 0;  // bytes; equal: clean
        uint64_t last_use = 0;
        bool dirty() const { return dirty_begin != dirty_end; }
    };
    /// Upper bounds of what is free in one block; kUnknown: not looked at since counts fell.
    struct Room {
        static constexpr uint32_t kUnknown = ~uint32_t{0};
        uint32_t total = kUnknown, longest = kUnknown;
    };
    /// A larger table that the header does not name yet.
    struct Move {
        uint64_t offset = 0;
        uint64_t clusters = 0;
        bool tried = false;  // the header may name it
    };
    struct RunSearch;
    struct Pinned;

    uint64_t cluster_size() const { return header_.cluster_size(); }
    uint64_t index_of(uint64_t cluster) const { return cluster / clusters_per_block(); }
    bool absent(uint64_t index) const { return index >= table_.size() || table_[index] == 0; }

    // refcounts.cc
    Task<Result<Block*>> block(uint64_t index);
    Error bad_block(uint64_t index) const;
    Task<Result<>> make_room(uint64_t more);
    Result<> check_range(uint64_t first, uint64_t count, int64_t delta) const;
    Task<Result<>> change_window(ClusterRun part, int64_t delta, ClusterRun whole);
    /// `from`, `to`: counts of the block.
    void touched(Block& block, uint64_t from, uint64_t to);
    void forget();

    // refcount_write_back.cc
    Task<Result<>> write_blocks();
    Task<Result<>> link_blocks();
    Task<Result<>> switch_table();
    Task<Result<>> move_again();
    Task<void> free_old_tables();
    Result<> check_place(uint64_t offset, uint64_t bytes, bool table) const;

    // refcount_growth.cc
    /// Blocks for [first_index, last_index] exist afterwards; none of them lies in `avoid`.
    Task<Result<>> make_blocks(uint64_t first_index, uint64_t last_index, ClusterRun avoid);
    Task<Result<>> place_block(uint64_t index, ClusterRun avoid);
    void create(uint64_t index, uint64_t cluster, uint32_t round);
    void install(uint64_t index, uint64_t cluster);
    Result<> grow_table(uint64_t entries, ClusterRun avoid);

    // refcount_search.cc
    bool skip_block(const RunSearch& search, uint64_t index) const;
    Task<Result<>> scan_block(RunSearch& search, uint64_t index, uint64_t begin, uint64_t end);
    Room room_of(uint64_t index) const;

    ImageFile& file_;
    Header& header_;
    uint64_t cache_blocks_;
    OverlapMap* overlap_;
    Move table_place_;  // as loaded or switched to
    std::vector<uint64_t> table_;
    std::vector<bool> bad_;                  // by table index: the entry was damaged when it was loaded
    std::vector<Room> room_;                 // by table index
    std::map<uint64_t, Block> blocks_;       // by table index
    std::map<uint64_t, uint32_t> unlinked_;  // new blocks by table index: the round in which their entry is written
    std::optional<Move> move_;
    std::vector<Move> old_tables_;                 // lose their count once the header has left them
    uint64_t pinned_first_ = 1, pinned_last_ = 0;  // table indices whose blocks stay
    uint64_t uses_ = 0;
    uint64_t cleaned_at_ = 0;  // uses_ at the last clean()
    uint64_t hint_ = 0;
    uint64_t watched_ = kNothing;
    std::atomic<bool> dirty_{false};
};

}  // namespace gantry::block::qcow2
