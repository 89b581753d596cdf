// Maps, plans, zeroes and run-length encoded blocks of the test format.

#include <algorithm>
#include <cstring>

#include "block/align.h"
#include "runtime/blocking_pool.h"
#include "runtime/buffer.h"
#include "tests/support/block_format.h"

namespace gantry::test {

using block::align_down;
using block::align_up;
using block::Extent;
using block::Request;
using block::WriteFlags;
using block::WritePlan;

namespace {

constexpr unsigned kMaxRun = 8;  // blocks of one plan

/// Sub-blocks of the block at `begin` that [from, to) touches.
uint16_t sub_mask(uint64_t begin, uint64_t from, uint64_t to) {
    from = std::max(from, begin);
    to = std::min(to, begin + BlockFormat::kBlock);
    if (from >= to) return 0;
    const unsigned first = static_cast<unsigned>((from - begin) / BlockFormat::kSub);
    const unsigned last = static_cast<unsigned>((to - 1 - begin) / BlockFormat::kSub);
    return static_cast<uint16_t>(((2u << last) - 1) & ~((1u << first) - 1));
}

// Runs: two bytes of length - 1 and the byte.

std::vector<uint8_t> run_encode(const uint8_t* data, size_t size) {
    std::vector<uint8_t> out;
    for (size_t i = 0; i < size;) {
        size_t run = 1;
        while (i + run < size && data[i + run] == data[i]) run++;
        out.push_back(static_cast<uint8_t>(run - 1));
        out.push_back(static_cast<uint8_t>((run - 1) >> 8));
        out.push_back(data[i]);
        i += run;
    }
    return out;
}

bool run_decode(const uint8_t* in, size_t in_size, uint8_t* out, size_t out_size) {
    size_t done = 0;
    for (size_t i = 0; i + 3 <= in_size; i += 3) {
        const size_t run = size_t{in[i]} + (size_t{in[i + 1]} << 8) + 1;
        if (run > out_size - done) return false;
        std::memset(out + done, in[i + 2], run);
        done += run;
    }
    return done == out_size;
}

}  // namespace

struct BlockFormat::Plan : block::PlanState {
    uint64_t first = 0;  // guest block
    unsigned count = 0;
    uint64_t host = 0;
    bool new_place = false;
};

// ---- Maps ----

BlockFormat::MapResult BlockFormat::map(uint64_t offset, uint64_t length, Extent& out) {
    const uint64_t index = offset / kBlock;
    const uint64_t inside = offset % kBlock;
    std::lock_guard lock(table_mutex_);
    if (!page_loaded_[index / kPageEntries]) return MapResult::kNeedIo;
    const Entry& e = entries_[index];
    out = Extent{};
    out.allocated = true;
    if (e.encoded) {
        out.kind = Extent::Kind::kEncoded;
        out.offset = e.host;
        out.cookie = e.encoded;
        out.length = std::min(length, kBlock - inside);
        return MapResult::kHit;
    }
    unsigned sub = static_cast<unsigned>(inside / kSub);
    const auto state = [&](unsigned s) { return (e.alloc >> s & 1) | (e.zero >> s & 1) << 1; };
    const int mine = state(sub);
    while (sub < kSubs && state(sub) == mine) sub++;
    out.length = std::min(length, sub * kSub - inside);
    if (mine == 1) {
        out.kind = Extent::Kind::kData;
        out.node = &data();
        out.offset = e.host + inside;
        out.must_copy = e.shared;
        out.transform = header_.key != 0;
    } else if (mine == 2) {
        out.kind = Extent::Kind::kZero;
    } else {
        out.kind = Extent::Kind::kUnallocated;
        out.allocated = false;
    }
    return MapResult::kHit;
}

Task<Result<Extent>> BlockFormat::load_map(Request& rq, uint64_t offset, uint64_t length) {
    Extent extent;
    while (map(offset, length, extent) != MapResult::kHit) {
        CO_CHECK(co_await load_page(rq, offset / kBlock / kPageEntries));
    }
    co_return extent;
}

void BlockFormat::apply_key(uint64_t host_offset, const IoVec& iov) const {
    for (uint32_t i = 0; i < iov.count; i++) {
        auto* bytes = static_cast<uint8_t*>(iov.data[i].iov_base);
        for (size_t b = 0; b < iov.data[i].iov_len; b++, host_offset++) {
            bytes[b] ^= static_cast<uint8_t>(((host_offset ^ header_.key) * 0x9e3779b97f4a7c15) >> 56);
        }
    }
}

Task<Result<>> BlockFormat::decode_in_place(Request&, uint64_t, uint64_t host_offset, IoVec iov) {
    apply_key(host_offset, iov);
    co_return Result<>();
}

Task<Result<>> BlockFormat::encode_in_place(Request&, uint64_t, uint64_t host_offset, IoVec iov) {
    apply_key(host_offset, iov);
    co_return Result<>();
}

// ---- Plans ----

uint32_t BlockFormat::write_unit(uint64_t offset) {
    const uint64_t index = offset / kBlock;
    std::lock_guard lock(table_mutex_);
    const Entry& e = entries_[index];
    const bool placed = page_loaded_[index / kPageEntries] && e.host && !e.shared && !e.encoded;
    return placed ? kSub : kBlock;
}

Task<Result<WritePlan>> BlockFormat::plan_write(Request& rq, uint64_t offset, uint64_t length, WriteFlags) {
    plans_++;
    auto guard = co_await alloc_mutex_.lock();
    CO_CHECK(co_await load_range(rq, offset, length));
    const uint64_t index = offset / kBlock;
    const uint64_t inside = offset % kBlock;
    const uint64_t begin = index * kBlock;
    const Entry e = entry(index);
    WritePlan plan;
    plan.guest_offset = offset;
    plan.node = &data();
    plan.flush_copied_first = write_through_;

    if (e.host && !e.shared && !e.encoded) {
        // The block has a place: as far as sub-blocks are all allocated, or all not.
        const unsigned first = static_cast<unsigned>(inside / kSub);
        const bool allocated = e.alloc >> first & 1;
        unsigned end = first;
        while (end < kSubs && (e.alloc >> end & 1) == (allocated ? 1 : 0)) end++;
        plan.length = std::min(length, end * kSub - inside);
        plan.host_offset = e.host + inside;
        plan.in_place = allocated;
        plan.copy_begin = offset;
        plan.copy_end = offset + plan.length;
        if (!allocated) {
            plan.copy_begin = align_down(offset, kSub);
            plan.copy_end = std::min(align_up(offset + plan.length, kSub), size());
            auto state = std::make_unique<Plan>();
            state->first = index;
            state->count = 1;
            state->host = e.host;
            plan.state = std::move(state);
        }
        co_return plan;
    }

    // A new place for this block, and for those behind it that need one too.
    const auto needs_place = [](const Entry& x) { return !x.host || x.shared || x.encoded; };
    const uint64_t last = (offset + length - 1) / kBlock;
    unsigned count = 1;
    while (count < kMaxRun && index + count <= last && needs_place(entry(index + count))) count++;
    bool fresh = false;
    const uint64_t host = take_blocks(count, fresh);
    const uint64_t end = begin + count * kBlock;
    plan.length = std::min(length, end - offset);
    plan.host_offset = host + inside;
    plan.fresh_reads_zero = fresh;
    // What has data elsewhere moves as a whole; else only the touched sub-blocks are filled.
    const auto moves = [](const Entry& x) { return x.alloc || x.encoded; };
    const uint64_t guest_end = offset + plan.length;
    plan.copy_begin = moves(e) ? begin : align_down(offset, kSub);
    plan.copy_end = moves(entry(index + count - 1)) ? end : align_up(guest_end, kSub);
    plan.copy_end = std::min(plan.copy_end, std::max(size(), guest_end));
    auto state = std::make_unique<Plan>();
    state->first = index;
    state->count = count;
    state->host = host;
    state->new_place = true;
    plan.state = std::move(state);
    co_return plan;
}

Task<Result<>> BlockFormat::commit_write(Request& rq, WritePlan& plan) {
    const auto& state = static_cast<const Plan&>(*plan.state);
    auto guard = co_await alloc_mutex_.lock();
    Result<> loaded = co_await load_range(rq, state.first * kBlock, state.count * kBlock);
    if (!loaded) {
        if (state.new_place) give_back(state.host, state.count);
        co_return loaded;
    }
    Undo undo;
    for (unsigned i = 0; i < state.count; i++) {
        const uint64_t index = state.first + i;
        const Entry old = entry(index);
        Entry e = old;
        const uint16_t mask = sub_mask(index * kBlock, plan.copy_begin, plan.copy_end);
        if (old.shared || old.encoded) e.alloc = 0;
        e.host = state.host + i * kBlock;
        e.alloc |= mask;
        e.zero &= static_cast<uint16_t>(~mask);
        e.shared = false;
        e.encoded = 0;
        undo.emplace_back(index, old);
        set_entry(index, e);
    }
    const Undo before = undo;
    CO_CHECK(co_await write_through(rq, std::move(undo)));
    for (const auto& [index, old] : before) {
        if (state.new_place && old.host && !old.shared) free_later(old.host);
    }
    co_return Result<>();
}

Task<void> BlockFormat::abort_write(Request&, WritePlan& plan) {
    const auto& state = static_cast<const Plan&>(*plan.state);
    if (state.new_place) give_back(state.host, state.count);
    co_return;
}

// ---- Zeroes and discard ----

Task<Result<>> BlockFormat::zero_mapped(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    auto guard = co_await alloc_mutex_.lock();
    CO_CHECK(co_await load_range(rq, offset, length));
    const uint64_t end = offset + length;
    const uint64_t last = (end - 1) / kBlock;
    const auto whole = [&](uint64_t index) {
        return offset <= index * kBlock && end >= std::min((index + 1) * kBlock, size());
    };
    for (uint64_t index = offset / kBlock; index <= last; index++) {
        if (entry(index).encoded && !whole(index)) {
            co_return fail(ErrorKind::kUnsupported, "node '{}': part of an encoded block cannot be zeroed", name());
        }
    }
    Undo undo;
    std::vector<uint64_t> freed;
    for (uint64_t index = offset / kBlock; index <= last; index++) {
        const Entry old = entry(index);
        Entry e = old;
        const uint16_t mask = sub_mask(index * kBlock, offset, end);
        e.alloc &= static_cast<uint16_t>(~mask);
        e.zero |= mask;
        // Without its last data a block loses its place: when the caller lets it, or when the place is of no use to it.
        const bool of_no_use = old.shared || old.encoded;
        if (e.host && e.alloc == 0 && (has(flags, WriteFlags::kMayUnmap) || of_no_use)) {
            if (!old.shared) freed.push_back(old.host);
            e.host = 0;
            e.shared = false;
            e.encoded = 0;
        }
        undo.emplace_back(index, old);
        set_entry(index, e);
    }
    CO_CHECK(co_await write_through(rq, std::move(undo)));
    for (const uint64_t host : freed) free_later(host);
    co_return Result<>();
}

Task<Result<>> BlockFormat::discard_mapped(Request& rq, uint64_t offset, uint64_t length) {
    return zero_mapped(rq, offset, length, WriteFlags::kMayUnmap);
}

// ---- Encoded blocks ----

Task<Result<>> BlockFormat::read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov) {
    Buffer stored = Buffer::alloc(extent.cookie);
    const iovec one = stored.iov();
    CO_CHECK(co_await file().read(rq, extent.offset, IoVec(one)));
    Buffer block = Buffer::alloc(kBlock);
    const bool good =
        co_await run_blocking([&] { return run_decode(stored.data(), stored.size(), block.data(), block.size()); });
    if (!good) co_return fail(ErrorKind::kCorrupt, "node '{}': encoded block at {} is damaged", name(), extent.offset);
    copy_to_iovec(iov, 0, block.data() + offset % kBlock, iov.bytes);
    co_return Result<>();
}

Task<Result<>> BlockFormat::write_compressed(Request& rq, uint64_t offset, IoVec iov) {
    Buffer block = Buffer::alloc(kBlock);
    std::memset(block.data(), 0, block.size());
    copy_from_iovec(iov, 0, block.data(), iov.bytes);
    std::vector<uint8_t> stored = run_encode(block.data(), block.size());
    if (header_.key || stored.size() > kBlock / 2) {
        co_return fail(ErrorKind::kUnsupported, "node '{}': the block at {} does not get smaller", name(), offset);
    }
    unsigned count = 1;
    bool fresh = false;
    const uint64_t host = take_blocks(count, fresh);
    const iovec one{stored.data(), stored.size()};
    Result<> written = co_await file().write(rq, host, IoVec(one));
    if (written && write_through_) written = co_await file().flush(rq);
    if (!written) {
        give_back(host, 1);
        co_return written;
    }
    auto guard = co_await alloc_mutex_.lock();
    Result<> loaded = co_await load_range(rq, offset, 1);
    if (!loaded) {
        give_back(host, 1);
        co_return loaded;
    }
    const uint64_t index = offset / kBlock;
    const Entry old = entry(index);
    Entry e;
    e.host = host;
    e.encoded = static_cast<uint16_t>(stored.size());
    set_entry(index, e);
    Undo undo;
    undo.emplace_back(index, old);
    CO_CHECK(co_await write_through(rq, std::move(undo)));
    if (old.host && !old.shared) free_later(old.host);
    co_return Result<>();
}

}  // namespace gantry::test
