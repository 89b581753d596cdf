// The partitions of a disk, as its MBR or GPT tells. Pure but for the reading, which the caller does; whatever stands
// in the tables is checked against the disk's size, and limited.

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace gantry::cli {

struct Partition {
    unsigned number = 0;            // as Linux counts: of an MBR 1 to 4 the primary ones, from 5 on the logical ones
    uint64_t offset = 0, size = 0;  // bytes
    std::string type;               // "Linux", or the number or GUID in the table
    std::string name;               // of a GPT; printable, UTF-8
};

struct PartitionTable {
    std::string kind;  // "MBR", "GPT"
    std::vector<Partition> partitions;
    std::string note;  // what is wrong with it and does not hinder; empty: nothing
};

/// Fills the span with the bytes of the disk from `offset` on; never asked beyond its end.
using DiskReader = std::function<Result<>(uint64_t offset, std::span<uint8_t> room)>;

/// The table of a disk of `size` bytes; sectors of 512 or 4096 bytes. Partitions that do not lie on the disk, or
/// overlap their own table, are left out, and `note` says so. kNotFound: there is no table; kCorrupt: there is one and
/// it contradicts itself; whatever the reader returns.
Result<PartitionTable> read_partition_table(const DiskReader& read, uint64_t size);

/// Partition `number`, or kNotFound with those there are; `disk` names it.
Result<Partition> find_partition(const PartitionTable& table, unsigned number, const std::string& disk);

/// The two readers behind it. Nothing: this is no such table.
Result<std::optional<PartitionTable>> read_gpt(const DiskReader& read, uint64_t size, uint32_t sector);
Result<std::optional<PartitionTable>> read_mbr(const DiskReader& read, uint64_t size, uint32_t sector);
/// An MBR that only says that there is a GPT has this type in one of its entries.
constexpr uint8_t kProtectiveType = 0xee;
enum class MbrKind : uint8_t { kNone, kProtective, kPlain };
/// What the first sector (512 bytes) of a disk of `size` bytes is.
MbrKind classify_mbr(std::span<const uint8_t> sector, uint64_t size, uint32_t sector_bytes);

}  // namespace gantry::cli
