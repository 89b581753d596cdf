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
#include "runtime/sync.h"

namespace gantry::block::qcow2 {

/// Slots in sets of eight, found by the number of the slice on the guest's disk (not by its place in the file), so that
/// a cache which covers the disk never evicts. A slice is `slice_bytes` of one L2 table, in host byte order.
///
/// A hit writes nothing that others read: a slot has a tag {valid, changing, version, slice number}; a reader loads the
/// tag, the words it wants, and the tag again; an unchanged tag proves that the words belong together. Writers
/// invalidate the tag, change the words and publish a new version, under the lock of the set's stripe. Memory of
/// dropped slices goes back to the system; its address stays readable (zeroes), so a late reader is harmless.
///
/// Who brings a slice in from the file takes a ticket first, then looks up its table, then reads. Bytes are refused
/// when the slice may have been changed and dropped since the ticket was taken, so old bytes never come back.
///
/// Any thread. Lock order: a stripe's lock is innermost, then room_mutex_.
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

    /// nullopt: not here.
    std::optional<View> find(uint64_t slice) const {
        Set& set = sets_[slice % set_count_];
        for (uint32_t way = 0; way < kWays; way++) {
            uint64_t tag = set.tags[way].load(std::memory_order_acquire);
            if ((tag & kSliceMask) != slice || !(tag & (kValid | kChanging))) continue;
            // A few words are being stored: done at once, unless that thread was put to sleep.
            for (uint32_t patience = kPatience; (tag & kChanging) && patience != 0; patience--)
                tag = set.tags[way].load(std::memory_order_acquire);
            if ((tag & (kValid | kSliceMask)) != (kValid | slice)) return std::nullopt;
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

    /// The word will be looked at soon: a random one is seldom in the CPU's cache.
    void prefetch(uint64_t slice, uint32_t index) const {
        const Set& set = sets_[slice % set_count_];
        for (uint32_t way = 0; way < kWays; way++) {
            const uint64_t tag = set.tags[way].load(std::memory_order_relaxed);
            if ((tag & (kValid | kSliceMask)) != (kValid | slice)) continue;
            __builtin_prefetch(words_of(static_cast<uint64_t>(&set - sets_) * kWays + way) + index);
            return;
        }
    }

    /// Taken before the L1 entry of the slice is looked at and before its bytes are read from the file.
    struct Ticket {
        uint64_t generation = 0;
    };
    Ticket ticket(uint64_t slice) const {
        return {sets_[slice % set_count_].generation.load(std::memory_order_acquire)};
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
    /// insert() and pin() in one step. A slice that is here already is pinned, `bytes` (they may be older) are ignored.
    enum class Inserted : uint8_t {
        kPinned,
        kStale,  // `bytes` are not what the slice is now: take a ticket, read again
        kFull,   // every place it could have is pinned, dirty or being written: see wait_for_room()
    };
    Inserted insert_and_pin(uint64_t slice, const uint8_t* bytes, Ticket ticket, Pin& pin);

    /// Lets a caller sleep until a place may have become free: `RoomWish wish(cache); try; co_await wish.made();` and
    /// again. A place that becomes free after the wish was made or renewed is not missed.
    class RoomWish {
      public:
        explicit RoomWish(L2SliceCache& cache);
        ~RoomWish();
        RoomWish(const RoomWish&) = delete;
        struct Awaiter {
            RoomWish& wish;
            detail::Waiter waiter;
            bool await_ready() const noexcept { return false; }
            bool await_suspend(std::coroutine_handle<> h);
            void await_resume() const noexcept {}
        };
        Awaiter made() { return Awaiter{*this, {}}; }

      private:
        L2SliceCache& cache_;
        uint64_t seen_;
    };

    /// Slices changed since they were last taken; `bytes` as on disk, in `memory`. They stay resident and count as
    /// being written, so they are not evicted, until written() or write_failed() is told; changed meanwhile, they are
    /// dirty again. One taking at a time.
    struct Dirty {
        uint64_t slice = 0;
        const uint8_t* bytes = nullptr;
    };
    struct DirtySlices {
        std::vector<Dirty> slices;
        std::vector<Buffer> memory;
    };
    DirtySlices take_dirty();
    void written(std::span<const Dirty> slices);
    void write_failed(std::span<const Dirty> slices);
    uint64_t dirty_count() const { return dirty_.load(std::memory_order_relaxed); }

    /// Keeps the slice if there is a place that is neither pinned nor dirty (evicting one that was not used lately);
    /// `bytes` as on disk (big endian). Does nothing when the slice is here already: memory is never older. True:
    /// `bytes` are what the slice says now, whether kept or not. False: they may be older; look again with find(), then
    /// with a new ticket.
    bool insert(uint64_t slice, const uint8_t* bytes, Ticket ticket);
    /// For who knows that nobody changes slices (read-only images).
    void insert(uint64_t slice, const uint8_t* bytes) { insert(slice, bytes, ticket(slice)); }
    /// Drops the slice; it is neither pinned nor dirty.
    void invalidate(uint64_t slice);
    /// Drops everything; nothing is pinned or dirty, no reader runs behind (drained).
    void drop_all();
    /// Empty and as large as `fresh` afterwards. Drained; nothing is pinned or dirty, pins come after it.
    void reshape(std::unique_ptr<L2SliceCache> fresh);
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
    static constexpr uint32_t kPatience = 4096;
    static constexpr uint64_t kValid = uint64_t{1} << 63;
    static constexpr uint64_t kChanging = uint64_t{1} << 62;  // with kValid off: words are being stored, it stays here
    static constexpr uint64_t kSliceMask = kMaxSlice;
    static constexpr uint64_t kVersionOne = uint64_t{1} << 34;
    static constexpr uint64_t kVersionMask = kChanging - kVersionOne;

    struct alignas(64) Set {
        std::atomic<uint64_t> tags[kWays];
        alignas(64) std::atomic<uint8_t> used[kWays];  // apart from the tags: cleaning does not disturb readers of them
        // Changed rarely, by who drops slices that were changed here.
        std::atomic<uint64_t> generation;
        // Under the stripe's lock; a bit per way in the masks.
        alignas(64) uint32_t pins[kWays];
        uint32_t hand;       // of the second-chance eviction
        uint8_t dirty;       // changed since taken
        uint8_t writing;     // taken, not yet written() or write_failed()
        uint8_t was_stored;  // changed since it came in
    };
    struct alignas(64) Stripe {
        std::mutex mutex;
        std::vector<uint64_t> dirty;  // slots
    };

    L2SliceCache() = default;
    std::atomic<uint64_t>* words_of(uint64_t slot) const {
        return reinterpret_cast<std::atomic<uint64_t>*>(arena_ + slot * slice_bytes_);
    }
    Stripe& stripe(uint64_t set) { return stripes_[set % kStripes]; }
    static uint32_t way_of(const Set& set, uint64_t slice);
    static bool is_held(const Set& set, uint32_t way) {
        return set.pins[way] != 0 || (((set.dirty | set.writing) >> way) & 1);
    }
    static uint32_t choose_way(Set& set);
    void fill(uint64_t index, uint32_t way, uint64_t slice, const uint8_t* bytes);
    void drop(Set& set, uint32_t way);
    void mark_dirty(uint64_t index, uint32_t way);
    void release_memory(uint64_t set, uint32_t dropped);
    void unpin(uint64_t slot);
    void made_room();

    uint32_t slice_bytes_ = 0;
    uint64_t set_count_ = 0;
    Set* sets_ = nullptr;
    uint8_t* arena_ = nullptr;
    size_t sets_bytes_ = 0, arena_bytes_ = 0;
    std::atomic<uint64_t> resident_{0}, dirty_{0};
    std::array<Stripe, kStripes> stripes_;
    std::atomic<uint32_t> room_wishes_{0};
    std::mutex room_mutex_;
    uint64_t room_made_ = 0;
    detail::WaiterQueue room_waiters_;
};

}  // namespace gantry::block::qcow2
