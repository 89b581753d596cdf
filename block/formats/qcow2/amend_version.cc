// From version 2 to 3 and back (spec/qcow2.md section 16).

#include <unordered_set>

#include "block/formats/qcow2/amend_steps.h"
#include "block/formats/qcow2/refusal.h"
#include "block/formats/qcow2/tree_refcounts.h"

namespace gantry::block::qcow2 {

namespace {

/// Zero clusters of one L2 table become what version 2 can say.
struct Expansion {
    uint64_t paths = 1;             // L1 entries that point to the table: so often each of its clusters counts
    uint64_t guest_begin = 0;       // guest offset of its first cluster
    bool hides_backing = false;     // unallocated would show the backing file
    std::vector<uint64_t> dropped;  // places that lose their references once the table is stable
};

Task<Result<>> write_zero_cluster(Operation& op, uint64_t guest, uint64_t host) {
    const uint64_t cluster = op.geometry().cluster_size();
    if (!op.node().transforms_writes()) co_return co_await op.file().write_zeroes(host, cluster, "zero cluster");
    CO_TRY(Buffer zeroes, Buffer::try_alloc(cluster));
    std::ranges::fill(zeroes.span(), uint8_t{0});
    Request rq = Request::internal();
    const iovec iov = zeroes.iov();
    CO_CHECK(co_await op.node().encode_in_place(rq, guest, host, IoVec(iov)));
    co_return co_await op.file().write(host, zeroes.span(), "zero cluster");
}

/// The entry that takes the place of a zero one.
Task<Result<uint64_t>> expand_entry(Operation& op, Expansion& e, uint64_t entry, uint64_t guest) {
    const Geometry& g = op.geometry();
    CO_TRY(const Reference old, reference_of(g, entry));
    if (!e.hides_backing) {
        if (old.bytes != 0) e.dropped.push_back(old.offset);
        co_return 0;
    }
    if (old.bytes != 0) {
        CO_TRY(const uint64_t count, co_await op.refcounts().get(old.offset >> g.cluster_bits));
        if (count == e.paths) {  // nobody but this table has it, so its contents are nobody's
            CO_CHECK(co_await write_zero_cluster(op, guest, old.offset));
            co_return old.offset | (count == 1 ? kCopied : 0);
        }
        e.dropped.push_back(old.offset);
    }
    CO_TRY(const uint64_t place, co_await op.allocate(g.cluster_size()));
    if (e.paths > 1) {
        CO_CHECK(co_await op.refcounts().change(place >> g.cluster_bits, 1, static_cast<int64_t>(e.paths) - 1));
    }
    CO_CHECK(co_await write_zero_cluster(op, guest, place));
    co_return place | (e.paths == 1 ? kCopied : 0);
}

Task<Result<>> expand_table(Operation& op, TableWords& table, uint64_t offset, Expansion& e) {
    const Geometry& g = op.geometry();
    CO_CHECK(co_await table.load(op, offset));
    bool changed = false;
    for (uint64_t i = 0; i < table.entries(); i++) {
        const uint64_t entry = table.entry(i);
        if ((entry & kCompressed) || !(entry & kReadsAsZero)) continue;
        const uint64_t guest = e.guest_begin + (i << g.cluster_bits);
        CO_TRY(const uint64_t expanded, co_await expand_entry(op, e, entry, guest));
        table.set_entry(i, expanded);
        changed = true;
    }
    if (!changed) co_return Result<>();
    CO_CHECK(co_await op.stabilise());
    op.keep();
    CO_CHECK(co_await table.save(op, offset));
    CO_CHECK(co_await op.file().flush());
    for (const uint64_t place : e.dropped) {
        for (uint64_t i = 0; i < e.paths; i++) CO_CHECK(co_await op.release(place, g.cluster_size()));
    }
    co_return co_await op.finish(op.metadata().options().pass_discard_other);
}

Task<Result<>> expand_tree(Operation& op, std::span<const uint64_t> l1, bool hides_backing,
                           std::unordered_set<uint64_t>& seen, const Progress& progress) {
    CO_TRY(TableWords table, TableWords::create(op.geometry()));
    for (size_t i = 0; i < l1.size(); i++) {
        if (progress && i % 16 == 0 && !progress(i, l1.size())) {
            co_return fail(ErrorKind::kCancelled, "Operation canceled");
        }
        const uint64_t offset = l2_table_offset(l1[i]);
        if (offset == 0 || !seen.insert(offset).second) continue;
        Expansion e;
        CO_TRY(e.paths, co_await op.refcounts().get(offset >> op.geometry().cluster_bits));
        e.guest_begin = static_cast<uint64_t>(i) << op.geometry().l1_shift();
        e.hides_backing = hides_backing;
        if (e.paths == 0) {
            co_return refuse_corrupt(op.file().node_name(), "Failed to turn zero into data clusters",
                                     "the L2 table at {:#x} has no reference counted", offset);
        }
        CO_CHECK(co_await expand_table(op, table, offset, e));
    }
    co_return Result<>();
}

Task<Result<>> expand_all(Operation& op, const Progress& progress) {
    const bool hides_backing = op.node().backing() || !op.image().backing_name.empty();
    std::unordered_set<uint64_t> seen;
    CO_TRY(const std::vector<uint64_t> l1, co_await op.read_l1(op.header().l1_table_offset, op.header().l1_size));
    CO_CHECK(co_await expand_tree(op, l1, hides_backing, seen, progress));
    const std::vector<Snapshot> snapshots = op.image().snapshots;
    for (const Snapshot& s : snapshots) {
        CO_TRY(const std::vector<uint64_t> other, co_await op.read_l1(s.l1_table_offset, s.l1_size));
        CO_CHECK(co_await expand_tree(op, other, hides_backing, seen, progress));
    }
    co_return Result<>();
}

/// Writes the header as it is in memory now, or puts `old` back.
Task<Result<>> write_version(Operation& op, Header old) {
    Result<> written = co_await op.metadata().write_header();
    if (!written) op.header() = std::move(old);
    op.image().geometry = op.header().geometry();
    co_return written;
}

}  // namespace

Task<Result<>> upgrade_version(Operation& op) {
    CO_CHECK(co_await complete_snapshots(op));
    const Header old = op.header();
    Header& h = op.header();
    h.version = 3;
    h.header_length = kHeaderBytesKnown;
    h.incompatible_features = h.compatible_features = h.autoclear_features = 0;
    co_return co_await write_version(op, old);
}

Result<> check_downgrade(const Image& image, std::string_view node, uint32_t refcount_order) {
    const Header& h = image.header;
    const auto no = [&](std::string_view sentence, std::string_view detail) {
        return refuse(ErrorKind::kUnsupported, node, sentence, "{}", detail);
    };
    if (h.has_incompatible(kIncompatDataFile)) {
        return no("Cannot downgrade an image with a data file", "version 2 knows no data files");
    }
    if (refcount_order != 4) return no("compat=0.10 requires refcount_bits=16", "change refcount_bits too");
    for (const Snapshot& s : image.snapshots) {
        if (s.vm_state_size == 0 && s.disk_size.value_or(h.size) == h.size) continue;
        return no("Internal snapshots prevent downgrade of image",
                  fmt::format("snapshot '{}' has a disk size of its own or the state of a machine", s.name));
    }
    const uint64_t left = h.incompatible_features & ~kIncompatDirty;
    if (left != 0) {
        return no(fmt::format("Cannot downgrade an image with incompatible features {:#x} set", left),
                  "version 2 has no room for them");
    }
    if (!image.bitmaps.empty()) {
        return no("Cannot downgrade an image with persistent bitmaps",
                  fmt::format("version 2 cannot keep '{}'; remove it first", image.bitmaps.front().name));
    }
    return {};
}

Task<Result<>> downgrade_version(Operation& op, Progress progress) {
    CO_CHECK(check_downgrade(op.image(), op.file().node_name(), op.header().refcount_order));
    Result<> expanded = co_await expand_all(op, progress);
    // Entries changed behind the cache, also when it stopped half-way.
    CO_TRY(const std::vector<uint64_t> l1, co_await op.read_l1(op.header().l1_table_offset, op.header().l1_size));
    op.publish_mapping(l1);
    if (!expanded) {
        co_return std::unexpected(std::move(expanded).error().context("Failed to turn zero into data clusters"));
    }
    const Header old = op.header();
    Header& h = op.header();
    h.version = 2;
    h.header_length = kHeaderBytesV2;
    h.incompatible_features = h.compatible_features = h.autoclear_features = 0;
    h.unknown_fields.clear();
    op.metadata().options().lazy_refcounts = false;
    co_return co_await write_version(op, old);
}

}  // namespace gantry::block::qcow2
