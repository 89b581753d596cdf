// ExtentList: the descriptors of a block status chunk, in wire order, growing in a Buffer.

#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/buffer.h"

namespace gantry::nbd {

class ExtentList {
  public:
    static constexpr size_t kMaxDescriptor = 16;

    /// At most `max` descriptors; `wide` ones have 64-bit fields (BLOCK_STATUS_EXT).
    ExtentList(uint32_t max, bool wide) : max_(max), wide_(wide) {}
    /// Appends or merges with the last; 32-bit descriptors are split at kMaxExtentLength. False: the list is full, what
    /// did not fit is left out.
    bool add(uint64_t length, uint32_t flags);
    uint32_t count() const { return count_; }
    size_t bytes() const { return count_ * descriptor(); }
    Buffer take() { return std::move(memory_); }

  private:
    size_t descriptor() const { return wide_ ? 16 : 8; }
    void put(uint32_t index, uint64_t length, uint32_t flags);

    uint32_t max_;
    bool wide_;
    uint32_t count_ = 0;
    uint32_t last_flags_ = 0;
    uint64_t last_length_ = 0;
    Buffer memory_;
};

}  // namespace gantry::nbd
