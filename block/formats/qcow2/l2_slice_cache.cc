#include "block/formats/qcow2/l2_slice_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include "block/formats/qcow2/be.h"
#include "runtime/check.h"

namespace gantry::block::qcow2 {

namespace {

void* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

}  // namespace

Result<std::unique_ptr<L2SliceCache>> L2SliceCache::create(uint32_t slice_bytes, uint64_t slots) {
    std::unique_ptr<L2SliceCache> cache(new L2SliceCache);
    cache->slice_bytes_ = slice_bytes;
    cache->set_count_ = slots / kWays + (slots % kWays != 0);
    if (cache->set_count_ == 0) cache->set_count_ = 1;
    const uint64_t set_bytes = uint64_t{kWays} * slice_bytes;
    if (cache->set_count_ > (uint64_t{1} << 46) / set_bytes) {
        return fail(ErrorKind::kTooLarge, "an L2 cache of {} slices of {} bytes is beyond any address space", slots,
                    slice_bytes);
    }
    cache->sets_bytes_ = cache->set_count_ * sizeof(Set);
    cache->arena_bytes_ = cache->set_count_ * set_bytes;
    // Fresh anonymous memory is all zeroes: every tag invalid, every flag clear.
    cache->sets_ = static_cast<Set*>(reserve(cache->sets_bytes_));
    cache->arena_ = static_cast<uint8_t*>(reserve(cache->arena_bytes_));
    if (!cache->sets_ || !cache->arena_) {
        return fail(ErrorKind::kNoMemory, "cannot reserve {} bytes for the L2 cache", cache->arena_bytes_);
    }
    return cache;
}

L2SliceCache::~L2SliceCache() {
    if (sets_) munmap(sets_, sets_bytes_);
    if (arena_) munmap(arena_, arena_bytes_);
}

void L2SliceCache::reshape(std::unique_ptr<L2SliceCache> fresh) {
    CHECK(dirty_count() == 0 && fresh->resident() == 0, "an L2 cache changes its shape when nothing is left to write");
    for (Stripe& s : stripes_) s.dirty.clear();
    std::swap(slice_bytes_, fresh->slice_bytes_);
    std::swap(set_count_, fresh->set_count_);
    std::swap(sets_, fresh->sets_);
    std::swap(arena_, fresh->arena_);
    std::swap(sets_bytes_, fresh->sets_bytes_);
    std::swap(arena_bytes_, fresh->arena_bytes_);
    resident_.store(0, std::memory_order_relaxed);
}

uint32_t L2SliceCache::way_of(const Set& set, uint64_t slice) {
    for (uint32_t way = 0; way < kWays; way++) {
        if ((set.tags[way].load(std::memory_order_relaxed) & (kValid | kSliceMask)) == (kValid | slice)) return way;
    }
    return kWays;
}

/// A free way, or the one that loses its place; kWays: all are held.
uint32_t L2SliceCache::choose_way(Set& set) {
    for (uint32_t way = 0; way < kWays; way++) {
        if (!(set.tags[way].load(std::memory_order_relaxed) & kValid)) return way;
    }
    for (uint32_t step = 0; step < 2 * kWays; step++) {
        const uint32_t way = set.hand;
        set.hand = (set.hand + 1) % kWays;
        if (is_held(set, way)) continue;
        if (!set.used[way].exchange(0, std::memory_order_relaxed)) return way;
    }
    return kWays;
}

void L2SliceCache::drop(Set& set, uint32_t way) {
    const uint64_t tag = set.tags[way].load(std::memory_order_relaxed);
    if (!(tag & kValid)) return;
    CHECK(!is_held(set, way), "a slice that is pinned or not yet written is dropped");
    // Whoever read the slice's bytes from the file before it was changed here must not bring them back.
    if ((set.was_stored >> way) & 1) set.generation.fetch_add(1, std::memory_order_release);
    set.was_stored &= static_cast<uint8_t>(~(1u << way));
    set.tags[way].store(tag & ~kValid, std::memory_order_relaxed);
    resident_.fetch_sub(1, std::memory_order_relaxed);
}

/// Under the stripe's lock; the way is not held.
void L2SliceCache::fill(uint64_t index, uint32_t way, uint64_t slice, const uint8_t* bytes) {
    Set& set = sets_[index];
    drop(set, way);
    // A reader that sees one of the new words sees the old tag gone, too (whoever took it away).
    std::atomic_thread_fence(std::memory_order_release);
    const uint64_t version = set.tags[way].load(std::memory_order_relaxed) & kVersionMask;
    std::atomic<uint64_t>* words = words_of(index * kWays + way);
    for (uint32_t i = 0; i < slice_bytes_ / 8; i++)
        words[i].store(load_be64(bytes + size_t{i} * 8), std::memory_order_relaxed);
    set.used[way].store(1, std::memory_order_relaxed);
    set.tags[way].store(kValid | ((version + kVersionOne) & kVersionMask) | slice, std::memory_order_release);
    resident_.fetch_add(1, std::memory_order_relaxed);
}

bool L2SliceCache::insert(uint64_t slice, const uint8_t* bytes, Ticket ticket) {
    CHECK(slice <= kMaxSlice, "slice numbers have 34 bits");
    const uint64_t index = slice % set_count_;
    Set& set = sets_[index];
    const std::lock_guard lock(stripe(index).mutex);
    if (set.generation.load(std::memory_order_relaxed) != ticket.generation) return false;
    if (const uint32_t way = way_of(set, slice); way != kWays) return ((set.was_stored >> way) & 1) == 0;
    if (const uint32_t way = choose_way(set); way != kWays) fill(index, way, slice, bytes);
    return true;
}

L2SliceCache::Pin L2SliceCache::pin(uint64_t slice) {
    const uint64_t index = slice % set_count_;
    Set& set = sets_[index];
    const std::lock_guard lock(stripe(index).mutex);
    const uint32_t way = way_of(set, slice);
    if (way == kWays) return {};
    set.pins[way]++;
    set.used[way].store(1, std::memory_order_relaxed);
    return {this, index * kWays + way};
}

L2SliceCache::Inserted L2SliceCache::insert_and_pin(uint64_t slice, const uint8_t* bytes, Ticket ticket, Pin& pin) {
    CHECK(slice <= kMaxSlice, "slice numbers have 34 bits");
    pin.release();
    const uint64_t index = slice % set_count_;
    Set& set = sets_[index];
    const std::lock_guard lock(stripe(index).mutex);
    uint32_t way = way_of(set, slice);
    if (way == kWays) {
        if (set.generation.load(std::memory_order_relaxed) != ticket.generation) return Inserted::kStale;
        way = choose_way(set);
        if (way == kWays) return Inserted::kFull;
        fill(index, way, slice, bytes);
    }
    set.pins[way]++;
    set.used[way].store(1, std::memory_order_relaxed);
    pin = Pin(this, index * kWays + way);
    return Inserted::kPinned;
}

void L2SliceCache::invalidate(uint64_t slice) {
    const uint64_t index = slice % set_count_;
    Set& set = sets_[index];
    const std::lock_guard lock(stripe(index).mutex);
    if (const uint32_t way = way_of(set, slice); way != kWays) drop(set, way);
}

void L2SliceCache::drop_all() {
    for (uint64_t index = 0; index < set_count_; index++) {
        Set& set = sets_[index];
        const std::lock_guard lock(stripe(index).mutex);
        // What is being read from the file now may be of the past, whatever is here.
        set.generation.fetch_add(1, std::memory_order_release);
        for (uint32_t way = 0; way < kWays; way++) drop(set, way);
    }
}

void L2SliceCache::clean() {
    if (resident() == 0) return;
    for (uint64_t index = 0; index < set_count_; index++) {
        Set& set = sets_[index];
        const std::lock_guard lock(stripe(index).mutex);
        uint32_t dropped = 0;
        for (uint32_t way = 0; way < kWays; way++) {
            if (!(set.tags[way].load(std::memory_order_relaxed) & kValid) || is_held(set, way)) continue;
            if (set.used[way].load(std::memory_order_relaxed)) {
                set.used[way].store(0, std::memory_order_relaxed);
                continue;
            }
            drop(set, way);
            dropped |= 1u << way;
        }
        if (dropped) release_memory(index, dropped);
    }
}

/// Whole pages only: single slots when they are that large, else the set's block once it is empty.
void L2SliceCache::release_memory(uint64_t index, uint32_t dropped) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    uint8_t* block = arena_ + index * kWays * slice_bytes_;
    if (slice_bytes_ % page == 0) {
        for (uint32_t way = 0; way < kWays; way++) {
            if (dropped & (1u << way)) madvise(block + size_t{way} * slice_bytes_, slice_bytes_, MADV_DONTNEED);
        }
        return;
    }
    const size_t block_bytes = size_t{kWays} * slice_bytes_;
    if (block_bytes % page != 0) return;
    for (const auto& tag : sets_[index].tags) {
        if (tag.load(std::memory_order_relaxed) & kValid) return;
    }
    madvise(block, block_bytes, MADV_DONTNEED);
}

}  // namespace gantry::block::qcow2
