// Coverage: which bytes of a READ the server has answered.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gantry::nbd::client {

/// Disjoint ranges, kept merged. Chunks may come in any order; in their usual order this is one range without memory of
/// its own. What a server can make it hold is bounded.
class Coverage {
  public:
    /// A server that answers in more separate pieces than this, out of order, is refused.
    static constexpr size_t kMaxPieces = 8192;

    enum class Added : uint8_t { kOk, kOverlap, kShredded };
    /// [begin, end), not empty.
    Added add(uint64_t begin, uint64_t end);
    /// Exactly [0, length) has been added.
    bool complete(uint64_t length) const { return first_begin_ == 0 && first_end_ == length && rest_.empty(); }
    bool touched() const { return first_end_ != 0 || !rest_.empty(); }
    void clear() {
        first_begin_ = first_end_ = 0;
        rest_.clear();
    }

  private:
    struct Piece {
        uint64_t begin, end;
    };
    Added add_to_rest(uint64_t begin, uint64_t end);
    uint64_t first_begin_ = 0, first_end_ = 0;  // grows at its end as long as chunks come in order
    std::vector<Piece> rest_;                   // sorted, disjoint, not touching each other
};

}  // namespace gantry::nbd::client
