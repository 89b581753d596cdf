#include "block/formats/qcow2/overlap_map.h"

#include <algorithm>
#include <array>
#include <bit>
#include <random>
#include <string>
#include <utility>

#include "runtime/check.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kMaxByte = uint64_t{1} << 56;
constexpr uint32_t kChunkBits = 4;
constexpr uint64_t kChunkClusters = uint64_t{1} << kChunkBits;
constexpr uint64_t kFirstSlots = 64;
constexpr uint64_t kSlabChunks = 64;

constexpr size_t kStructures = static_cast<size_t>(Structure::kCount);
constexpr std::array<std::string_view, kStructures> kNames = {
    "qcow2_header",   "active L1 table",   "active L2 table",   "refcount block",   "refcount table",
    "snapshot table", "inactive L1 table", "inactive L2 table", "bitmap directory",
};
constexpr std::array<std::string_view, kStructures> kOptionNames = {
    "main-header",    "active-l1",   "active-l2",   "refcount-block",   "refcount-table",
    "snapshot-table", "inactive-l1", "inactive-l2", "bitmap-directory",
};

}  // namespace

std::string_view structure_name(Structure s) { return kNames[static_cast<size_t>(s)]; }

Structure first_of(StructureSet set) {
    GANTRY_CHECK(set != 0, "a set of structures that is not empty");
    return static_cast<Structure>(std::countr_zero(set));
}

Result<StructureSet> overlap_flags(const schema::Options& options) {
    const json::value* option = options.find("overlap-check");
    if (!option) return kOverlapCached;
    const json::object* flags = option->if_object();
    std::string name = "cached";
    if (const json::value* chosen = flags ? flags->if_contains("template") : option) {
        if (!chosen->is_string()) return fail(ErrorKind::kInvalid, "Invalid parameter type for 'overlap-check'");
        name = chosen->get_string();
    }
    StructureSet set = 0;
    if (name == "none") {
        set = kOverlapNone;
    } else if (name == "constant") {
        set = kOverlapConstant;
    } else if (name == "cached") {
        set = kOverlapCached;
    } else if (name == "all") {
        set = kOverlapAll;
    } else {
        return fail(ErrorKind::kInvalid,
                    "Unsupported value '{}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, "
                    "constant, cached, all",
                    name);
    }
    for (size_t i = 0; flags && i < kStructures; i++) {
        const json::value* flag = flags->if_contains(kOptionNames[i]);
        if (!flag) continue;
        if (!flag->is_bool()) {
            return fail(ErrorKind::kInvalid, "Invalid parameter type for 'overlap-check.{}', expected: boolean",
                        kOptionNames[i]);
        }
        const StructureSet bit = bit_of(static_cast<Structure>(i));
        set = static_cast<StructureSet>(flag->get_bool() ? set | bit : set & ~bit);
    }
    return set;
}

/// The sets of kChunkClusters clusters in a row, from `key` times that many on.
struct OverlapMap::Chunk {
    uint64_t key = 0;
    std::atomic<StructureSet> sets[kChunkClusters] = {};
};

/// An open hash table, at most three quarters full.
struct OverlapMap::Top {
    explicit Top(uint64_t count) : mask(count - 1), slots(new std::atomic<Chunk*>[count]()) {}
    const uint64_t mask;
    const std::unique_ptr<std::atomic<Chunk*>[]> slots;
};

OverlapMap::OverlapMap(const Geometry& geometry, StructureSet checked)
    : cluster_bits_(geometry.cluster_bits),
      checked_(checked),
      // Where tables lie is chosen by whoever made the image; which slots they meet in is not.
      seed_((uint64_t{std::random_device()()} << 32) | std::random_device()()) {
    tops_.push_back(std::make_unique<Top>(kFirstSlots));
    top_.store(tops_.back().get(), std::memory_order_release);
}

OverlapMap::~OverlapMap() = default;

uint64_t OverlapMap::hash(uint64_t key) const {
    uint64_t h = key ^ seed_;
    h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdULL;
    h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ULL;
    return h ^ (h >> 33);
}

OverlapMap::Chunk* OverlapMap::find(const Top& top, uint64_t key) const {
    for (uint64_t i = hash(key);; i++) {
        Chunk* chunk = top.slots[i & top.mask].load(std::memory_order_acquire);
        if (!chunk || chunk->key == key) return chunk;
    }
}

OverlapMap::Chunk& OverlapMap::find_or_make(uint64_t key) {
    if (Chunk* found = find(*tops_.back(), key)) return *found;
    if ((chunks_ + 1) * 4 > (tops_.back()->mask + 1) * 3) grow();
    if (chunks_ % kSlabChunks == 0) slabs_.push_back(std::make_unique<Chunk[]>(kSlabChunks));
    Chunk& made = slabs_.back()[chunks_++ % kSlabChunks];
    made.key = key;
    Top& top = *tops_.back();
    uint64_t i = hash(key);
    while (top.slots[i & top.mask].load(std::memory_order_relaxed)) i++;
    top.slots[i & top.mask].store(&made, std::memory_order_release);
    return made;
}

void OverlapMap::grow() {
    const Top& old = *tops_.back();
    auto larger = std::make_unique<Top>((old.mask + 1) * 2);
    for (uint64_t i = 0; i <= old.mask; i++) {
        Chunk* chunk = old.slots[i].load(std::memory_order_relaxed);
        if (!chunk) continue;
        uint64_t at = hash(chunk->key);
        while (larger->slots[at & larger->mask].load(std::memory_order_relaxed)) at++;
        larger->slots[at & larger->mask].store(chunk, std::memory_order_relaxed);
    }
    tops_.push_back(std::move(larger));
    top_.store(tops_.back().get(), std::memory_order_release);
}

std::optional<OverlapMap::Clusters> OverlapMap::clusters(uint64_t offset, uint64_t bytes) const {
    if (bytes == 0 || offset >= kMaxByte) return std::nullopt;
    const uint64_t end = bytes < kMaxByte - offset ? offset + bytes : kMaxByte;
    return Clusters{offset >> cluster_bits_, (end - 1) >> cluster_bits_};
}

void OverlapMap::add(Structure s, uint64_t offset, uint64_t bytes) {
    const StructureSet bit = bit_of(s);
    const auto range = clusters(offset, bytes);
    if ((checked_ & bit) == 0 || !range) return;
    std::lock_guard lock(mutex_);
    Chunk* chunk = nullptr;
    for (uint64_t c = range->first; c <= range->last; c++) {
        if (!chunk || c % kChunkClusters == 0) chunk = &find_or_make(c >> kChunkBits);
        chunk->sets[c % kChunkClusters].fetch_or(bit, std::memory_order_relaxed);
    }
}

void OverlapMap::remove(Structure s, uint64_t offset, uint64_t bytes) {
    const StructureSet bit = bit_of(s);
    const auto range = clusters(offset, bytes);
    if ((checked_ & bit) == 0 || !range) return;
    std::lock_guard lock(mutex_);
    for (uint64_t c = range->first; c <= range->last; c = (c | (kChunkClusters - 1)) + 1) {
        Chunk* chunk = find(*tops_.back(), c >> kChunkBits);
        const uint64_t last = std::min(range->last, c | (kChunkClusters - 1));
        for (uint64_t i = c; chunk && i <= last; i++) {
            chunk->sets[i % kChunkClusters].fetch_and(static_cast<StructureSet>(~bit), std::memory_order_relaxed);
        }
    }
}

StructureSet OverlapMap::touched(uint64_t offset, uint64_t bytes) const {
    const auto range = clusters(offset, bytes);
    if (checked_ == 0 || !range) return 0;
    const Top& top = *top_.load(std::memory_order_acquire);
    StructureSet set = 0;
    const auto collect = [&](const Chunk& chunk) {
        const uint64_t start = chunk.key << kChunkBits;
        const uint64_t first = std::max(range->first, start);
        const uint64_t last = std::min(range->last, start + kChunkClusters - 1);
        for (uint64_t c = first; c <= last; c++) set |= chunk.sets[c - start].load(std::memory_order_relaxed);
    };
    const uint64_t first_key = range->first >> kChunkBits, last_key = range->last >> kChunkBits;
    if (last_key - first_key <= top.mask) {
        for (uint64_t key = first_key; key <= last_key; key++) {
            if (const Chunk* chunk = find(top, key)) collect(*chunk);
        }
        return set;
    }
    // Longer than the table: all of that instead.
    for (uint64_t i = 0; i <= top.mask; i++) {
        const Chunk* chunk = top.slots[i].load(std::memory_order_acquire);
        if (chunk && chunk->key >= first_key && chunk->key <= last_key) collect(*chunk);
    }
    return set;
}

std::optional<Structure> OverlapMap::what(uint64_t offset, uint64_t bytes) const {
    const StructureSet set = touched(offset, bytes);
    if (set == 0) return std::nullopt;
    return first_of(set);
}

}  // namespace gantry::block::qcow2
