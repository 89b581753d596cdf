// DirtyBitmap: which parts of a node were written.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace gantry::block {

/// Atomic words plus a summary level (one bit per 64 words). mark() from any loop, without locks; the rest on the main loop,
/// except next_dirty()/next_clean() (any loop, a snapshot only when nobody marks).
class DirtyBitmap {
 public:
    /// `granularity` power of two, 512 ... 2^31; kInvalid "Granularity must be power of 2 and at least 512". kTooLarge when the
    /// bitmap would need more than 512 MiB.
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
    /// First dirty / clean granule start at or after `offset`; size() when none.
    uint64_t next_dirty(uint64_t offset) const;
    uint64_t next_clean(uint64_t offset) const;
    /// Dirty bytes (granules; the last one counts up to size).
    uint64_t dirty_bytes() const;
    /// ORs `other` (same size, any granularity) in.
    Result<> merge(const DirtyBitmap& other);
    /// A frozen copy.
    std::shared_ptr<DirtyBitmap> snapshot(std::string name) const;
    /// Growth is dirty.
    Result<> resize(uint64_t new_size);

    bool recording() const { return recording_.load(std::memory_order_acquire); }
    void set_recording(bool on) { recording_.store(on, std::memory_order_release); }
    bool busy = false, persistent = false, inconsistent = false;

 private:
    DirtyBitmap(std::string name, uint64_t size, uint32_t granularity);
    std::string name_;
    uint64_t size_;
    uint32_t granularity_;
    unsigned shift_;
    std::atomic<bool> recording_{true};
    std::unique_ptr<std::atomic<uint64_t>[]> words_, summary_;
    uint64_t word_count_ = 0;
};

}  // namespace gantry::block
