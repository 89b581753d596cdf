// The table of internal snapshots (spec/qcow2.md section 7). Pure; no I/O.

#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/layout.h"
#include "runtime/error.h"

namespace gantry::block::qcow2 {

struct Snapshot {
    uint64_t l1_table_offset = 0;
    uint32_t l1_size = 0;
    uint32_t date_sec = 0, date_nsec = 0;
    uint64_t vm_clock_ns = 0;
    uint64_t vm_state_size = 0;
    std::optional<uint64_t> disk_size;  // absent: that of the image
    std::optional<int64_t> icount;
    std::vector<uint8_t> unknown_extra;  // kept when the table is rewritten
    std::string id, name;
    uint64_t stored_bytes = 0;  // of its entry in the file; an entry of another program may lack extra data
};

/// Reads `count` entries from the first bytes of the table. nullopt: `table` holds too few bytes and `complete` is
/// false. Errors: kCorrupt (extra data, or `complete` and the entries go on).
Result<std::optional<std::vector<Snapshot>>> parse_snapshot_table(std::span<const uint8_t> table, uint32_t count,
                                                                  bool complete, std::string_view node);

/// The table as bytes. Every entry gets the extra data of version 3; `disk_size`: of the snapshots that do not say
/// their own.
std::vector<uint8_t> encode_snapshot_table(std::span<const Snapshot> snapshots, uint64_t disk_size);

/// Bytes that encode_snapshot_table() makes of it.
uint64_t encoded_bytes(const Snapshot& snapshot);
/// Bytes of the table in the file.
uint64_t stored_bytes(std::span<const Snapshot> snapshots);

/// The id for a new snapshot: one more than the highest number in use.
std::string next_snapshot_id(std::span<const Snapshot> snapshots);

/// The snapshot with this id, else the first with this name; null when there is none.
const Snapshot* find_snapshot(const std::vector<Snapshot>& snapshots, std::string_view id_or_name);

}  // namespace gantry::block::qcow2
