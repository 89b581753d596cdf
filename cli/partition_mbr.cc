#include <algorithm>
#include <array>

#include "cli/partition_table.h"
#include "cli/readable.h"

namespace gantry::cli {

namespace {

constexpr size_t kSectorBytes = 512;  // of the table, whatever a sector is
constexpr size_t kEntries = 446, kEntryBytes = 16, kSignature = 510;
constexpr unsigned kMostLogical = 124;  // a chain longer than that is a circle, or nobody's disk

struct Entry {
    uint8_t status = 0, type = 0;
    uint32_t first = 0, count = 0;  // sectors
    bool used() const { return type != 0 && count != 0; }
    bool extended() const { return type == 0x05 || type == 0x0f || type == 0x85; }
};

uint32_t le32(std::span<const uint8_t> bytes, size_t at) {
    return static_cast<uint32_t>(bytes[at]) | static_cast<uint32_t>(bytes[at + 1]) << 8 |
           static_cast<uint32_t>(bytes[at + 2]) << 16 | static_cast<uint32_t>(bytes[at + 3]) << 24;
}

Entry entry_of(std::span<const uint8_t> sector, size_t index) {
    const size_t at = kEntries + index * kEntryBytes;
    return {sector[at], sector[at + 4], le32(sector, at + 8), le32(sector, at + 12)};
}

bool has_signature(std::span<const uint8_t> sector) {
    return sector[kSignature] == 0x55 && sector[kSignature + 1] == 0xaa;
}

std::string type_name(uint8_t type) {
    switch (type) {
        case 0x83:
            return "Linux";
        case 0x82:
            return "Linux swap";
        case 0x8e:
            return "Linux LVM";
        case 0xfd:
            return "Linux RAID";
        case 0x07:
            return "NTFS or exFAT";
        case 0x01:
        case 0x04:
        case 0x06:
        case 0x0b:
        case 0x0c:
        case 0x0e:
            return "FAT";
        case 0xef:
            return "EFI system";
        default:
            return fmt::format("type {:#04x}", type);
    }
}

/// A walk through the logical partitions.
struct Chain {
    const DiskReader& read;
    uint64_t size;
    uint32_t sector;
    PartitionTable& table;

    /// The partition that `entry` describes, counted from `base` sectors; false when it does not lie on the disk.
    bool add(const Entry& entry, uint64_t base, unsigned number) {
        const uint64_t offset = (base + entry.first) * sector, bytes = uint64_t{entry.count} * sector;
        if (entry.first == 0 || offset >= size || bytes > size - offset) {
            table.note = fmt::format("partition {} does not lie on the disk", number);
            return false;
        }
        table.partitions.push_back({number, offset, bytes, type_name(entry.type), ""});
        return true;
    }

    /// `extended`: the primary entry that holds them all.
    Result<> walk(const Entry& extended) {
        uint64_t at = extended.first;  // sectors
        std::vector<uint64_t> seen;
        for (unsigned number = 5; number < 5 + kMostLogical; ++number) {
            if (at * sector > size - std::min<uint64_t>(size, kSectorBytes) ||
                std::ranges::find(seen, at) != seen.end()) {
                table.note = "the chain of logical partitions leads nowhere";
                return {};
            }
            seen.push_back(at);
            std::array<uint8_t, kSectorBytes> bytes{};
            CHECK_OK(read(at * sector, bytes));
            if (!has_signature(bytes)) {
                table.note = "the chain of logical partitions breaks off";
                return {};
            }
            const Entry logical = entry_of(bytes, 0), next = entry_of(bytes, 1);
            if (logical.used() && !logical.extended()) {
                (void)add(logical, at, number);
            } else {
                --number;  // an empty record is no partition
            }
            if (!next.used() || !next.extended()) return {};
            at = uint64_t{extended.first} + next.first;
            if (seen.size() > kMostLogical) break;
        }
        table.note = fmt::format("more than {} logical partitions; the others are left out", kMostLogical);
        return {};
    }
};

}  // namespace

MbrKind classify_mbr(std::span<const uint8_t> sector, uint64_t size, uint32_t sector_bytes) {
    if (sector.size() < kSectorBytes || !has_signature(sector)) return MbrKind::kNone;
    bool used = false;
    for (size_t i = 0; i < 4; ++i) {
        const Entry entry = entry_of(sector, i);
        // Boot sectors of file systems end with the same two bytes; what they have here makes no sense.
        if (entry.status != 0 && entry.status != 0x80) return MbrKind::kNone;
        if (entry.type == kProtectiveType) return MbrKind::kProtective;
        if (!entry.used()) continue;
        if (entry.first == 0 || uint64_t{entry.first} * sector_bytes >= size) return MbrKind::kNone;
        used = true;
    }
    return used ? MbrKind::kPlain : MbrKind::kNone;
}

Result<std::optional<PartitionTable>> read_mbr(const DiskReader& read, uint64_t size, uint32_t sector) {
    if (size < kSectorBytes) return std::nullopt;
    std::array<uint8_t, kSectorBytes> bytes{};
    CHECK_OK(read(0, bytes));
    if (classify_mbr(bytes, size, sector) != MbrKind::kPlain) return std::nullopt;
    PartitionTable table;
    table.kind = "MBR";
    Chain chain{read, size, sector, table};
    std::optional<Entry> extended;
    for (unsigned i = 0; i < 4; ++i) {
        const Entry entry = entry_of(bytes, i);
        if (!entry.used()) continue;
        if (entry.extended()) {
            if (!extended) extended = entry;
        } else {
            (void)chain.add(entry, 0, i + 1);
        }
    }
    if (extended) CHECK_OK(chain.walk(*extended));
    return table;
}

Result<PartitionTable> read_partition_table(const DiskReader& read, uint64_t size) {
    if (size < kSectorBytes) return fail(ErrorKind::kNotFound, "a disk of {} bytes has no partitions", size);
    std::array<uint8_t, kSectorBytes> first{};
    CHECK_OK(read(0, first));
    const MbrKind kind = classify_mbr(first, size, kSectorBytes);
    std::string broken;
    // A GPT counts where the MBR refers to one, and where there is no MBR at all: it has been overwritten then.
    if (kind != MbrKind::kPlain) {
        for (const uint32_t sector : {512u, 4096u}) {
            auto table = read_gpt(read, size, sector);
            if (!table && table.error().kind() != ErrorKind::kCorrupt) return std::unexpected(std::move(table).error());
            if (table && *table) return std::move(**table);
            if (!table && broken.empty()) broken = table.error().message();
        }
    }
    if (!broken.empty()) return std::unexpected(Error(ErrorKind::kCorrupt, broken));
    if (kind == MbrKind::kProtective) {
        return fail(ErrorKind::kCorrupt, "its MBR refers to a GPT, and there is none, at its end neither");
    }
    TRY(std::optional<PartitionTable> table, read_mbr(read, size, kSectorBytes));
    if (!table) return fail(ErrorKind::kNotFound, "it has no partition table (MBR or GPT)");
    return std::move(*table);
}

Result<Partition> find_partition(const PartitionTable& table, unsigned number, const std::string& disk) {
    std::string list;
    size_t listed = 0;
    for (const Partition& partition : table.partitions) {
        if (partition.number == number) return partition;
        if (++listed <= 16) {
            list += fmt::format("{}{} ({}, {})", list.empty() ? "" : ", ", partition.number, partition.type,
                                readable_size(partition.size));
        }
    }
    if (listed > 16) list += fmt::format(" and {} more", listed - 16);
    return fail(ErrorKind::kNotFound, "'{}' has no partition {}; its {} has {}{}{}", disk, number, table.kind,
                list.empty() ? "none" : list, table.note.empty() ? "" : "; ", table.note);
}

}  // namespace gantry::cli
