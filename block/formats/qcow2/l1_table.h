// L1Table: the active L1 table in memory.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace gantry::block::qcow2 {

/// Entries in host byte order. get() on any thread; set() and take_changes() under Metadata::mutex(); assign() drained.
class L1Table {
  public:
    /// `words`: as loaded; entries up to `entries` that the file does not have are zero (and take no memory before they
    /// are set). Nothing is changed.
    void assign(std::span<const uint64_t> words, uint64_t entries);
    uint64_t size() const { return size_; }
    /// Beyond size(): 0.
    uint64_t get(uint64_t index) const { return index < size_ ? words_[index].load(std::memory_order_acquire) : 0; }
    /// Remembered as changed: written by the next write-back.
    void set(uint64_t index, uint64_t word);
    bool changed() const { return !changed_.empty(); }
    /// {index, word} of what changed since the last call; each index once, ascending.
    std::vector<std::pair<uint64_t, uint64_t>> take_changes();
    /// After a failed write-back: changed again.
    void mark_changed(uint64_t index) { changed_.push_back(index); }

  private:
    struct Free {
        void operator()(std::atomic<uint64_t>* words) const;
    };
    uint64_t size_ = 0;
    std::unique_ptr<std::atomic<uint64_t>[], Free> words_;
    std::vector<uint64_t> changed_;
};

}  // namespace gantry::block::qcow2
