// L2SliceCache: slices of L2 tables in memory, read by any loop without a lock.

#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "runtime/buffer.h"
#include "runtime/error.h"

namespace gantry::block::qcow2 {

/// Slots in sets of eight, found by the number of the slice on the guest's disk (not by its place in the file), so that
/// a cache which covers the disk never evicts. A slice is `slice_bytes` of one L2 table, in host byte order.
///
/// A hit writes nothing that others read: a slot has a tag {valid, version, slice number}; a reader loads the tag, the
/// words it wants, and the tag again; an unchanged tag proves that the words belong together. Writers invalidate the
/// tag, change the words and publish a new version, under the lock of the set's stripe. Memory of dropped slices goes
/// back to the system; its address stays readable (zeroes), so a late reader is harmless.
///
/// Any thread. Lock order: a stripe's lock is innermost.
class L2SliceCache {
  public:
    /// Room for at least `slots` slices of `slice_bytes` (power of two, 512 up to 2 MiB) each; nothing is resident
    /// before it is used. kNoMemory when the address space is not to be had.
    static Result<std::unique_ptr<L2SliceCache>> create(uint32_t slice_bytes, uint64_t slots);
    ~L2SliceCache();
    L2SliceCache(const L2SliceCache&) = delete;
    L2SliceCache& operator=(const L2SliceCache&) = delete;

    /// The words of a slice. They count only when still_valid() says so after they were loaded.
    class View {
      public:
        uint64_t word(uint32_t index) const { return words_[index].load(std::memory_order_relaxed); }
        bool still_valid() const {
            std::atomic_thread_fence(std::memory_order_acquire);
            return tag_->load(std::memory_order_relaxed) == seen_;
        }

      private:
        friend class L2SliceCache;
        const std::atomic<uint64_t>* words_ = nullptr;
        const std::atomic<uint64_t>* tag_ = nullptr;
        uint64_t seen_ = 0;
    };

    /// nullopt: not here (or being replaced just now).
    std::optional<View> find(uint64_t slice) const {
        Set& set = sets_[slice % set_count_];
        for (uint32_t way = 0; way < kWays; way++) {
            const uint64_t tag = set.tags[way].load(std::memory_order_acquire);
            if ((tag & (kValid | kSliceMask)) != (kValid | slice)) continue;
            // Written once between two cleanings, so the line stays shared.
            if (!set.used[way].load(std::memory_order_relaxed)) set.used[way].store(1, std::memory_order_relaxed);
            View view;
            view.words_ = words_of(static_cast<uint64_t>(&set - sets_) * kWays + way);
            view.tag_ = &set.tags[way];
            view.seen_ = tag;
            return view;
        }
        return std::nullopt;
    }

    /// A slice that stays where it is until the pin is gone. Movable; the cache outlives it.
    class Pin {
      public:
        Pin() = default;
        Pin(Pin&& o) noexcept : cache_(std::exchange(o.cache_, nullptr)), slot_(o.slot_) {}
        Pin& operator=(Pin&& o) noexcept;
        ~Pin() { release(); }
        explicit operator bool() const { return cache_ != nullptr; }
        uint64_t slice() const;
        /// Stable only for words whose guest range the caller has claimed.
        uint64_t word(uint32_t index) const { return cache_->words_of(slot_)[index].load(std::memory_order_relaxed); }
        /// Changes adjacent words in one step that readers see whole or not at all; the slice is dirty afterwards.
        void store(uint32_t first_index, std::span<const uint64_t> words);
        void release();

      private:
        friend class L2SliceCache;
        Pin(L2SliceCache* cache, uint64_t slot) : cache_(cache), slot_(slot) {}
        L2SliceCache* cache_ = nullptr;
        uint64_t slot_ = 0;
    };
    /// Empty: not here.
    Pin pin(uint64_t slice);
    /// insert() and pin() in one step. When the slice is here already, `bytes` are ignored (they may be older). Empty:
    /// every place it could have is pinned or dirty.
    Pin insert_and_pin(uint64_t slice, const uint8_t* bytes);

    /// Slices changed since they were last taken; `bytes` as on disk. They stay resident and count as being written,
    /// so they are not evicted, until written() or write_failed() is told; changed meanwhile, they are dirty again.
    struct Dirty {
        uint64_t slice = 0;
        Buffer bytes;
    };
    std::vector<Dirty> take_dirty();
    void written(std::span<const Dirty> slices);
    void write_failed(std::span<const Dirty> slices);
    uint64_t dirty_count() const { return dirty_.load(std::memory_order_relaxed); }

    /// Keeps the slice if there is a place that is neither pinned nor dirty; `bytes` as on disk (big endian). Does
    /// nothing when the slice is here already (memory is newer), else evicts one that was not used lately.
    void insert(uint64_t slice, const uint8_t* bytes);
    /// Drops the slice; it is neither pinned nor dirty.
    void invalidate(uint64_t slice);
    /// Drops everything; nothing is pinned or dirty, no reader runs behind (drained).
    void drop_all();
    /// Drops what nobody used since the call before, and gives its memory back.
    void clean();

    uint32_t slice_bytes() const { return slice_bytes_; }
    uint64_t slots() const { return set_count_ * kWays; }
    /// Slices held now.
    uint64_t resident() const { return resident_.load(std::memory_order_relaxed); }

    static constexpr uint64_t kMaxSlice = (uint64_t{1} << 34) - 1;

  private:
    static constexpr uint32_t kWays = 8;
    static constexpr uint32_t kStripes = 64;
    static constexpr uint64_t kValid = uint64_t{1} << 63;
    static constexpr uint64_t kSliceMask = kMaxSlice;
    static constexpr uint64_t kVersionOne = uint64_t{1} << 34;

    struct alignas(64) Set {
        std::atomic<uint64_t> tags[kWays];
        alignas(64) std::atomic<uint8_t> used[kWays];  // apart from the tags: cleaning does not disturb readers of them
        uint32_t hand;                                 // of the second-chance eviction; under the stripe's lock
    };

    L2SliceCache() = default;
    std::atomic<uint64_t>* words_of(uint64_t slot) const {
        return reinterpret_cast<std::atomic<uint64_t>*>(arena_ + slot * slice_bytes_);
    }
    std::mutex& stripe(uint64_t set) { return stripes_[set % kStripes]; }
    uint32_t choose_way(Set& set, uint64_t slice);
    void drop(Set& set, uint32_t way);
    void release_memory(uint64_t set, uint32_t dropped);

    uint32_t slice_bytes_ = 0;
    uint64_t set_count_ = 0;
    Set* sets_ = nullptr;
    uint8_t* arena_ = nullptr;
    size_t sets_bytes_ = 0, arena_bytes_ = 0;
    std::atomic<uint64_t> resident_{0}, dirty_{0};
    std::array<std::mutex, kStripes> stripes_;
};

}  // namespace gantry::block::qcow2
