#include "block/formats/qcow2/operation.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

Operation::Operation(Qcow2Node& node) : node_(node) {}

Task<Result<>> Operation::begin() {
    CO_CHECK(node_.check_writable());
    metadata_ = node_.metadata();
    CO_CHECK(metadata_->check_l1_place());
    CO_CHECK(co_await metadata_->settle());
    CO_CHECK(co_await metadata_->begin_session());
    co_await lock();
    co_return Result<>();
}

Task<void> Operation::lock() { guard_ = co_await metadata_->mutex().lock(); }

uint64_t Operation::clusters_for(uint64_t bytes) const {
    const uint64_t cluster = geometry().cluster_size();
    return bytes / cluster + (bytes % cluster != 0);
}

Task<Result<uint64_t>> Operation::allocate(uint64_t bytes) {
    const uint64_t clusters = std::max<uint64_t>(1, clusters_for(bytes));
    CO_TRY(const HostRun run, co_await metadata_->allocator().allocate_row(clusters));
    rows_.push_back({run.offset, clusters << geometry().cluster_bits});
    co_return run.offset;
}

Task<void> Operation::give_back() {
    for (const Row& row : rows_) (void)co_await metadata_->allocator().free(row.offset, row.bytes);
    rows_.clear();
}

Task<Result<std::vector<uint64_t>>> Operation::read_l1(uint64_t offset, uint64_t entries) {
    if (entries > kMaxL1Entries) {
        co_return refuse(ErrorKind::kTooLarge, node_.name(), "L1 table is too large", "{} entries at {:#x}, at most {}",
                         entries, offset, kMaxL1Entries);
    }
    std::vector<uint64_t> words(entries);
    if (entries == 0) co_return words;
    if (offset % geometry().cluster_size() != 0 || wraps(offset, entries * 8)) {
        co_return refuse_corrupt(node_.name(), "L1 table offset invalid", "{} entries at {:#x}", entries, offset);
    }
    CO_TRY(Buffer bytes, Buffer::try_alloc(entries * 8));
    CO_CHECK(co_await file().read(offset, bytes.span(), "L1 table"));
    for (size_t i = 0; i < entries; i++) words[i] = load_be64(bytes.data() + i * 8);
    co_return words;
}

Task<Result<>> Operation::write_padded(uint64_t offset, std::span<const uint8_t> bytes, std::string_view what) {
    const uint64_t whole = std::max<uint64_t>(1, clusters_for(bytes.size())) << geometry().cluster_bits;
    CO_TRY(Buffer padded, Buffer::try_alloc(whole));
    std::ranges::copy(bytes, padded.data());
    std::fill(padded.data() + bytes.size(), padded.data() + whole, uint8_t{0});
    co_return co_await file().write(offset, padded.span(), what);
}

Task<Result<>> Operation::write_l1(uint64_t offset, std::span<const uint64_t> words) {
    std::vector<uint8_t> bytes(words.size() * 8);
    for (size_t i = 0; i < words.size(); i++) store_be64(bytes.data() + i * 8, words[i]);
    co_return co_await write_padded(offset, bytes, "L1 table");
}

Task<Result<>> Operation::stabilise() {
    CO_CHECK(co_await refcounts().write_back());
    co_return co_await file().flush();
}

Task<Result<>> Operation::switch_header(uint64_t offset, std::span<const uint8_t> bytes) {
    Result<> done = co_await metadata_->switch_header(offset, bytes);
    if (done || header_lost()) keep();
    co_return done;
}

bool Operation::header_lost() const { return !node_.check_writable(); }

Task<Result<>> Operation::switch_mapping(uint64_t disk_size, uint64_t l1_entries, uint64_t l1_offset) {
    constexpr uint64_t kAt = 24;
    uint8_t bytes[24];
    store_be64(bytes, disk_size);
    store_be32(bytes + 8, header().crypt_method);
    store_be32(bytes + 12, static_cast<uint32_t>(l1_entries));
    store_be64(bytes + 16, l1_offset);
    CO_CHECK(co_await switch_header(kAt, bytes));
    header().size = disk_size;
    header().l1_size = static_cast<uint32_t>(l1_entries);
    header().l1_table_offset = l1_offset;
    image().disk_size = disk_size;
    node_.take_size(disk_size);
    co_return Result<>();
}

Task<Result<>> Operation::switch_snapshots(std::vector<Snapshot> snapshots, uint64_t table_offset) {
    constexpr uint64_t kAt = 60;
    uint8_t bytes[12];
    store_be32(bytes, static_cast<uint32_t>(snapshots.size()));
    store_be64(bytes + 4, table_offset);
    CO_CHECK(co_await switch_header(kAt, bytes));
    OverlapMap& overlap = metadata_->overlap();
    if (header().nb_snapshots != 0) {
        overlap.remove(Structure::kSnapshotTable, header().snapshots_offset, stored_bytes(image().snapshots));
    }
    for (Snapshot& s : snapshots) {  // as they were encoded
        s.stored_bytes = encoded_bytes(s);
        if (!s.disk_size) s.disk_size = header().size;
    }
    if (!snapshots.empty()) {
        overlap.add(Structure::kSnapshotTable, table_offset, stored_bytes(snapshots));
    }
    header().nb_snapshots = static_cast<uint32_t>(snapshots.size());
    header().snapshots_offset = table_offset;
    image().snapshots = std::move(snapshots);
    co_return Result<>();
}

void Operation::publish_mapping(std::span<const uint64_t> words) {
    metadata_->replace_mapping(words);
    image().l1.assign(words.begin(), words.end());
}

Task<Result<>> Operation::release(uint64_t offset, uint64_t bytes) {
    CO_TRY(const std::vector<HostRun> freed, co_await metadata_->allocator().free(offset, bytes));
    for (const HostRun& run : freed) {
        if (!released_.empty()) {
            HostRun& last = released_.back();
            if (last.offset + (last.clusters << geometry().cluster_bits) == run.offset) {
                last.clusters += run.clusters;
                continue;
            }
        }
        released_.push_back(run);
    }
    co_return Result<>();
}

Result<> Operation::check_table_place(uint64_t offset) {
    const uint64_t cluster = geometry().cluster_size();
    if (metadata_places_.empty()) {
        const auto add = [&](uint64_t at, uint64_t bytes) {
            metadata_places_.push_back({at, std::max<uint64_t>(1, clusters_for(bytes)) * cluster});
        };
        const Header& h = header();
        add(0, cluster);
        add(h.l1_table_offset, h.l1_size * uint64_t{8});
        add(h.refcount_table_offset, h.refcount_table_clusters * cluster);
        for (uint64_t block : refcounts().table()) {
            if (block != 0) add(block, cluster);
        }
        if (h.nb_snapshots != 0) {
            add(h.snapshots_offset, stored_bytes(image().snapshots));
        }
        for (const Snapshot& s : image().snapshots) add(s.l1_table_offset, s.l1_size * uint64_t{8});
        std::ranges::sort(metadata_places_, {}, &Row::offset);
    }
    // Places on disk do not overlap; where a hostile image makes them, the nearest one below is enough of a guard.
    const auto after = std::ranges::upper_bound(metadata_places_, offset, {}, &Row::offset);
    if (after == metadata_places_.begin()) return {};
    const Row& row = *std::prev(after);
    if (offset - row.offset >= row.bytes) return {};
    return refuse_corrupt(node_.name(), "Preventing invalid write on metadata",
                          "an L2 table is said to lie at {:#x}, inside the metadata at {:#x}", offset, row.offset);
}

Task<Result<>> Operation::finish(bool discard) {
    const std::vector<HostRun> runs = std::move(released_);
    released_.clear();
    CO_CHECK(co_await stabilise());
    if (!discard) co_return Result<>();
    for (const HostRun& run : runs) {
        const uint64_t bytes = run.clusters << geometry().cluster_bits;
        co_await file().discard(run.offset, bytes);
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
