#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "bench/loadgen/options.h"

namespace gantry::bench {

/// The blocks that one session works on, and what --verify remembers about each of them.
/// Without --verify several sessions may share blocks and nothing is remembered.
class BlockRange {
  public:
    BlockRange(uint64_t first_block, uint64_t count, uint32_t block_bytes, bool remember)
        : first_(first_block), count_(count), block_bytes_(block_bytes), states_(remember ? count : 0) {}

    uint64_t count() const { return count_; }
    uint32_t block_bytes() const { return block_bytes_; }
    uint64_t offset_of(uint64_t index) const { return (first_ + index) * block_bytes_; }

    bool remembers() const { return !states_.empty(); }
    bool busy(uint64_t index) const { return remembers() && states_[index].busy; }
    void set_busy(uint64_t index, bool busy) {
        if (remembers()) states_[index].busy = busy;
    }
    /// How often this run has written the block; 0 is the content that --fill leaves.
    uint32_t version(uint64_t index) const { return remembers() ? states_[index].version : 0; }
    void set_version(uint64_t index, uint32_t version) {
        if (remembers()) states_[index].version = version & 0x7fffffff;
    }

  private:
    struct State {
        uint32_t version : 31 = 0;
        uint32_t busy : 1 = 0;
    };

    uint64_t first_;
    uint64_t count_;
    uint32_t block_bytes_;
    std::vector<State> states_;
};

/// One request to be made.
struct Work {
    uint64_t block;
    bool write;
};

/// Decides which block is next. Sequential modes go round and round, or once (--fill, the final check).
class Workload {
  public:
    Workload(Mode mode, uint32_t read_percent, bool once, uint64_t seed)
        : mode_(mode), read_percent_(read_percent), once_(once), random_(seed * 0x9e3779b97f4a7c15 + 1) {}

    /// The next request; nothing when all is done or when every block of a tiny range is in use.
    std::optional<Work> next(const BlockRange& range) {
        const bool sequential = mode_ == Mode::kRead || mode_ == Mode::kWrite;
        const auto block = sequential ? next_in_order(range) : next_at_random(range);
        if (!block) return std::nullopt;
        return Work{*block, writes()};
    }

    bool exhausted(const BlockRange& range) const { return once_ && position_ == range.count(); }
    bool once() const { return once_; }

  private:
    uint64_t random() {  // splitmix64
        uint64_t x = random_ += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }

    uint64_t random_below(uint64_t bound) {
        __extension__ using Wide = unsigned __int128;
        return static_cast<uint64_t>((Wide{random()} * bound) >> 64);
    }

    std::optional<uint64_t> next_in_order(const BlockRange& range) {
        if (exhausted(range)) return std::nullopt;
        if (position_ == range.count()) position_ = 0;
        if (range.busy(position_)) return std::nullopt;
        return position_++;
    }

    std::optional<uint64_t> next_at_random(const BlockRange& range) {
        const uint64_t start = random_below(range.count());
        if (!range.busy(start)) return start;
        for (uint64_t step = 1; step < range.count(); step++) {
            const uint64_t block = (start + step) % range.count();
            if (!range.busy(block)) return block;
        }
        return std::nullopt;
    }

    bool writes() {
        switch (mode_) {
            case Mode::kRandWrite:
            case Mode::kWrite:
                return true;
            case Mode::kRandRw:
                return random_below(100) >= read_percent_;
            default:
                return false;
        }
    }

    Mode mode_;
    uint32_t read_percent_;
    bool once_;
    uint64_t random_;
    uint64_t position_ = 0;
};

}  // namespace gantry::bench
