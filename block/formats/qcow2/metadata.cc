#include "block/formats/qcow2/metadata.h"

#include <algorithm>
#include <array>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/header_writer.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kManyFreedBytes = uint64_t{64} << 20;
constexpr uint64_t kManyDirtyBytes = uint64_t{1} << 20;
constexpr uint64_t kFirstSnapshotRead = 64 * 1024;
constexpr uint64_t kFeaturesAt = 72;

/// Length of a snapshot table with `count` entries; nullopt: `table` does not hold all of it.
std::optional<uint64_t> snapshot_table_bytes(std::span<const uint8_t> table, uint32_t count) {
    uint64_t at = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (table.size() < at + 40) return std::nullopt;
        const uint8_t* entry = table.data() + at;
        at += 40 + uint64_t{load_be32(entry + 36)} + load_be16(entry + 12) + load_be16(entry + 14);
        at = (at + 7) & ~uint64_t{7};
        if (table.size() < at) return std::nullopt;
    }
    return at;
}

}  // namespace

Metadata::Metadata(Host& host, ImageFile& file, Image& image, L2SliceCache& l2, WriteOptions options)
    : host_(host),
      file_(file),
      image_(image),
      l2_(l2),
      options_(options),
      overlap_(image.geometry, options.overlap),
      refcounts_(file, image.header, image.caches.refcount_bytes, &overlap_),
      allocator_(refcounts_, file, image.geometry.cluster_bits) {}

Metadata::~Metadata() = default;

// ---- Loading ----

Task<Result<>> Metadata::load() {
    overlap_.add(Structure::kMainHeader, 0, cluster_size());
    CO_CHECK(co_await refcounts_.load());
    CO_CHECK(co_await mark_snapshots());
    if (const auto& bitmaps = image_.extensions.bitmaps) {
        overlap_.add(Structure::kBitmapDirectory, bitmaps->directory_offset, bitmaps->directory_size);
    }
    CO_CHECK(co_await load_l1());
    mark_active_tables();
    co_return Result<>();
}

Task<Result<>> Metadata::load_l1() {
    const Header& h = image_.header;
    const uint64_t size = file_.size();
    const uint64_t there = h.l1_table_offset >= size ? 0 : (size - h.l1_table_offset + 7) / 8;
    const uint64_t entries = std::min<uint64_t>(h.l1_size, there);
    CO_TRY(Buffer bytes, Buffer::try_alloc(entries * 8));
    CO_CHECK(co_await file_.read(h.l1_table_offset, bytes.span(), "L1 table"));
    std::vector<uint64_t> words(entries);
    for (uint64_t i = 0; i < entries; i++) words[i] = load_be64(bytes.data() + i * 8);
    l1_.assign(words, h.l1_size);
    co_return Result<>();
}

/// The active L1 and its tables; a table that something else lies on already is a bad one.
void Metadata::mark_active_tables() {
    marked_l1_ = image_.header.l1_table_offset;
    const StructureSet below = overlap_.touched(marked_l1_, l1_.size() * 8);
    l1_overlaps_ = below != 0 ? std::optional(first_of(below)) : std::nullopt;
    overlap_.add(Structure::kActiveL1, marked_l1_, l1_.size() * 8);
    bad_tables_.clear();
    const uint64_t size = file_.size();
    for (uint64_t i = 0; i < l1_.size(); i++) {
        const uint64_t table = l2_table_offset(l1_.get(i));
        if (table == 0) continue;
        if (image_.geometry.offset_in_cluster(table) != 0 || table > size) {
            bad_tables_.insert(table);
            continue;
        }
        StructureSet others = overlap_.touched(table, cluster_size());
        // A shared one is copied before it is changed, so that others have it, too, does no harm.
        if (!(l1_.get(i) & kCopied)) others &= ~bit_of(Structure::kActiveL2) & ~bit_of(Structure::kInactiveL2);
        if (others != 0) bad_tables_.insert(table);
        overlap_.add(Structure::kActiveL2, table, cluster_size());
    }
}

Result<> Metadata::check_l1_place() const {
    if (!l1_overlaps_) return {};
    return refuse_corrupt(
        file_.node_name(),
        fmt::format("Preventing invalid write on active L1 table (overlaps with {})", structure_name(*l1_overlaps_)),
        "the table of {} entries is at {:#x}", l1_.size(), marked_l1_);
}

void Metadata::unmark_active_tables() {
    overlap_.remove(Structure::kActiveL1, marked_l1_, l1_.size() * 8);
    for (uint64_t i = 0; i < l1_.size(); i++) {
        const uint64_t table = l2_table_offset(l1_.get(i));
        if (table != 0) overlap_.remove(Structure::kActiveL2, table, cluster_size());
    }
}

Task<Result<>> Metadata::mark_snapshots() {
    const Header& h = image_.header;
    if (h.nb_snapshots == 0) co_return Result<>();
    const uint64_t size = file_.size();
    const uint64_t there = h.snapshots_offset >= size ? 0 : std::min(kMaxSnapshotTableBytes, size - h.snapshots_offset);
    for (uint64_t bytes = std::min(there, kFirstSnapshotRead);; bytes = std::min(there, bytes * 4)) {
        CO_TRY(Buffer table, Buffer::try_alloc(bytes));
        CO_CHECK(co_await file_.read(h.snapshots_offset, table.span(), "snapshot table"));
        const auto length = snapshot_table_bytes(table.span(), h.nb_snapshots);
        if (!length && bytes < there) continue;
        overlap_.add(Structure::kSnapshotTable, h.snapshots_offset, length.value_or(bytes));
        break;
    }
    for (const Snapshot& s : image_.snapshots) {
        const uint64_t bytes = uint64_t{s.l1_size} * 8;
        if (image_.geometry.offset_in_cluster(s.l1_table_offset) != 0 || bytes > kMaxL1Bytes) continue;
        overlap_.add(Structure::kInactiveL1, s.l1_table_offset, bytes);
        if (overlap_.checked() & bit_of(Structure::kInactiveL2)) {
            CO_CHECK(co_await mark_inactive_tables(s.l1_table_offset, s.l1_size));
        }
    }
    co_return Result<>();
}

Task<Result<>> Metadata::mark_inactive_tables(uint64_t l1_offset, uint64_t entries) {
    const uint64_t size = file_.size();
    if (l1_offset >= size) co_return Result<>();
    entries = std::min(entries, (size - l1_offset) / 8);
    CO_TRY(Buffer bytes, Buffer::try_alloc(entries * 8));
    CO_CHECK(co_await file_.read(l1_offset, bytes.span(), "L1 table of a snapshot"));
    for (uint64_t i = 0; i < entries; i++) {
        const uint64_t table = l2_table_offset(load_be64(bytes.data() + i * 8));
        if (table == 0 || table >= size || image_.geometry.offset_in_cluster(table) != 0) continue;
        overlap_.add(Structure::kInactiveL2, table, cluster_size());
    }
    co_return Result<>();
}

Task<Result<>> Metadata::reload_mapping() {
    l2_.drop_all();
    unmark_active_tables();
    Result<> loaded = co_await load_l1();
    mark_active_tables();
    co_return loaded;
}

void Metadata::replace_mapping(std::span<const uint64_t> l1) {
    l2_.drop_all();
    unmark_active_tables();
    l1_.assign(l1, image_.header.l1_size);
    mark_active_tables();
}

// ---- Places ----

Task<Result<HostRun>> Metadata::allocate(uint64_t clusters, uint64_t near) {
    if (!in_session()) CO_CHECK(co_await begin_session());
    HostRun run = allocator_.take(clusters, near);
    for (bool emptied = false; run.clusters == 0;) {
        Result<> refilled;
        {
            auto guard = co_await mutex_.lock();
            run = allocator_.take(clusters, near);  // who held the mutex may have refilled for all
            if (run.clusters != 0) break;
            refilled = co_await allocator_.refill(clusters);
            if (refilled) run = allocator_.take(clusters, near);
        }
        if (refilled) continue;
        // Free by its count, but known to hold metadata: the counts are wrong.
        if (refilled.error().kind() == ErrorKind::kCorrupt) {
            co_return std::unexpected(co_await corrupt(refilled.error().message(), 0));
        }
        if (refilled.error().kind() != ErrorKind::kNoSpace || emptied) {
            co_return std::unexpected(std::move(refilled).error());
        }
        // Places that wait to be free again may be all there is.
        emptied = true;
        CO_CHECK(co_await flush());
    }
    co_return run;
}

void Metadata::free_later(uint64_t offset, uint64_t bytes, FreedBy by) {
    if (bytes == 0 || host_.data_file()) return;
    host_.retire_places([this, freed = Freed{offset, bytes, by}] { add_freed(freed); });
}

void Metadata::add_freed(Freed freed) {
    const std::lock_guard lock(pending_mutex_);
    freed_.push_back(freed);
    freed_bytes_ += freed.bytes;
}

bool Metadata::many_freed() const {
    const std::lock_guard lock(pending_mutex_);
    return freed_bytes_ >= kManyFreedBytes;
}

bool Metadata::has_freed() const {
    const std::lock_guard lock(pending_mutex_);
    return !freed_.empty();
}

bool Metadata::wants_write_back() const {
    const uint64_t dirty = l2_.dirty_count();
    if (dirty * 2 >= l2_.slots() && dirty * l2_.slice_bytes() >= kManyDirtyBytes) return true;
    return log_.half_full() || many_freed();
}

Task<Error> Metadata::corrupt(std::string message, uint64_t offset) {
    co_return co_await host_.corrupt_on_write(std::move(message), offset, cluster_size());
}

// ---- Header ----

Task<Result<>> Metadata::switch_header(uint64_t offset, std::span<const uint8_t> after) {
    std::vector<uint8_t> before(after.size());
    CO_CHECK(co_await file_.read(offset, before, "qcow2 header"));
    Result<> done = co_await file_.write(offset, after, "qcow2 header");
    if (done) done = co_await file_.flush();
    if (done) co_return done;
    Result<> undone = co_await file_.write(offset, before, "qcow2 header");
    if (undone) undone = co_await file_.flush();
    if (!undone) host_.header_lost(undone.error());
    co_return done;
}

Task<Result<>> Metadata::write_header() {
    CO_TRY(const std::vector<uint8_t> after, encode_header_cluster(image_));
    std::vector<uint8_t> before(after.size());
    CO_CHECK(co_await file_.read(0, before, "qcow2 header"));
    // Only what differs, in one write: mostly one sector, which is old or new after a power cut.
    const auto [from, unused] = std::ranges::mismatch(before, after);
    if (from != before.end()) {
        size_t end = after.size();
        while (before[end - 1] == after[end - 1]) end--;
        const size_t begin = static_cast<size_t>(from - before.begin());
        CO_CHECK(co_await switch_header(begin, std::span(after).subspan(begin, end - begin)));
    } else {
        CO_CHECK(co_await file_.flush());
    }
    co_return take_header_cluster(image_, after, file_.node_name());
}

Task<Result<>> Metadata::write_features() {
    const Header& h = image_.header;
    if (h.version < 3) co_return Result<>();
    std::array<uint8_t, 24> words;
    store_be64(words.data(), h.incompatible_features);
    store_be64(words.data() + 8, h.compatible_features);
    store_be64(words.data() + 16, h.autoclear_features);
    co_return co_await switch_header(kFeaturesAt, words);
}

}  // namespace gantry::block::qcow2
