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

/// The way that holds `slice`, a free one, or the one that loses its place.
uint32_t L2SliceCache::choose_way(Set& set, uint64_t slice) {
    uint32_t free_way = kWays;
    for (uint32_t way = 0; way < kWays; way++) {
        const uint64_t tag = set.tags[way].load(std::memory_order_relaxed);
        if (!(tag & kValid)) {
            if (free_way == kWays) free_way = way;
        } else if ((tag & kSliceMask) == slice) {
            return way;
        }
    }
    if (free_way != kWays) return free_way;
    while (set.used[set.hand].exchange(0, std::memory_order_relaxed)) set.hand = (set.hand + 1) % kWays;
    const uint32_t victim = set.hand;
    set.hand = (set.hand + 1) % kWays;
    return victim;
}

void L2SliceCache::drop(Set& set, uint32_t way) {
    const uint64_t tag = set.tags[way].load(std::memory_order_relaxed);
    if (!(tag & kValid)) return;
    set.tags[way].store(tag & ~kValid, std::memory_order_relaxed);
    resident_.fetch_sub(1, std::memory_order_relaxed);
}

void L2SliceCache::insert(uint64_t slice, const uint8_t* bytes) {
    CHECK(slice <= kMaxSlice, "slice numbers have 34 bits");
    const uint64_t index = slice % set_count_;
    Set& set = sets_[index];
    const std::lock_guard lock(stripe(index));
    const uint32_t way = choose_way(set, slice);
    drop(set, way);
    // A reader that sees one of the new words sees the old tag gone, too (whoever took it away).
    std::atomic_thread_fence(std::memory_order_release);
    const uint64_t version = set.tags[way].load(std::memory_order_relaxed) & ~(kValid | kSliceMask);
    std::atomic<uint64_t>* words = words_of(index * kWays + way);
    for (uint32_t i = 0; i < slice_bytes_ / 8; i++)
        words[i].store(load_be64(bytes + size_t{i} * 8), std::memory_order_relaxed);
    set.used[way].store(1, std::memory_order_relaxed);
    set.tags[way].store(kValid | ((version + kVersionOne) & ~kValid) | slice, std::memory_order_release);
    resident_.fetch_add(1, std::memory_order_relaxed);
}

void L2SliceCache::invalidate(uint64_t slice) {
    const uint64_t index = slice % set_count_;
    Set& set = sets_[index];
    const std::lock_guard lock(stripe(index));
    for (uint32_t way = 0; way < kWays; way++) {
        if ((set.tags[way].load(std::memory_order_relaxed) & (kValid | kSliceMask)) == (kValid | slice)) drop(set, way);
    }
}

void L2SliceCache::clean() {
    if (resident() == 0) return;
    for (uint64_t index = 0; index < set_count_; index++) {
        Set& set = sets_[index];
        const std::lock_guard lock(stripe(index));
        uint32_t dropped = 0;
        for (uint32_t way = 0; way < kWays; way++) {
            if (!(set.tags[way].load(std::memory_order_relaxed) & kValid)) continue;
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
