// ExtentList: the descriptors of a block status chunk, in wire order, growing in a Buffer.

#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/buffer.h"

namespace gantry::nbd {

class ExtentList {
  public:
    /// At most `max` descriptors.
    explicit ExtentList(uint32_t max) : max_(max) {}
    /// Appends or merges with the last; splits at kMaxExtentLength. False: the list is full, what did not fit is left
    /// out.
    bool add(uint64_t length, uint32_t flags);
    uint32_t count() const { return count_; }
    size_t bytes() const { return size_t{count_} * 8; }
    Buffer take() { return std::move(memory_); }

  private:
    void put(uint32_t index, uint32_t length, uint32_t flags);

    uint32_t max_;
    uint32_t count_ = 0;
    uint32_t last_length_ = 0, last_flags_ = 0;
    Buffer memory_;
};

}  // namespace gantry::nbd
