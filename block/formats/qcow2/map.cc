// Guest to host: the L1 table and the slices of L2 tables.

#include <bit>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

uint64_t Qcow2Node::l1_entry(uint64_t offset) const {
    const uint64_t index = offset >> geometry().l1_shift();
    if (metadata_) return metadata_->l1().get(index);
    return index < image_.l1.size() ? image_.l1[index] : 0;
}

void Qcow2Node::extend(MappingRun& run) const {
    const Geometry& g = geometry();
    while (!run.finished) {
        const uint64_t table = l2_table_offset(l1_entry(run.end()));
        if (table == 0) {
            // A missing table is a table of zeroes: all its guest bytes at once. So is what no L1 entry describes.
            const uint64_t index = run.end() >> g.l1_shift();
            Piece piece = describe_entry(g, 0, 0, run.end());
            piece.length = (index < l1_entries() ? (index + 1) << g.l1_shift() : run.limit) - run.end();
            run.add(piece);
            continue;
        }
        // The words count only if the slice stayed in its place while they were read: work on a copy until that is
        // known.
        const auto view = l2_cache_->find(slice_of(run.end()));
        if (!view) return;
        MappingRun tried = run;
        extend_in_slice(g, slice_shift_, [&](uint32_t index) { return view->word(index); }, tried);
        if (!view->still_valid()) return;
        run = tried;
    }
}

Extent Qcow2Node::to_extent(const MappingRun& run) {
    Extent extent;
    extent.kind = run.first.kind;
    extent.allocated = run.first.allocated;
    extent.must_copy = run.first.must_copy;
    extent.length = run.length;
    extent.offset = run.first.host;
    if (extent.kind == Extent::Kind::kData) {
        extent.node = &data();
        extent.transform = cipher_ != nullptr;
    }
    if (extent.kind == Extent::Kind::kEncoded) extent.cookie = run.first.bytes;
    return extent;
}

FormatNode::MapResult Qcow2Node::map(uint64_t offset, uint64_t length, Extent& out) {
    MappingRun run(offset, length);
    extend(run);
    if (run.length == 0) return MapResult::kNeedIo;  // load_map() tells what is wrong when something is
    out = to_extent(run);
    return MapResult::kHit;
}

Task<Result<Extent>> Qcow2Node::load_map(Request& rq, uint64_t offset, uint64_t length) {
    MappingRun run(offset, length);
    extend(run);
    while (run.length == 0 && !run.is_damaged()) {
        CO_CHECK(co_await extend_from_file(rq, run));
        if (!run.finished) extend(run);
    }
    if (run.length == 0) co_return std::unexpected(damaged(run));
    co_return to_extent(run);
}

/// Brings the slice of run.end() in and looks into it, or waits for somebody who is doing the former. The run may be as
/// it was before: then somebody changed the slice meanwhile.
Task<Result<>> Qcow2Node::extend_from_file(Request& rq, MappingRun& run) {
    const Geometry& g = geometry();
    const uint64_t slice = slice_of(run.end());
    const uint64_t l1_index = run.end() >> g.l1_shift();
    const L2SliceCache::Ticket ticket = l2_cache_->ticket(slice);
    const uint64_t table = l2_table_offset(l1_entry(run.end()));
    if (table == 0) co_return Result<>();
    if (g.offset_in_cluster(table) != 0) {
        co_return std::unexpected(
            corrupt(fmt::format("L2 table offset {:#x} unaligned (L1 index: {})", table, l1_index), std::nullopt,
                    std::nullopt));
    }

    std::shared_ptr<SliceLoad> load;
    bool mine = false;
    {
        const std::lock_guard lock(loads_mutex_);
        const auto it = std::ranges::find(loads_, slice, [](const auto& l) { return l->slice; });
        mine = it == loads_.end();
        load = mine ? loads_.emplace_back(std::make_shared<SliceLoad>(slice)) : *it;
    }
    if (!mine) {
        co_await load->done.wait();
        if (load->error) co_return std::unexpected(*load->error);
        co_return Result<>();
    }

    const uint32_t slice_bytes = l2_cache_->slice_bytes();
    const uint64_t slices_per_table = g.cluster_size() / slice_bytes;
    const uint64_t at = table + (slice % slices_per_table) * slice_bytes;
    Buffer bytes = Buffer::alloc(slice_bytes);
    const iovec iov = bytes.iov();
    Result<> read = co_await file().read(rq, at, IoVec(iov));
    slice_loads_.fetch_add(1, std::memory_order_relaxed);
    if (!read) {
        load->error = std::move(read).error().context(
            fmt::format("node '{}': reading L2 table {} at {:#x}", name(), l1_index, at));
    } else if (l2_cache_->insert(slice, bytes.data(), ticket)) {
        // From our own copy: the cache may have given the place away again.
        extend_in_slice(
            g, slice_shift_, [&](uint32_t index) { return load_be64(bytes.data() + size_t{index} * 8); }, run);
    }
    {
        const std::lock_guard lock(loads_mutex_);
        std::erase(loads_, load);
    }
    load->done.set();
    if (load->error) co_return std::unexpected(*load->error);
    co_return Result<>();
}

Error Qcow2Node::damaged(const MappingRun& run) {
    const Geometry& g = geometry();
    const uint64_t table = l2_table_offset(l1_entry(run.begin));
    const uint64_t index = (run.begin >> g.cluster_bits) & ((uint64_t{1} << g.l2_bits()) - 1);
    return corrupt(damage_text(run.first.damage, run.bad_entry, run.bad_bitmap, table, index), std::nullopt,
                   std::nullopt);
}

}  // namespace gantry::block::qcow2
