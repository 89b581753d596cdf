#include "nbd/client/coverage.h"

#include <algorithm>
#include <iterator>

namespace gantry::nbd::client {

Coverage::Added Coverage::add(uint64_t begin, uint64_t end) {
    if (begin < first_end_ && end > first_begin_) return Added::kOverlap;
    if (begin != first_end_) return add_to_rest(begin, end);
    if (!rest_.empty() && rest_.front().begin < end) return Added::kOverlap;
    first_end_ = end;
    if (!rest_.empty() && rest_.front().begin == end) {
        first_end_ = rest_.front().end;
        rest_.erase(rest_.begin());
    }
    return Added::kOk;
}

Coverage::Added Coverage::add_to_rest(uint64_t begin, uint64_t end) {
    const auto next = std::ranges::lower_bound(rest_, begin, {}, &Piece::begin);
    if (next != rest_.end() && next->begin < end) return Added::kOverlap;
    const bool has_before = next != rest_.begin();
    if (has_before && std::prev(next)->end > begin) return Added::kOverlap;
    const bool joins_before = has_before && std::prev(next)->end == begin;
    const bool joins_after = next != rest_.end() && next->begin == end;
    if (joins_before && joins_after) {
        std::prev(next)->end = next->end;
        rest_.erase(next);
    } else if (joins_before) {
        std::prev(next)->end = end;
    } else if (joins_after) {
        next->begin = begin;
    } else {
        if (rest_.size() == kMaxPieces) return Added::kShredded;
        rest_.insert(next, {begin, end});
    }
    return Added::kOk;
}

}  // namespace gantry::nbd::client
