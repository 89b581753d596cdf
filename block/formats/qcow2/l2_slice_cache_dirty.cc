// The side of the slice cache that writes: pins, changes, and the way of changed slices to the file.

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/l2_slice_cache.h"
#include "runtime/check.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kChunk = size_t{1} << 20;

}  // namespace

// ---- Pins ----

L2SliceCache::Pin& L2SliceCache::Pin::operator=(Pin&& o) noexcept {
    if (this != &o) {
        release();
        cache_ = std::exchange(o.cache_, nullptr);
        slot_ = o.slot_;
    }
    return *this;
}

uint64_t L2SliceCache::Pin::slice() const {
    return cache_->sets_[slot_ / kWays].tags[slot_ % kWays].load(std::memory_order_relaxed) & kSliceMask;
}

void L2SliceCache::Pin::release() {
    if (cache_) std::exchange(cache_, nullptr)->unpin(slot_);
}

void L2SliceCache::Pin::store(uint32_t first_index, std::span<const uint64_t> words) {
    CHECK(first_index <= cache_->slice_bytes_ / 8 && words.size() <= cache_->slice_bytes_ / 8 - first_index,
          "a store lies inside its slice");
    const uint64_t index = slot_ / kWays;
    const auto way = static_cast<uint32_t>(slot_ % kWays);
    Set& set = cache_->sets_[index];
    const std::lock_guard lock(cache_->stripe(index).mutex);
    const uint64_t tag = set.tags[way].load(std::memory_order_relaxed);
    set.tags[way].store((tag & ~kValid) | kChanging, std::memory_order_relaxed);
    // A reader that sees one of the new words sees the tag changed, too.
    std::atomic_thread_fence(std::memory_order_release);
    std::atomic<uint64_t>* to = cache_->words_of(slot_) + first_index;
    for (size_t i = 0; i < words.size(); i++) to[i].store(words[i], std::memory_order_relaxed);
    const uint64_t version = ((tag & kVersionMask) + kVersionOne) & kVersionMask;
    set.tags[way].store(kValid | version | (tag & kSliceMask), std::memory_order_release);
    set.was_stored |= static_cast<uint8_t>(1u << way);
    cache_->mark_dirty(index, way);
}

void L2SliceCache::unpin(uint64_t slot) {
    const uint64_t index = slot / kWays;
    bool last = false;
    {
        const std::lock_guard lock(stripe(index).mutex);
        last = --sets_[index].pins[slot % kWays] == 0;
    }
    if (last) made_room();
}

// ---- Changed slices ----

/// Under the stripe's lock.
void L2SliceCache::mark_dirty(uint64_t index, uint32_t way) {
    Set& set = sets_[index];
    if ((set.dirty >> way) & 1) return;
    set.dirty |= static_cast<uint8_t>(1u << way);
    stripe(index).dirty.push_back(index * kWays + way);
    dirty_.fetch_add(1, std::memory_order_relaxed);
}

L2SliceCache::DirtySlices L2SliceCache::take_dirty() {
    DirtySlices taken;
    size_t room = 0;
    uint8_t* to = nullptr;
    for (Stripe& stripe : stripes_) {
        const std::lock_guard lock(stripe.mutex);
        for (const uint64_t slot : stripe.dirty) {
            Set& set = sets_[slot / kWays];
            const auto way = static_cast<uint32_t>(slot % kWays);
            CHECK(!((set.writing >> way) & 1), "changed slices are taken by one at a time");
            set.dirty &= static_cast<uint8_t>(~(1u << way));
            set.writing |= static_cast<uint8_t>(1u << way);
            if (room < slice_bytes_) {
                taken.memory.push_back(Buffer::alloc(std::max<size_t>(kChunk, slice_bytes_)));
                room = taken.memory.back().size();
                to = taken.memory.back().data();
            }
            const std::atomic<uint64_t>* words = words_of(slot);
            for (uint32_t i = 0; i < slice_bytes_ / 8; i++)
                store_be64(to + size_t{i} * 8, words[i].load(std::memory_order_relaxed));
            taken.slices.push_back({set.tags[way].load(std::memory_order_relaxed) & kSliceMask, to});
            to += slice_bytes_;
            room -= slice_bytes_;
        }
        dirty_.fetch_sub(stripe.dirty.size(), std::memory_order_relaxed);
        stripe.dirty.clear();
    }
    return taken;
}

void L2SliceCache::written(std::span<const Dirty> slices) {
    for (const Dirty& dirty : slices) {
        const uint64_t index = dirty.slice % set_count_;
        const std::lock_guard lock(stripe(index).mutex);
        const uint32_t way = way_of(sets_[index], dirty.slice);
        CHECK(way != kWays, "a slice that is being written stays here");
        sets_[index].writing &= static_cast<uint8_t>(~(1u << way));
    }
    made_room();
}

void L2SliceCache::write_failed(std::span<const Dirty> slices) {
    for (const Dirty& dirty : slices) {
        const uint64_t index = dirty.slice % set_count_;
        const std::lock_guard lock(stripe(index).mutex);
        const uint32_t way = way_of(sets_[index], dirty.slice);
        CHECK(way != kWays, "a slice that is being written stays here");
        sets_[index].writing &= static_cast<uint8_t>(~(1u << way));
        mark_dirty(index, way);
    }
}

// ---- Room ----

L2SliceCache::RoomWish::RoomWish(L2SliceCache& cache) : cache_(cache) {
    // Before the caller tries: who frees a place after that attempt sees the wish.
    cache_.room_wishes_.fetch_add(1);
    const std::lock_guard lock(cache_.room_mutex_);
    seen_ = cache_.room_made_;
}

L2SliceCache::RoomWish::~RoomWish() { cache_.room_wishes_.fetch_sub(1); }

bool L2SliceCache::RoomWish::Awaiter::await_suspend(std::coroutine_handle<> h) {
    L2SliceCache& cache = wish.cache_;
    const std::lock_guard lock(cache.room_mutex_);
    if (cache.room_made_ != wish.seen_) {
        wish.seen_ = cache.room_made_;
        return false;
    }
    wish.seen_++;  // made_room() wakes everybody who waits
    waiter.handle = h;
    waiter.loop = &Loop::current();
    cache.room_waiters_.push(waiter);
    return true;
}

void L2SliceCache::made_room() {
    if (room_wishes_.load() == 0) return;
    detail::WaiterQueue waiters;
    {
        const std::lock_guard lock(room_mutex_);
        room_made_++;
        std::swap(waiters, room_waiters_);
    }
    while (detail::Waiter* waiter = waiters.pop()) detail::wake(*waiter);
}

}  // namespace gantry::block::qcow2
