// ZeroData: a list of iovecs full of zeroes.

#pragma once

#include <array>
#include <cstdint>

#include "runtime/iovec.h"

namespace gantry::block {

/// Up to kLimit bytes of zeroes, without memory of their own. What it points to is never written. Aligned for direct
/// I/O.
class ZeroData {
  public:
    static constexpr uint64_t kBlock = 64 << 10;
    static constexpr uint64_t kLimit = 16 * kBlock;

    ZeroData();
    /// `length` <= kLimit.
    IoVecSlice slice(uint64_t length) const { return IoVecSlice(IoVec(list_.data(), list_.size(), kLimit), 0, length); }
    static const uint8_t* block();

  private:
    std::array<iovec, kLimit / kBlock> list_;
};

}  // namespace gantry::block
