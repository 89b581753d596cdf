// Words: the entries of adjacent clusters, on their way into a slice.

#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "block/formats/qcow2/entries.h"

namespace gantry::block::qcow2 {

/// A bounded list; few of them need no memory of their own. Does not move.
class Words {
  public:
    explicit Words(uint64_t capacity) {
        if (capacity > few_.size()) many_.resize(capacity);
    }
    Words(const Words&) = delete;

    void push(const Entry& entry, bool extended) {
        uint64_t* words = many_.empty() ? few_.data() : many_.data();
        words[count_++] = entry.word;
        if (extended) words[count_++] = entry.bitmap;
    }
    std::span<const uint64_t> span() const { return {many_.empty() ? few_.data() : many_.data(), count_}; }

  private:
    std::array<uint64_t, 32> few_;
    std::vector<uint64_t> many_;
    size_t count_ = 0;
};

}  // namespace gantry::block::qcow2
