// Refcounts: how often each cluster of the image file is referenced (spec/qcow2.md section 6).

#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/image_file.h"
#include "runtime/buffer.h"

namespace gantry::block::qcow2 {

class OverlapMap;

/// Reads and writes one count in a refcount block. Pure.
uint64_t refcount_in_block(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t index);
void set_refcount_in_block(std::span<uint8_t> block, uint32_t refcount_order, uint64_t index, uint64_t count);

/// The refcount table in memory and a cache of its blocks, written back by write_back().
///
/// What this class keeps: a count in memory is at least the number of references that any stable L1 or L2 entry, table
/// or header makes (callers raise counts before they make references and lower them only when the loss of the reference
/// is stable). So blocks may be written at any time, in any order; the one rule for the others is that write_back() and
/// a flush come before a new reference is written.
///
/// Every coroutine here runs under Metadata::mutex(). Any loop.
class Refcounts {
  public:
    /// `header` is the image's, changed here when the table moves (fields at 48..59). `cache_bytes`: clean blocks
    /// beyond it are dropped; dirty ones are written first. `overlap` may be null.
    Refcounts(ImageFile& file, Header& header, uint64_t cache_bytes, OverlapMap* overlap);

    /// Reads the table. kCorrupt (an entry that is not on a cluster), kIo.
    Task<Result<>> load();

    /// 2^63 - 1 at most.
    uint64_t max_count() const;
    uint64_t clusters_per_block() const;
    /// Of cluster number `cluster` (host offset / cluster size); absent blocks and what lies beyond the table: 0.
    Task<Result<uint64_t>> get(uint64_t cluster);
    /// Adds `delta` to `count` counts from `first` on, all or none. kCorrupt: a count would be negative; kInvalid: one
    /// would not fit its width. Makes blocks and grows the table where counts are raised beyond it.
    Task<Result<>> change(uint64_t first, uint64_t count, int64_t delta);
    /// The same, for any byte range of the file: every cluster it touches.
    Task<Result<>> change_bytes(uint64_t offset, uint64_t bytes, int64_t delta);

    /// First run of `count` clusters with count 0 at or after the hint, wrapping once to the beginning when it would
    /// otherwise lie beyond `grow_from` (pass the file's end in clusters to prefer holes, 0 to append). Nothing is
    /// counted yet. kTooLarge: beyond 2^55 bytes.
    Task<Result<uint64_t>> find_free(uint64_t count, uint64_t grow_from);
    /// Everything below the hint is in use as far as known.
    uint64_t hint() const { return hint_; }
    void set_hint(uint64_t cluster) { hint_ = std::min(hint_, cluster); }

    bool dirty() const { return dirty_.load(std::memory_order_relaxed); }
    /// Writes changed blocks (not flushed). New blocks and table entries are in place already: change() has written
    /// block, flush, entry.
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
        bool dirty = false;
        uint64_t last_use = 0;
    };
    Task<Result<Block*>> block(uint64_t table_index);
    Task<Result<>> make_blocks(uint64_t first_index, uint64_t last_index);
    Task<Result<>> grow_table(uint64_t entries);
    Task<Result<>> make_room();

    ImageFile& file_;
    Header& header_;
    const uint64_t cache_blocks_;
    OverlapMap* overlap_;
    std::vector<uint64_t> table_;
    std::map<uint64_t, Block> blocks_;  // by table index
    uint64_t uses_ = 0;
    uint64_t hint_ = 0;
    std::atomic<bool> dirty_{false};
};

}  // namespace gantry::block::qcow2
