// Taking mappings off the end of a disk, and free space off the end of a file.

#include <algorithm>

#include "block/formats/qcow2/amend_steps.h"
#include "block/formats/qcow2/resize_steps.h"
#include "block/formats/qcow2/tree_refcounts.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

/// The L2 table that lies on both sides of the cut.
struct Border {
    uint64_t index = 0;  // in L1
    uint64_t first = 0;  // entry in the table that goes, and all after it
    std::vector<Reference> lost;
    uint64_t old_table = 0;  // 0: it stays as it is
};

/// Makes the part of the border table that stays a table of its own.
Task<Result<>> split_border(Operation& op, std::vector<uint64_t>& l1, Border& border) {
    const uint64_t offset = l2_table_offset(l1[border.index]);
    if (offset == 0) co_return Result<>();
    CO_TRY(TableWords table, TableWords::create(op.geometry()));
    CO_CHECK(co_await table.load(op, offset));
    bool used = false, kept = false;
    for (uint64_t i = 0; i < table.entries(); i++) {
        const bool set = table.entry(i) != 0 || table.bitmap(i) != 0;
        if (i < border.first) {
            kept |= set;
            continue;
        }
        used |= set;
    }
    if (!used) co_return Result<>();
    CO_TRY(border.lost, table.references(op.geometry(), border.first, table.entries()));
    border.old_table = offset;
    l1[border.index] = 0;
    if (!kept) co_return Result<>();
    for (uint64_t i = border.first; i < table.entries(); i++) {
        table.set_entry(i, 0);
        table.set_bitmap(i, 0);
    }
    CO_TRY(const uint64_t place, co_await op.allocate(op.geometry().cluster_size()));
    CO_CHECK(co_await op.file().write(place, table.bytes(), "L2 table"));
    l1[border.index] = place | kCopied;
    co_return Result<>();
}

}  // namespace

Task<Result<>> cut_mappings(Operation& op, uint64_t cut, uint64_t l1_entries, uint64_t disk_size) {
    const Geometry& g = op.geometry();
    const Header& h = op.header();
    CO_TRY(const std::vector<uint64_t> old_l1, co_await op.read_l1(h.l1_table_offset, h.l1_size));
    std::vector<uint64_t> l1 = old_l1;
    l1.resize(std::max<uint64_t>(1, l1_entries));  // a table of no entries would own no cluster

    const uint64_t cut_cluster = (cut >> g.cluster_bits) + (g.offset_in_cluster(cut) != 0);
    Border border;
    border.index = cut_cluster >> g.l2_bits();
    border.first = cut_cluster & ((uint64_t{1} << g.l2_bits()) - 1);
    const uint64_t first_lost = border.index + (border.first != 0);  // L1 entry that goes as a whole, and all after it
    for (uint64_t i = first_lost; i < l1.size(); i++) l1[i] = 0;
    if (border.first != 0 && border.index < l1.size()) CO_CHECK(co_await split_border(op, l1, border));
    if (l1 == old_l1 && disk_size == h.size) co_return Result<>();

    CO_TRY(const uint64_t place, co_await op.allocate(l1.size() * 8));
    CO_CHECK(co_await op.write_l1(place, l1));
    CO_CHECK(co_await op.stabilise());
    const uint64_t old_place = h.l1_table_offset;
    CO_CHECK(co_await op.switch_mapping(disk_size, l1.size(), place));
    op.publish_mapping(l1);

    for (const Reference& lost : border.lost) CO_CHECK(co_await op.release(lost.offset, lost.bytes));
    if (border.old_table != 0) CO_CHECK(co_await op.release(border.old_table, g.cluster_size()));
    std::vector<uint64_t> gone;
    for (uint64_t i = first_lost; i < old_l1.size(); i++) gone.push_back(old_l1[i]);
    CO_CHECK(co_await release_tree(op, gone, true));
    CO_CHECK(co_await op.release(old_place, old_l1.size() * 8));
    co_return co_await op.finish(true);
}

Task<Result<>> cut_file(Operation& op) {
    CO_CHECK(co_await lower_refcounts(op));
    CO_TRY(const uint64_t clusters, co_await op.refcounts().end_of_use());
    const uint64_t end = clusters << op.geometry().cluster_bits;
    if (end >= op.file().size()) co_return Result<>();
    Result<> cut = co_await op.file().truncate(end);
    if (!cut) log::debug("node '{}': its file stays as long as it is: {}", op.node().name(), cut.error().message());
    op.metadata().file_was_cut();
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
