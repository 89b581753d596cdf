// The snapshot table as a root of references (spec/qcow2.md section 17).

#include <algorithm>
#include <map>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check_roots.h"
#include "runtime/buffer.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kPiece = uint64_t{1} << 20;

/// Length of the table on disk, from its entries; what parse_snapshot_table() has accepted once.
struct SnapshotScan {
    uint64_t bytes = 0;
    bool whole = false;
};

/// Appends an entry with the extra data that version 3 asks for.
void append_snapshot(const CheckRun& run, const uint8_t* entry, uint32_t extra, uint32_t names,
                     std::vector<uint8_t>& to) {
    const size_t begin = to.size();
    if (extra >= 16) {
        to.insert(to.end(), entry, entry + 40 + extra + names);
    } else {
        to.insert(to.end(), entry, entry + 40);
        to.resize(begin + 56);
        store_be32(&to[begin + 36], 16);
        store_be64(&to[begin + 40], extra >= 8 ? load_be64(entry + 40) : load_be32(entry + 32));
        store_be64(&to[begin + 48], run.image.header.size);  // what its absence meant
        to.insert(to.end(), entry + 40 + extra, entry + 40 + extra + names);
    }
    to.resize((to.size() + 7) & ~size_t{7});
}

SnapshotScan scan_snapshots(CheckRun& run, std::span<const uint8_t> table, Roots& roots) {
    std::map<std::pair<uint64_t, uint64_t>, uint64_t> places;
    std::vector<uint8_t> mended;
    bool incomplete = false;
    uint64_t at = 0;
    for (uint32_t i = 0; i < run.image.header.nb_snapshots; i++) {
        if (at > table.size() || table.size() - at < 40) return {};
        const uint8_t* p = table.data() + at;
        const uint64_t extra = load_be32(p + 36), id_bytes = load_be16(p + 12), name_bytes = load_be16(p + 14);
        const uint64_t bytes = 40 + extra + id_bytes + name_bytes;
        if (extra > kMaxSnapshotExtraBytes || table.size() - at < bytes) return {};
        ++places[{load_be64(p), load_be32(p + 8)}];
        at += (bytes + 7) & ~uint64_t{7};
        if (run.fix)
            append_snapshot(run, p, static_cast<uint32_t>(extra), static_cast<uint32_t>(id_bytes + name_bytes), mended);
        if (run.image.header.version >= 3 && extra < 16) {
            incomplete = true;
            run.corruption(1, "ERROR snapshot table entry {} is incomplete: {} bytes of extra data, 16 are needed", i,
                           extra);
        }
    }
    for (const auto& [place, times] : places) {
        const auto [offset, entries] = place;
        if (run.g.offset_in_cluster(offset) != 0 || (offset == 0 && entries != 0)) {
            run.corruption(times,
                           "ERROR snapshot l1_offset={:#x}: L1 table is not cluster aligned or in the header; snapshot "
                           "table entry corrupted",
                           offset);
            run.unseen = true;
        } else if (entries > kMaxL1Entries) {
            run.corruption(times, "ERROR snapshot l1_size={:#x}: L1 table is too large; snapshot table entry corrupted",
                           entries);
            run.unseen = true;
        } else {
            roots.tables.push_back({.place = {offset, entries * 8, true}, .active = false, .times = times});
        }
    }
    if (run.fix && incomplete) {
        run.mended_snapshots = std::move(mended);
        run.rebuild = true;
    }
    return {at, true};
}

}  // namespace

Task<Result<>> take_snapshots(CheckRun& run, Roots& roots) {
    const Header& h = run.image.header;
    if (h.nb_snapshots == 0) co_return Result<>();
    if (run.g.external_data) {
        run.corruption(1, "ERROR {} snapshots in image with data file: corrupted", h.nb_snapshots);
    }
    const uint64_t available = h.snapshots_offset >= run.file_bytes
                                   ? 0
                                   : std::min(kMaxSnapshotTableBytes, run.file_bytes - h.snapshots_offset);
    for (uint64_t bytes = std::min(available, kPiece);; bytes = std::min(available, bytes * 4)) {
        Buffer table = Buffer::alloc(bytes);
        CO_CHECK(co_await run.file.read(h.snapshots_offset, table.span(), "snapshot table"));
        const ImageCheck before = run.found;
        const SnapshotScan scan = scan_snapshots(run, table.span(), roots);
        if (scan.whole) {
            run.count(h.snapshots_offset, scan.bytes);
            run.snapshot_bytes = scan.bytes;
            roots.fixed.push_back({h.snapshots_offset, scan.bytes, false});
            co_return Result<>();
        }
        if (bytes < available) {
            run.found = before;
            continue;
        }
        run.corruption(1, "ERROR the snapshot table at {:#x} does not hold its {} entries", h.snapshots_offset,
                       h.nb_snapshots);
        run.unseen = true;
        co_return Result<>();
    }
}

}  // namespace gantry::block::qcow2
