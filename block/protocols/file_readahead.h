// FileReadahead: readahead of our own, for files whose readahead by the kernel is off.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>

namespace gantry::block {

/// The kernel's readahead fills the page cache with large folios, and ext4 needs 12-40 us for a random 4 KiB write into
/// one (1.5 us into a small one). So a file that is open for writing has POSIX_FADV_RANDOM, and sequential readers are
/// served by readahead(2), which makes small folios. docs: block/protocols/README.md.
///
/// Any loop. due() is one load on the path of a request; the rest runs on misses only.
class FileReadahead {
  public:
    struct Window {
        uint64_t offset, length;
    };

    /// The read reaches into the newest window: time to begin the next one (by take()).
    bool due(uint64_t offset, uint64_t length) const {
        const uint64_t trigger = trigger_.load(std::memory_order_relaxed);
        return offset + length > trigger && offset < trigger + kMaxWindow;
    }
    /// A read that the page cache did not answer, or one that is due: what to read ahead, if the reads are sequential.
    std::optional<Window> take(uint64_t offset, uint64_t length, uint64_t file_size);
    /// Forgets the sequence.
    void reset();

  private:
    static constexpr uint64_t kFirstWindow = 256 << 10;
    static constexpr uint64_t kMaxWindow = 2 << 20;
    static constexpr uint64_t kIdle = UINT64_MAX - kMaxWindow;

    std::atomic<uint64_t> trigger_{kIdle};  // begin of the newest window
    std::mutex mutex_;                      // a leaf lock
    uint64_t end_ = 0;                      // end of the newest window
    uint64_t window_ = 0;                   // its length
    uint64_t expected_ = kIdle;             // where a sequential reader would miss next
};

}  // namespace gantry::block
