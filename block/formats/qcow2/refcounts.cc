// Table, cache of blocks, lookup and change.

#include "block/formats/qcow2/refcounts.h"

#include <cstring>
#include <utility>

#include "block/align.h"
#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/overlap_map.h"
#include "block/formats/qcow2/refcount_bits.h"
#include "block/formats/qcow2/refusal.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kMinCacheBlocks = 4;
/// Changed blocks are written in units of it: clusters may be large, changes are small.
constexpr uint64_t kWriteUnit = 4096;
/// change() holds the blocks of that many bytes at once.
constexpr uint64_t kWindowBytes = uint64_t{32} << 20;
/// Offsets stay below it (headers leave room above for flags).
constexpr uint64_t kMaxImageBytes = uint64_t{1} << 55;

}  // namespace

/// Keeps the blocks of a range of table indices in memory.
struct Refcounts::Pinned {
    Pinned(Refcounts& owner, uint64_t first, uint64_t last) : owner(owner) {
        owner.pinned_first_ = first;
        owner.pinned_last_ = last;
    }
    ~Pinned() {
        owner.pinned_first_ = 1;
        owner.pinned_last_ = 0;
    }
    Refcounts& owner;
};

Refcounts::Refcounts(ImageFile& file, Header& header, uint64_t cache_bytes, OverlapMap* overlap)
    : file_(file),
      header_(header),
      cache_blocks_(std::max(cache_bytes >> header.cluster_bits, kMinCacheBlocks)),
      overlap_(overlap) {}

void Refcounts::set_cache_bytes(uint64_t bytes) {
    cache_blocks_ = std::max(bytes >> header_.cluster_bits, kMinCacheBlocks);
}

void Refcounts::clean() {
    std::erase_if(blocks_, [this](const auto& b) { return !b.second.dirty() && b.second.last_use <= cleaned_at_; });
    cleaned_at_ = uses_;
}

uint64_t Refcounts::max_count() const { return max_refcount(header_.refcount_order); }

uint64_t Refcounts::clusters_per_block() const { return cluster_size() * 8 >> header_.refcount_order; }

uint64_t Refcounts::end_limit() const {
    const uint64_t most = file_.node().limits().can_grow_by_write ? kMaxImageBytes : file_.size();
    return std::min(most, kMaxImageBytes) >> header_.cluster_bits;
}

Task<Result<>> Refcounts::load() {
    const uint64_t offset = header_.refcount_table_offset;
    const uint64_t bytes = header_.refcount_table_clusters * cluster_size();
    if (bytes > kMaxRefcountTableBytes) {
        co_return refuse_corrupt(file_.node_name(), "Reference count table too large", "{} bytes at {:#x}", bytes,
                                 offset);
    }
    const uint64_t size = file_.size();
    // An entry that the end of the file cuts goes on with zeroes.
    const uint64_t present = offset < size ? std::min(bytes, (size - offset + 7) & ~uint64_t{7}) : 0;
    CO_TRY(Buffer raw, Buffer::try_alloc(present));
    CO_CHECK(co_await file_.read(offset, raw.span(), "refcount table"));

    forget();
    table_place_ = {offset, header_.refcount_table_clusters};
    table_.assign(bytes / 8, 0);
    bad_.assign(table_.size(), false);
    room_.assign(table_.size(), Room());
    std::vector<std::pair<uint64_t, uint64_t>> places;  // offset, index
    for (uint64_t i = 0; i < present / 8; i++) {
        table_[i] = load_be64(raw.data() + i * 8);
        if (table_[i] == 0) continue;
        bad_[i] = (table_[i] & (cluster_size() - 1)) != 0 || table_[i] >= size ||
                  (table_[i] < offset + bytes && offset < table_[i] + cluster_size());
        places.emplace_back(table_[i], i);
    }
    // A block that two entries name would be cached twice, and one copy overwrite the other.
    std::sort(places.begin(), places.end());
    for (size_t i = 1; i < places.size(); i++) {
        if (places[i - 1].first == places[i].first) bad_[places[i - 1].second] = bad_[places[i].second] = true;
    }
    if (overlap_) {
        overlap_->add(Structure::kRefcountTable, offset, bytes);
        for (const auto& [place, index] : places) {
            if (!bad_[index]) overlap_->add(Structure::kRefcountBlock, place, cluster_size());
        }
    }
    co_return Result<>();
}

void Refcounts::forget() {
    if (overlap_) {
        overlap_->remove(Structure::kRefcountTable, table_place_.offset, table_place_.clusters * cluster_size());
        if (move_) old_tables_.push_back(*move_);
        for (const Move& old : old_tables_) {
            overlap_->remove(Structure::kRefcountTable, old.offset, old.clusters * cluster_size());
        }
        for (uint64_t i = 0; i < table_.size(); i++) {
            if (table_[i] != 0 && !bad_[i]) overlap_->remove(Structure::kRefcountBlock, table_[i], cluster_size());
        }
    }
    table_.clear();
    bad_.clear();
    room_.clear();
    blocks_.clear();
    unlinked_.clear();
    move_.reset();
    old_tables_.clear();
    hint_ = 0;
    watched_ = kNothing;
    dirty_.store(false, std::memory_order_relaxed);
}

Task<Result<>> Refcounts::reload() { return load(); }

// ---- Blocks ----

Error Refcounts::bad_block(uint64_t index) const {
    const uint64_t place = table_[index];
    const char* sentence = place & (cluster_size() - 1) ? "Refblock offset {:#x} unaligned (reftable index: {:#x})"
                           : place >= file_.size() ? "Refblock offset {:#x} beyond the file (reftable index: {:#x})"
                                                   : "Refblock offset {:#x} used twice (reftable index: {:#x})";
    return Error(ErrorKind::kCorrupt,
                 fmt::format("{}; node '{}': the file has {:#x} bytes; repair the image",
                             fmt::format(fmt::runtime(sentence), place, index), file_.node_name(), file_.size()));
}

Task<Result<Refcounts::Block*>> Refcounts::block(uint64_t index) {
    if (auto found = blocks_.find(index); found != blocks_.end()) {
        found->second.last_use = ++uses_;
        co_return &found->second;
    }
    const uint64_t place = table_[index];
    if (bad_[index] || place >= file_.size()) co_return std::unexpected(bad_block(index));
    CO_CHECK(co_await make_room(1));
    Block fresh;
    fresh.bytes = Buffer::alloc(cluster_size());
    CO_CHECK(co_await file_.read(place, fresh.bytes.span(), "refcount block"));
    fresh.last_use = ++uses_;
    co_return &blocks_.emplace(index, std::move(fresh)).first->second;
}

/// `more` blocks fit into the cache afterwards, unless those that must stay fill it.
Task<Result<>> Refcounts::make_room(uint64_t more) {
    while (blocks_.size() + more > cache_blocks_) {
        auto oldest = blocks_.end();
        bool dirty = false;
        for (auto i = blocks_.begin(); i != blocks_.end(); ++i) {
            if (i->first >= pinned_first_ && i->first <= pinned_last_) continue;
            if (i->second.dirty()) {
                dirty = true;
            } else if (oldest == blocks_.end() || i->second.last_use < oldest->second.last_use) {
                oldest = i;
            }
        }
        if (oldest != blocks_.end()) {
            blocks_.erase(oldest);
        } else if (dirty) {
            CO_CHECK(co_await write_blocks());
        } else {
            break;
        }
    }
    co_return Result<>();
}

void Refcounts::touched(Block& block, uint64_t from, uint64_t to) {
    const uint64_t unit = std::min(kWriteUnit, cluster_size());
    const uint64_t begin = align_down(from << header_.refcount_order >> 3, unit);
    const uint64_t end = align_up(((to << header_.refcount_order) + 7) >> 3, unit);
    block.dirty_begin = block.dirty() ? std::min(block.dirty_begin, begin) : begin;
    block.dirty_end = std::max(block.dirty_end, end);
    dirty_.store(true, std::memory_order_relaxed);
}

// ---- Lookup and change ----

Task<Result<uint64_t>> Refcounts::get(uint64_t cluster) {
    const uint64_t index = index_of(cluster);
    if (absent(index)) co_return uint64_t{0};
    CO_TRY(Block * found, co_await block(index));
    co_return refcount_in_block(found->bytes.span(), header_.refcount_order, cluster % clusters_per_block());
}

Result<> Refcounts::check_range(uint64_t first, uint64_t count, int64_t delta) const {
    const uint64_t most = kMaxImageBytes >> header_.cluster_bits;
    if (first <= most && count <= most - first) return {};
    if (delta < 0) {
        return refuse_corrupt(file_.node_name(), "Reference to a cluster that cannot exist", "{} clusters at {:#x}",
                              count, first);
    }
    return refuse(ErrorKind::kTooLarge, file_.node_name(), "Image too large", "{} clusters at {:#x}", count, first);
}

Task<Result<>> Refcounts::change_bytes(uint64_t offset, uint64_t bytes, int64_t delta) {
    if (bytes == 0) co_return Result<>();
    if (wraps(offset, bytes)) {
        co_return refuse_corrupt(file_.node_name(), "Reference to clusters that cannot exist", "{} bytes at {:#x}",
                                 bytes, offset);
    }
    const uint64_t first = offset >> header_.cluster_bits;
    const uint64_t last = (offset + bytes - 1) >> header_.cluster_bits;
    co_return co_await change(first, last - first + 1, delta);
}

Task<Result<>> Refcounts::change(uint64_t first, uint64_t count, int64_t delta) {
    if (count == 0 || delta == 0) co_return Result<>();
    CO_CHECK(check_range(first, count, delta));
    const uint64_t per_block = clusters_per_block();
    const uint64_t window = std::max(kWindowBytes / cluster_size(), uint64_t{1}) * per_block;
    const uint64_t end = first + count;
    for (uint64_t pos = first; pos < end;) {
        const uint64_t part = std::min(end, align_down(pos, window) + window) - pos;
        Result<> done = co_await change_window({pos, part}, delta, {first, count});
        if (!done) {
            Result<> undone;
            for (uint64_t back = first; back < pos && undone;) {
                const uint64_t n = std::min(pos, align_down(back, window) + window) - back;
                undone = co_await change_window({back, n}, -delta, {first, count});
                back += n;
            }
            if (!undone) {
                log::warn("a failed change of refcounts could not be taken back node={} error={}", file_.node_name(),
                          undone.error().message());
            }
            co_return done;
        }
        pos += part;
    }
    co_return Result<>();
}

/// All or none: what can fail comes first, and what it has read stays in memory.
Task<Result<>> Refcounts::change_window(ClusterRun part, int64_t delta, ClusterRun whole) {
    const uint64_t per_block = clusters_per_block();
    const uint32_t order = header_.refcount_order;
    const uint64_t first = index_of(part.first);
    const uint64_t last = index_of(part.end() - 1);
    CO_CHECK(co_await make_room(0));  // what a change before this one has left
    Pinned pinned(*this, first, last);
    if (delta > 0) CO_CHECK(co_await make_blocks(first, last, whole));
    for (uint64_t i = first; i <= last; i++) {
        const uint64_t from = std::max(part.first, i * per_block) - i * per_block;
        const uint64_t to = std::min(part.end(), (i + 1) * per_block) - i * per_block;
        uint64_t at = from;
        CountFault fault = CountFault::kNegative;
        if (!absent(i)) {
            CO_TRY(Block * b, co_await block(i));
            fault = check_add(b->bytes.span(), order, from, to - from, delta, at);
        }
        if (fault == CountFault::kNone) continue;
        const uint64_t offset = (i * per_block + at) << header_.cluster_bits;
        if (fault == CountFault::kNegative) {
            co_return refuse_corrupt(file_.node_name(), "Refcount would become negative",
                                     "of the cluster at {:#x}, by {}", offset, delta);
        }
        co_return refuse(ErrorKind::kInvalid, file_.node_name(), "Refcount would exceed its width",
                         "of the cluster at {:#x}, by {}: {} is the most", offset, delta, max_count());
    }
    for (uint64_t i = first; i <= last; i++) {
        const uint64_t from = std::max(part.first, i * per_block) - i * per_block;
        const uint64_t to = std::min(part.end(), (i + 1) * per_block) - i * per_block;
        Block& b = blocks_.at(i);
        add_to_counts(b.bytes.span(), order, from, to - from, delta);
        touched(b, from, to);
        if (delta > 0) continue;
        const uint64_t free = find_zero_count(b.bytes.span(), order, from, to);
        if (free == to) continue;
        room_[i] = Room();
        set_hint(i * per_block + free);
        const uint64_t watched = watched_ - i * per_block;  // wraps when it lies before
        if (watched >= from && watched < to && refcount_in_block(b.bytes.span(), order, watched) == 0) {
            watched_ = kNothing;
        }
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
