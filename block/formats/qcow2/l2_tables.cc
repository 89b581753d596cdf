// L2 tables of our own, and slices of them to be changed.

#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/metadata.h"

namespace gantry::block::qcow2 {

namespace {
constexpr uint64_t kMaxSpareTables = 64;
constexpr uint64_t kMaxSpareBytes = uint64_t{256} << 10;
constexpr uint64_t kSector = 512;
}  // namespace

bool Metadata::owns_table(uint64_t l1_index) const {
    const uint64_t word = l1_.get(l1_index);
    return (word & kCopied) != 0 && l2_table_offset(word) != 0;
}

/// Before anything is changed through the entry.
Task<Result<>> Metadata::check_l1_entry(uint64_t l1_index) {
    if (l1_index >= l1_.size()) {
        co_return fail(ErrorKind::kInvalid, "node '{}': L1 entry {} of {}", file_.node_name(), l1_index, l1_.size());
    }
    if (l1_overlaps_) {
        co_return std::unexpected(
            co_await corrupt(fmt::format("Preventing invalid write on active L1 table (overlaps with {})",
                                         structure_name(*l1_overlaps_)),
                             marked_l1_));
    }
    const uint64_t table = l2_table_offset(l1_.get(l1_index));
    if (image_.geometry.offset_in_cluster(table) != 0) {
        co_return std::unexpected(
            co_await corrupt(fmt::format("L2 table offset {:#x} unaligned (L1 index: {})", table, l1_index), table));
    }
    if (!bad_tables_.empty() && bad_tables_.contains(table)) {
        co_return std::unexpected(co_await corrupt(fmt::format("Preventing invalid write on metadata (the L2 table at "
                                                               "{:#x} lies on other metadata or behind the file)",
                                                               table),
                                                   table));
    }
    co_return Result<>();
}

Task<Result<>> Metadata::own_l2_table(uint64_t l1_index) {
    if (!in_session()) CO_CHECK(co_await begin_session());
    CO_CHECK(co_await check_l1_entry(l1_index));
    for (bool emptied = false; !owns_table(l1_index);) {
        bool log_full = false;
        Result<> made = co_await make_table(l1_index, log_full);
        if (!made) {
            if (made.error().kind() == ErrorKind::kCorrupt) {
                co_return std::unexpected(co_await corrupt(made.error().message(), 0));
            }
            if (made.error().kind() != ErrorKind::kNoSpace || std::exchange(emptied, true)) co_return made;
            CO_CHECK(co_await flush());  // places that wait to be free again may be all there is
        } else if (log_full) {
            CO_CHECK(co_await write_back());
        }
    }
    co_return Result<>();
}

Task<Result<>> Metadata::make_table(uint64_t l1_index, bool& log_full) {
    uint64_t old = 0;
    {
        auto guard = co_await mutex_.lock();
        if (owns_table(l1_index)) co_return Result<>();
        old = l2_table_offset(l1_.get(l1_index));
        CO_TRY(const uint64_t place, co_await take_table());
        if (old != 0) {
            Result<> copied = co_await copy_table(old, place);
            if (!copied) {
                (void)co_await allocator_.free(place, cluster_size());
                co_return copied;
            }
        }
        // A write-back takes L1 changes under the mutex, after its mark: the record may come first here.
        const MappingRecord record{MappingRecord::Kind::kL1, l1_index, place | kCopied, 0};
        if (!log_.append({&record, 1})) {
            (void)co_await allocator_.free(place, cluster_size());
            log_full = true;
            co_return Result<>();
        }
        l1_.set(l1_index, place | kCopied);
        overlap_.add(Structure::kActiveL2, place, cluster_size());
        if (old != 0) overlap_.remove(Structure::kActiveL2, old, cluster_size());
    }
    if (old != 0) free_later(old, cluster_size(), FreedBy::kOther);
    co_return Result<>();
}

/// A counted cluster of zeroes inside the file. Under mutex().
Task<Result<uint64_t>> Metadata::take_table() {
    if (spare_tables_.clusters == 0) {
        const uint64_t most = std::clamp<uint64_t>(kMaxSpareBytes / cluster_size(), 1, kMaxSpareTables);
        Result<HostRun> row = co_await allocator_.allocate_row(next_spare_tables_);
        if (!row && next_spare_tables_ > 1) row = co_await allocator_.allocate_row(1);
        if (!row) co_return std::unexpected(std::move(row).error());
        HostRun run = *row;
        next_spare_tables_ = std::min(next_spare_tables_ * 2, most);
        const uint64_t bytes = run.clusters * cluster_size();
        // No entry may name what lies beyond the end of the file, whatever a power cut leaves of it.
        const uint64_t end = run.offset + bytes;
        uint64_t from = run.offset;
        if (run.fresh) from = end > file_.size() ? end - kSector : end;
        Result<> zeroed = co_await file_.write_zeroes(from, end - from, "L2 table");
        if (!zeroed) {
            (void)co_await allocator_.free(run.offset, bytes);
            co_return std::unexpected(std::move(zeroed).error());
        }
        need_barrier();
        spare_tables_ = run;
    }
    const uint64_t place = spare_tables_.offset;
    spare_tables_.offset += cluster_size();
    spare_tables_.clusters--;
    co_return place;
}

/// Entries of a shared table have no COPIED flags, and what they name is counted for both tables already.
Task<Result<>> Metadata::copy_table(uint64_t from, uint64_t to) {
    Buffer table = Buffer::alloc(cluster_size());
    CO_CHECK(co_await file_.read(from, table.span(), "L2 table"));
    CO_CHECK(co_await file_.write(to, table.span(), "L2 table"));
    need_barrier();
    co_return Result<>();
}

Task<Result<Buffer>> Metadata::read_slice(uint64_t slice) {
    const uint64_t table = l2_table_offset(l1_.get(slice / slices_per_table()));
    Buffer bytes = Buffer::alloc(l2_.slice_bytes());
    CO_CHECK(co_await file_.read(table + (slice % slices_per_table()) * l2_.slice_bytes(), bytes.span(), "L2 table"));
    co_return std::move(bytes);
}

Task<Result<L2SliceCache::Pin>> Metadata::pin_slice(uint64_t slice) {
    const uint64_t l1_index = slice / slices_per_table();
    if (!in_session() || !owns_table(l1_index) || !bad_tables_.empty()) CO_CHECK(co_await own_l2_table(l1_index));
    L2SliceCache::Pin pin = l2_.pin(slice);
    if (pin) co_return std::move(pin);
    L2SliceCache::RoomWish wish(l2_);
    for (bool wrote_back = false;;) {
        const L2SliceCache::Ticket ticket = l2_.ticket(slice);
        CO_TRY(const Buffer bytes, co_await read_slice(slice));
        const auto inserted = l2_.insert_and_pin(slice, bytes.data(), ticket, pin);
        if (inserted == L2SliceCache::Inserted::kPinned) co_return std::move(pin);
        if (inserted == L2SliceCache::Inserted::kStale) continue;
        // Changed ones leave once they are in the file, pinned ones when their requests are done.
        if (std::exchange(wrote_back, !wrote_back)) {
            co_await wish.made();
        } else {
            CO_CHECK(co_await write_back());
        }
    }
}

}  // namespace gantry::block::qcow2
