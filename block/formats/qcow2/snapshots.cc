// Internal snapshots: create, apply, delete (spec/qcow2.md section 7).

#include <algorithm>

#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/refusal.h"
#include "block/formats/qcow2/tree_refcounts.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kMaxTextBytes = 65535;  // of an id or a name: 16 bits on disk

Result<> check_no_data_file(const Geometry& geometry, std::string_view node, std::string_view sentence) {
    if (!geometry.external_data) return {};
    return refuse(ErrorKind::kUnsupported, node, sentence, "internal snapshots do not go with an external data file");
}

/// Writes the table at a new place; 0 when there is nothing to write.
Task<Result<uint64_t>> write_table(Operation& op, const std::vector<Snapshot>& snapshots) {
    const std::vector<uint8_t> bytes = encode_snapshot_table(snapshots, op.header().size);
    if (bytes.empty()) co_return 0;
    if (bytes.size() > kMaxSnapshotTableBytes) {
        co_return refuse(ErrorKind::kTooLarge, op.file().node_name(), "Snapshot table is too big",
                         "{} snapshots need {} bytes, at most {}", snapshots.size(), bytes.size(),
                         kMaxSnapshotTableBytes);
    }
    CO_TRY(const uint64_t offset, co_await op.allocate(bytes.size()));
    CO_CHECK(co_await op.write_padded(offset, bytes, "snapshot table"));
    co_return offset;
}

/// What the header says now is in the file; then `snapshots` is. The old table is released.
Task<Result<>> replace_table(Operation& op, std::vector<Snapshot> snapshots) {
    const uint64_t old_offset = op.header().snapshots_offset;
    const uint64_t old_bytes = stored_bytes(op.image().snapshots);
    CO_TRY(const uint64_t offset, co_await write_table(op, snapshots));
    CO_CHECK(co_await op.stabilise());
    CO_CHECK(co_await op.switch_snapshots(std::move(snapshots), offset));
    if (old_bytes != 0) CO_CHECK(co_await op.release(old_offset, old_bytes));
    co_return Result<>();
}

/// The active L1 table as the file has it; the L2 tables below and itself get the right flags, in the file and in
/// memory.
Task<Result<>> rebuild_active(Operation& op, std::vector<uint64_t> l1, Copied how) {
    Result<bool> changed = co_await rebuild_copied(op, l1, how);
    Result<> written;
    if (changed && *changed) written = co_await op.write_l1(op.header().l1_table_offset, l1);
    // Also after a failure: flags that are clear cost a copy, flags that are set wrongly cost a snapshot.
    if (!changed || !written) {
        for (uint64_t& word : l1) word &= ~kCopied;
    }
    op.publish_mapping(l1);
    if (!changed) co_return std::unexpected(std::move(changed).error());
    co_return written;
}

/// A new snapshot and its copy of the L1 table; everything but the header.
Task<Result<>> create_steps(Operation& op, Snapshot snapshot) {
    const Header& h = op.header();
    CO_TRY(std::vector<uint64_t> l1, co_await op.read_l1(h.l1_table_offset, h.l1_size));
    std::vector<uint64_t> copy = l1;
    copy.resize(std::max<size_t>(1, l1.size()));  // a table of no entries would own no cluster
    CO_TRY(snapshot.l1_table_offset, co_await op.allocate(copy.size() * 8));
    snapshot.l1_size = static_cast<uint32_t>(copy.size());
    for (uint64_t& word : copy) word &= ~kCopied;
    CO_CHECK(co_await op.write_l1(snapshot.l1_table_offset, copy));

    std::vector<Snapshot> snapshots = op.image().snapshots;
    snapshots.push_back(snapshot);
    CO_TRY(const uint64_t table, co_await write_table(op, snapshots));
    CO_CHECK(co_await reference_tree(op, l1));
    // From here on what is counted twice may not be written in place, whatever becomes of the rest.
    Result<> done = co_await rebuild_active(op, l1, Copied::kNowhere);
    if (done) done = co_await op.stabilise();
    const uint64_t old_offset = h.snapshots_offset;
    const uint64_t old_bytes = stored_bytes(op.image().snapshots);
    if (done) done = co_await op.switch_snapshots(std::move(snapshots), table);
    if (!done) {
        if (op.header_lost()) co_return done;
        // The snapshot does not exist: back to one count. The flags are found again by count.
        CO_CHECK(co_await release_tree(op, l1, false));
        CO_CHECK(co_await op.finish(false));
        for (uint64_t& word : l1) word &= ~kCopied;  // as the file has it
        (void)co_await rebuild_active(op, l1, Copied::kByCount);
        co_return done;
    }
    OverlapMap& overlap = op.metadata().overlap();
    overlap.add(Structure::kInactiveL1, snapshot.l1_table_offset, copy.size() * 8);
    mark_tables(overlap, Structure::kInactiveL2, l1, op.geometry().cluster_size(), true);
    if (old_bytes != 0) CO_CHECK(co_await op.release(old_offset, old_bytes));
    co_return co_await op.finish(op.metadata().options().pass_discard_snapshot);
}

/// The snapshot's tree becomes the active one.
Task<Result<>> apply_steps(Operation& op, const Snapshot& snapshot) {
    const Geometry& g = op.geometry();
    const Header& h = op.header();
    const uint64_t disk_size = snapshot.disk_size.value_or(h.size);
    const uint64_t entries = std::max<uint64_t>({1, snapshot.l1_size, g.l1_entries_for(disk_size)});
    CO_CHECK(check_l1(g, snapshot.l1_table_offset, entries, disk_size, "Snapshot", op.file().node_name()));
    CO_TRY(std::vector<uint64_t> l1, co_await op.read_l1(snapshot.l1_table_offset, snapshot.l1_size));
    l1.resize(entries);
    CO_TRY(std::vector<uint64_t> old_l1, co_await op.read_l1(h.l1_table_offset, h.l1_size));
    CO_TRY(const uint64_t offset, co_await op.allocate(l1.size() * 8));
    CO_CHECK(co_await reference_tree(op, l1));
    // Everything has two references now, the snapshot's and the active one. The tables are not active yet, so nobody
    // minds that they are changed.
    Result<bool> flags = co_await rebuild_copied(op, l1, Copied::kNowhere);
    Result<> done;
    if (!flags) done = std::unexpected(std::move(flags).error());
    if (done) done = co_await op.write_l1(offset, l1);
    if (done) done = co_await op.stabilise();
    const uint64_t old_offset = h.l1_table_offset;
    if (done) done = co_await op.switch_mapping(disk_size, l1.size(), offset);
    if (!done) {
        if (op.header_lost()) co_return done;
        CO_CHECK(co_await release_tree(op, l1, false));
        CO_CHECK(co_await op.finish(false));
        co_return done;
    }
    op.publish_mapping(l1);

    const bool discard = op.metadata().options().pass_discard_snapshot;
    CO_CHECK(co_await release_tree(op, old_l1, discard));
    CO_CHECK(co_await op.release(old_offset, old_l1.size() * 8));
    co_return co_await op.finish(discard);
}

/// The snapshot leaves the table, then its tree is let go.
Task<Result<>> delete_steps(Operation& op, size_t index) {
    const Snapshot snapshot = op.image().snapshots[index];
    CO_TRY(std::vector<uint64_t> l1, co_await op.read_l1(snapshot.l1_table_offset, snapshot.l1_size));
    std::vector<Snapshot> rest = op.image().snapshots;
    rest.erase(rest.begin() + static_cast<ptrdiff_t>(index));
    CO_CHECK(co_await replace_table(op, std::move(rest)));

    const Geometry& g = op.geometry();
    OverlapMap& overlap = op.metadata().overlap();
    const uint64_t l1_bytes = l1.size() * 8;
    overlap.remove(Structure::kInactiveL1, snapshot.l1_table_offset, l1_bytes);
    mark_tables(overlap, Structure::kInactiveL2, l1, g.cluster_size(), false);
    if (overlap.checked() & bit_of(Structure::kInactiveL2)) {
        for (const Snapshot& other : op.image().snapshots) {
            CO_TRY(const std::vector<uint64_t> kept, co_await op.read_l1(other.l1_table_offset, other.l1_size));
            mark_tables(overlap, Structure::kInactiveL2, kept, g.cluster_size(), true);
        }
    }
    const bool discard = op.metadata().options().pass_discard_snapshot;
    CO_CHECK(co_await release_tree(op, l1, discard));
    CO_CHECK(co_await op.release(snapshot.l1_table_offset, l1_bytes));
    CO_CHECK(co_await op.finish(discard));

    CO_TRY(std::vector<uint64_t> active, co_await op.read_l1(op.header().l1_table_offset, op.header().l1_size));
    CO_CHECK(co_await rebuild_active(op, std::move(active), Copied::kByCount));
    co_return co_await op.stabilise();
}

/// Ends an operation that failed half-way: rows that nothing refers to are free again.
Task<Result<>> conclude(Operation& op, Result<> done) {
    if (!done) co_await op.give_back();
    co_return done;
}

/// An absent argument reads as the reference prints it.
std::string_view or_null(const std::string& text) { return text.empty() ? std::string_view("null") : text; }

}  // namespace

Task<Result<>> complete_snapshots(Operation& op) {
    const std::vector<Snapshot>& snapshots = op.image().snapshots;
    if (std::ranges::all_of(snapshots, [](const Snapshot& s) { return s.disk_size.has_value(); })) co_return Result<>();
    CO_CHECK(co_await replace_table(op, snapshots));
    co_return co_await op.finish(false);
}

Task<Result<>> Qcow2Node::snapshot_create(SnapshotSpec spec) {
    CO_CHECK(check_writable());
    CO_CHECK(check_no_data_file(geometry(), name(), "Operation not supported"));
    if (spec.name.size() > kMaxTextBytes) {
        co_return fail(ErrorKind::kTooLarge, "Snapshot name is too long; it has {} bytes, at most {}", spec.name.size(),
                       kMaxTextBytes);
    }
    if (image_.snapshots.size() >= kMaxSnapshots) {
        co_return refuse(ErrorKind::kTooLarge, name(), "File too large", "the image has {} internal snapshots already",
                         image_.snapshots.size());
    }
    Snapshot snapshot;
    snapshot.id = next_snapshot_id(image_.snapshots);
    snapshot.name = std::move(spec.name);
    snapshot.date_sec = spec.date_sec;
    snapshot.date_nsec = spec.date_nsec;
    snapshot.vm_clock_ns = spec.vm_clock_ns;
    snapshot.disk_size = image_.header.size;
    Operation op(*this);
    CO_CHECK(co_await op.begin());
    Result<> done = co_await create_steps(op, std::move(snapshot));
    co_return co_await conclude(op, std::move(done));
}

Task<Result<>> Qcow2Node::snapshot_apply(std::string id_or_name) {
    CO_CHECK(check_writable());
    CO_CHECK(check_no_data_file(geometry(), name(), "Failed to load snapshot: Operation not supported"));
    if (!bitmaps().empty()) {
        co_return refuse(ErrorKind::kBusy, name(), "Device has active dirty bitmaps",
                         "'{}' is one; they would not know what changes", bitmaps().front()->name());
    }
    const Snapshot* found = find_snapshot(image_.snapshots, id_or_name);
    if (!found) {
        co_return refuse(ErrorKind::kNotFound, name(), "Failed to load snapshot: No such file or directory",
                         "none of its {} internal snapshots has the id or name '{}'", image_.snapshots.size(),
                         id_or_name);
    }
    const Snapshot snapshot = *found;
    Operation op(*this);
    CO_CHECK(co_await op.begin());
    Result<> done = co_await apply_steps(op, snapshot);
    done = co_await conclude(op, std::move(done));
    fit_caches();
    co_return done;
}

Task<Result<>> Qcow2Node::snapshot_delete(std::string id, std::string snapshot_name) {
    if (id.empty() && snapshot_name.empty()) co_return fail(ErrorKind::kInvalid, "Name or id must be provided");
    CO_CHECK(check_writable());
    CO_CHECK(check_no_data_file(geometry(), name(), "Failed to get a snapshot list: Operation not supported"));
    const auto found = std::ranges::find_if(image_.snapshots, [&](const Snapshot& s) {
        return (id.empty() || s.id == id) && (snapshot_name.empty() || s.name == snapshot_name);
    });
    if (found == image_.snapshots.end()) {
        co_return fail(ErrorKind::kNotFound, "Snapshot with id '{}' and name '{}' does not exist on device '{}'",
                       or_null(id), or_null(snapshot_name), name());
    }
    const auto index = static_cast<size_t>(found - image_.snapshots.begin());
    Operation op(*this);
    CO_CHECK(co_await op.begin());
    Result<> done = co_await delete_steps(op, index);
    co_return co_await conclude(op, std::move(done));
}

}  // namespace gantry::block::qcow2
