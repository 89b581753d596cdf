// DirtyBitmap: which parts of a node were written.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace gantry::block {

/// One bit per granule in atomic words, and a summary with one bit per 64 words. mark(), set_range() and clear_range()
/// from any loop, without locks: a bit marked after a clear_range() of it began is never lost. resize() and assign()
/// while drained. Everything else on the main loop, except next_dirty(), next_clean(), is_dirty() and dirty_bytes()
/// (any loop; exact only when nobody marks).
///
/// It records while it is enabled (what the user wants) and neither read-only (it belongs to an image that may not be
/// written) nor inconsistent.
class DirtyBitmap {
  public:
    /// `granularity` power of two, 512 ... 2^31; kInvalid "Granularity must be power of 2 and at least 512". kTooLarge
    /// when the bitmap would need more than 512 MiB; kNoMemory.
    static Result<std::shared_ptr<DirtyBitmap>> create(std::string name, uint64_t size, uint32_t granularity);
    static Result<> check_granularity(uint32_t granularity);
    /// One that an image lists and whose contents are lost: it has a name and can be removed, nothing else. Persistent;
    /// takes no memory (size() is 0 whatever the node has).
    static std::shared_ptr<DirtyBitmap> create_inconsistent(std::string name, uint32_t granularity);

    const std::string& name() const { return name_; }
    uint32_t granularity() const { return granularity_; }
    uint64_t size() const { return size_; }

    /// [offset, offset + length), clipped to size, becomes dirty (granules touched). No-op while not recording.
    void mark(uint64_t offset, uint64_t length);
    void set_range(uint64_t offset, uint64_t length);
    void clear_range(uint64_t offset, uint64_t length);
    void clear_all();
    bool is_dirty(uint64_t offset) const;
    /// First dirty / clean byte at or after `offset`: `offset` itself or the start of a granule; size() when none.
    uint64_t next_dirty(uint64_t offset) const;
    uint64_t next_clean(uint64_t offset) const;
    /// The end of the part that `offset` (inside size()) lies in and that is all dirty or all clean, looked for up to
    /// `limit` (>= offset) and a little beyond; at most size().
    uint64_t end_of_run(uint64_t offset, bool dirty, uint64_t limit) const;
    /// Dirty bytes (granules; the last one counts up to size).
    uint64_t dirty_bytes() const;
    /// ORs `other` (same size, any granularity) in.
    Result<> merge(const DirtyBitmap& other);
    /// The text of a merge() that would fail because the sizes differ.
    Result<> check_merge(const DirtyBitmap& other) const;
    /// A frozen copy (not recording).
    std::shared_ptr<DirtyBitmap> snapshot(std::string name) const;
    /// Exactly the bits of `other`, which has the same size and granularity.
    void assign(const DirtyBitmap& other);
    /// kBusy while it is busy: others look at it without being drained. Growth is dirty; of a persistent one it is
    /// clean, as other programs keep it (spec/qcow2.md section 16). An inconsistent one stays empty.
    Result<> resize(uint64_t new_size);

    bool recording() const { return recording_.load(std::memory_order_acquire); }
    /// What the user wants; kept while read-only and stored in the image.
    bool enabled() const { return enabled_; }
    void set_recording(bool on) {
        enabled_ = on;
        update_recording();
    }
    /// Its image may not be written: neither recording nor any change of its bits.
    bool read_only() const { return read_only_; }
    void set_read_only(bool on) {
        read_only_ = on;
        update_recording();
    }
    /// Its bits are wrong from now on: forgotten, and nothing is recorded any more.
    void set_inconsistent();
    bool busy = false, persistent = false;
    std::atomic<bool> inconsistent{false};  // changed by set_inconsistent() alone; any thread

    // ---- Bits as they are stored: bit b of word w is granule 64 * w + b; what lies beyond size() is zero ----

    uint64_t word_count() const { return word_count_; }
    uint64_t word(uint64_t index) const { return words_[index].load(); }
    /// ORs `bits` in; those beyond size() are dropped.
    void or_word(uint64_t index, uint64_t bits);
    /// The bits of a word that lie inside size().
    uint64_t valid_bits(uint64_t index) const;
    /// The first word at or after `index` that may be other than zero; word_count() when none.
    uint64_t next_used_word(uint64_t index) const;

  private:
    /// Atomic words, all zero at first. Memory that is never written costs nothing.
    class Words {
      public:
        /// False: no memory.
        bool allocate(uint64_t count);
        std::atomic_ref<uint64_t> operator[](uint64_t index) const { return std::atomic_ref(words_.get()[index]); }

      private:
        struct Free {
            void operator()(uint64_t* p) const;
        };
        std::unique_ptr<uint64_t, Free> words_;
    };
    /// Without words; allocate() must succeed before anything else.
    DirtyBitmap(std::string name, uint64_t size, uint32_t granularity);
    Result<> allocate();
    static Result<> check_size(const std::string& name, uint64_t size, uint32_t granularity);
    /// Calls fn(word index, mask) for the words that hold the granules touched by [offset, offset + length).
    template <class Fn>
    void for_each_word(uint64_t offset, uint64_t length, Fn fn) const;
    void set_word(uint64_t index, uint64_t mask);
    /// Drops the summary bit of a group without dirty words.
    void tidy_group(uint64_t group);
    uint64_t granules() const { return (size_ >> shift_) + ((size_ & (granularity_ - 1)) != 0); }
    /// First granule at or after `granule` whose bit is `dirty`; granules() when none.
    uint64_t find(uint64_t granule, bool dirty, uint64_t last_word) const;
    void update_recording() { recording_.store(enabled_ && !read_only_ && !inconsistent, std::memory_order_release); }

    std::string name_;
    uint64_t size_;
    uint32_t granularity_;
    unsigned shift_;
    std::atomic<bool> recording_{true};
    bool enabled_ = true, read_only_ = false;
    uint64_t word_count_ = 0;
    Words words_;
    Words summary_;
};

}  // namespace gantry::block
