// DirtyBitmap: which parts of a node were written.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace gantry::block {

/// One bit per granule in atomic words, and a summary with one bit per 64 words. mark(), set_range() and clear_range()
/// from any loop, without locks: a bit marked after a clear_range() of it began is never lost. resize() while drained.
/// Everything else on the main loop, except next_dirty(), next_clean(), is_dirty() and dirty_bytes() (any loop; exact
/// only when nobody marks).
class DirtyBitmap {
  public:
    /// `granularity` power of two, 512 ... 2^31; kInvalid "Granularity must be power of 2 and at least 512". kTooLarge
    /// when the bitmap would need more than 512 MiB.
    static Result<std::shared_ptr<DirtyBitmap>> create(std::string name, uint64_t size, uint32_t granularity);

    const std::string& name() const { return name_; }
    uint32_t granularity() const { return granularity_; }
    uint64_t size() const { return size_; }

    /// [offset, offset + length), clipped to size, becomes dirty (granules touched). No-op while not recording.
    void mark(uint64_t offset, uint64_t length);
    void set_range(uint64_t offset, uint64_t length);
    void clear_range(uint64_t offset, uint64_t length);
    void clear_all();
    bool is_dirty(uint64_t offset) const;
    /// First dirty / clean byte at or after `offset`: `offset` itself or the start of a granule; size() when none.
    uint64_t next_dirty(uint64_t offset) const;
    uint64_t next_clean(uint64_t offset) const;
    /// Dirty bytes (granules; the last one counts up to size).
    uint64_t dirty_bytes() const;
    /// ORs `other` (same size, any granularity) in.
    Result<> merge(const DirtyBitmap& other);
    /// A frozen copy (not recording).
    std::shared_ptr<DirtyBitmap> snapshot(std::string name) const;
    /// Growth is dirty.
    Result<> resize(uint64_t new_size);

    bool recording() const { return recording_.load(std::memory_order_acquire); }
    void set_recording(bool on) { recording_.store(on, std::memory_order_release); }
    bool busy = false, persistent = false, inconsistent = false;

  private:
    using Words = std::unique_ptr<std::atomic<uint64_t>[]>;
    DirtyBitmap(std::string name, uint64_t size, uint32_t granularity);
    static Result<> check_size(const std::string& name, uint64_t size, uint32_t granularity);
    /// Calls fn(word index, mask) for the words that hold the granules touched by [offset, offset + length).
    template <class Fn>
    void for_each_word(uint64_t offset, uint64_t length, Fn fn) const;
    void set_word(uint64_t index, uint64_t mask);
    /// Drops the summary bit of a group without dirty words.
    void tidy_group(uint64_t group);
    uint64_t granules() const { return (size_ >> shift_) + ((size_ & (granularity_ - 1)) != 0); }
    /// First granule at or after `granule` whose bit is `dirty`; granules() when none.
    uint64_t find(uint64_t granule, bool dirty) const;

    std::string name_;
    uint64_t size_;
    uint32_t granularity_;
    unsigned shift_;
    std::atomic<bool> recording_{true};
    uint64_t word_count_ = 0;
    Words words_;
    Words summary_;
};

}  // namespace gantry::block
