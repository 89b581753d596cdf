// CountMap: a number for each cluster of a file, small where most numbers are small.

#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <unordered_map>
#include <vector>

namespace gantry::block::qcow2 {

/// Memory follows the clusters that were ever counted, in chunks: two bytes each, more only for counts above 65534.
/// Sums saturate. One thread.
class CountMap {
  public:
    /// For clusters [0, clusters); all counts are 0.
    explicit CountMap(uint64_t clusters) : limit_(clusters), chunks_((clusters >> kChunkBits) + 1) {}

    uint64_t limit() const { return limit_; }
    /// One past the highest cluster that was ever counted.
    uint64_t end() const { return end_; }

    uint64_t get(uint64_t cluster) const {
        if (cluster >= limit_) return 0;
        const Chunk* chunk = chunks_[cluster >> kChunkBits].get();
        if (!chunk) return 0;
        const uint16_t small = (*chunk)[cluster & kChunkMask];
        return small == kLarge ? large_.at(cluster) : small;
    }
    /// `cluster` lies below limit().
    void set(uint64_t cluster, uint64_t count) {
        if (cluster >= end_) {
            if (count == 0) return;
            end_ = cluster + 1;
        }
        uint16_t& small = slot(cluster);
        if (small == kLarge) large_.erase(cluster);
        if (count >= kLarge) large_[cluster] = count;
        small = count >= kLarge ? kLarge : static_cast<uint16_t>(count);
    }
    void add(uint64_t cluster, uint64_t times) {
        uint16_t& small = slot(cluster);
        if (cluster >= end_) end_ = cluster + 1;
        if (small != kLarge && times < kLarge && small + times < kLarge) [[likely]] {
            small = static_cast<uint16_t>(small + times);
            return;
        }
        const uint64_t count = get(cluster);
        set(cluster, count > std::numeric_limits<uint64_t>::max() - times ? std::numeric_limits<uint64_t>::max()
                                                                          : count + times);
    }
    /// Whether a count of [first, first + count) is above 0.
    bool any(uint64_t first, uint64_t count) const {
        const uint64_t last = first + count < end_ ? first + count : end_;
        for (uint64_t cluster = first; cluster < last;) {
            if (!chunks_[cluster >> kChunkBits]) {
                cluster = (cluster | kChunkMask) + 1;
                continue;
            }
            if (get(cluster) != 0) return true;
            cluster++;
        }
        return false;
    }

  private:
    static constexpr uint32_t kChunkBits = 12;
    static constexpr uint64_t kChunkMask = (uint64_t{1} << kChunkBits) - 1;
    static constexpr uint16_t kLarge = 0xffff;
    using Chunk = std::array<uint16_t, kChunkMask + 1>;

    uint16_t& slot(uint64_t cluster) {
        std::unique_ptr<Chunk>& chunk = chunks_[cluster >> kChunkBits];
        if (!chunk) chunk = std::make_unique<Chunk>();
        return (*chunk)[cluster & kChunkMask];
    }

    const uint64_t limit_;
    uint64_t end_ = 0;
    std::vector<std::unique_ptr<Chunk>> chunks_;
    std::unordered_map<uint64_t, uint64_t> large_;
};

}  // namespace gantry::block::qcow2
