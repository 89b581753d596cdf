#include "block/formats/qcow2/snapshot_table.h"

#include <algorithm>
#include <charconv>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kFixedBytes = 40;
constexpr size_t kKnownExtraBytes = 24;

std::string text(std::span<const uint8_t> bytes) { return std::string(bytes.begin(), bytes.end()); }

}  // namespace

Result<std::optional<std::vector<Snapshot>>> parse_snapshot_table(std::span<const uint8_t> table, uint32_t count,
                                                                  bool complete, std::string_view node) {
    std::vector<Snapshot> snapshots;
    size_t at = 0;
    for (uint32_t i = 0; i < count; i++) {
        const auto missing = [&]() -> Result<std::optional<std::vector<Snapshot>>> {
            if (!complete) return std::nullopt;
            return refuse_corrupt(node, "Failed to read snapshot table",
                                  "entry {} of {} at byte {} of the table does not fit into its {} bytes", i, count, at,
                                  table.size());
        };
        if (at > table.size() || table.size() - at < kFixedBytes) return missing();
        const uint8_t* p = table.data() + at;
        Snapshot s;
        s.l1_table_offset = load_be64(p);
        s.l1_size = load_be32(p + 8);
        const size_t id_bytes = load_be16(p + 12);
        const size_t name_bytes = load_be16(p + 14);
        s.date_sec = load_be32(p + 16);
        s.date_nsec = load_be32(p + 20);
        s.vm_clock_ns = load_be64(p + 24);
        s.vm_state_size = load_be32(p + 32);
        const size_t extra_bytes = load_be32(p + 36);
        if (extra_bytes > kMaxSnapshotExtraBytes) {
            return refuse_corrupt(node, fmt::format("Too much extra metadata in snapshot table entry {}", i),
                                  "it announces {} bytes at byte {} of the table, more than {}", extra_bytes, at + 36,
                                  kMaxSnapshotExtraBytes);
        }
        const size_t bytes = kFixedBytes + extra_bytes + id_bytes + name_bytes;
        if (table.size() - at < bytes) return missing();
        const std::span<const uint8_t> extra = table.subspan(at + kFixedBytes, extra_bytes);
        if (extra_bytes >= 8) s.vm_state_size = load_be64(extra.data());
        if (extra_bytes >= 16) s.disk_size = load_be64(extra.data() + 8);
        if (extra_bytes >= 24) {
            const auto icount = static_cast<int64_t>(load_be64(extra.data() + 16));
            if (icount != -1) s.icount = icount;
        }
        if (extra_bytes > kKnownExtraBytes) s.unknown_extra.assign(extra.begin() + kKnownExtraBytes, extra.end());
        s.id = text(table.subspan(at + kFixedBytes + extra_bytes, id_bytes));
        s.name = text(table.subspan(at + kFixedBytes + extra_bytes + id_bytes, name_bytes));
        s.stored_bytes = (bytes + 7) & ~size_t{7};
        at += s.stored_bytes;
        snapshots.push_back(std::move(s));
    }
    return snapshots;
}

uint64_t encoded_bytes(const Snapshot& s) {
    return (kFixedBytes + kKnownExtraBytes + s.unknown_extra.size() + s.id.size() + s.name.size() + 7) & ~size_t{7};
}

uint64_t stored_bytes(std::span<const Snapshot> snapshots) {
    uint64_t bytes = 0;
    for (const Snapshot& s : snapshots) bytes += s.stored_bytes;
    return bytes;
}

std::vector<uint8_t> encode_snapshot_table(std::span<const Snapshot> snapshots, uint64_t disk_size) {
    std::vector<uint8_t> table;
    for (const Snapshot& s : snapshots) {
        const size_t extra_bytes = kKnownExtraBytes + s.unknown_extra.size();
        const size_t at = table.size();
        table.resize(at + encoded_bytes(s));
        uint8_t* p = table.data() + at;
        store_be64(p, s.l1_table_offset);
        store_be32(p + 8, s.l1_size);
        store_be16(p + 12, static_cast<uint16_t>(s.id.size()));
        store_be16(p + 14, static_cast<uint16_t>(s.name.size()));
        store_be32(p + 16, s.date_sec);
        store_be32(p + 20, s.date_nsec);
        store_be64(p + 24, s.vm_clock_ns);
        store_be32(p + 32, s.vm_state_size > UINT32_MAX ? 0 : static_cast<uint32_t>(s.vm_state_size));
        store_be32(p + 36, static_cast<uint32_t>(extra_bytes));
        p += kFixedBytes;
        store_be64(p, s.vm_state_size);
        store_be64(p + 8, s.disk_size.value_or(disk_size));
        store_be64(p + 16, static_cast<uint64_t>(s.icount.value_or(-1)));
        p = std::ranges::copy(s.unknown_extra, p + kKnownExtraBytes).out;
        p = std::ranges::copy(s.id, p).out;
        std::ranges::copy(s.name, p);
    }
    return table;
}

std::string next_snapshot_id(std::span<const Snapshot> snapshots) {
    uint64_t highest = 0;
    for (const Snapshot& s : snapshots) {
        uint64_t number = 0;
        std::from_chars(s.id.data(), s.id.data() + s.id.size(), number);
        if (number != UINT64_MAX) highest = std::max(highest, number);
    }
    return std::to_string(highest + 1);
}

const Snapshot* find_snapshot(const std::vector<Snapshot>& snapshots, std::string_view id_or_name) {
    for (const Snapshot& s : snapshots) {
        if (s.id == id_or_name) return &s;
    }
    for (const Snapshot& s : snapshots) {
        if (s.name == id_or_name) return &s;
    }
    return nullptr;
}

}  // namespace gantry::block::qcow2
