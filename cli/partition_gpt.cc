// UEFI specification, chapter 5: "GUID Partition Table (GPT) Disk Layout".

#include <algorithm>
#include <array>
#include <cstring>

#include "cli/partition_table.h"

namespace gantry::cli {

namespace {

constexpr uint64_t kSignature = 0x5452415020494645;  // "EFI PART"
constexpr uint32_t kLeastHeader = 92, kLeastEntry = 128, kMostEntryBytes = 4096;
constexpr uint32_t kMostTableBytes = 1 << 20;  // the usual 128 entries have 16 KiB

template <class T>
T le(std::span<const uint8_t> bytes, size_t at) {
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(static_cast<T>(bytes[at + i]) << (8 * i));
    return value;
}

constexpr std::array<uint32_t, 256> kCrcTable = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; ++bit) value = value & 1 ? value >> 1 ^ 0xedb88320 : value >> 1;
        table[i] = value;
    }
    return table;
}();

uint32_t crc32(std::span<const uint8_t> bytes) {
    uint32_t crc = ~0u;
    for (const uint8_t byte : bytes) crc = crc >> 8 ^ kCrcTable[(crc ^ byte) & 0xff];
    return ~crc;
}

std::string guid_text(std::span<const uint8_t> guid) {
    return fmt::format("{:08x}-{:04x}-{:04x}-{:02x}{:02x}-{:02x}{:02x}{:02x}{:02x}{:02x}{:02x}", le<uint32_t>(guid, 0),
                       le<uint16_t>(guid, 4), le<uint16_t>(guid, 6), guid[8], guid[9], guid[10], guid[11], guid[12],
                       guid[13], guid[14], guid[15]);
}

std::string type_name(const std::string& guid) {
    constexpr std::pair<std::string_view, std::string_view> kKnown[] = {
        {"0fc63daf-8483-4772-8e79-3d69d8477de4", "Linux"},
        {"c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "EFI system"},
        {"ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", "Windows or Linux data"},
        {"21686148-6449-6e6f-744e-656564454649", "BIOS boot"},
        {"0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", "Linux swap"},
        {"e6d6d379-f507-44c2-a23c-238f2a3df928", "Linux LVM"},
        {"a19d880f-05fc-4d3b-a006-743f0f84911e", "Linux RAID"},
        {"4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "Linux root"},
        {"e3c9e316-0b5c-4db8-817d-f92df00215ae", "Microsoft reserved"},
    };
    for (const auto& [known, name] : kKnown) {
        if (guid == known) return std::string(name);
    }
    return guid;
}

/// UTF-16 as UTF-8; what is no printable character becomes '?'.
std::string name_text(std::span<const uint8_t> units) {
    std::string out;
    for (size_t i = 0; i + 1 < units.size(); i += 2) {
        const uint32_t c = le<uint16_t>(units, i);
        if (c == 0) break;
        if (c < 0x20 || c == 0x7f || (c >= 0x80 && c < 0xa0) || (c >= 0xd800 && c < 0xe000)) {
            out += '?';
        } else if (c < 0x80) {
            out += static_cast<char>(c);
        } else if (c < 0x800) {
            out += static_cast<char>(0xc0 | c >> 6);
            out += static_cast<char>(0x80 | (c & 0x3f));
        } else {
            out += static_cast<char>(0xe0 | c >> 12);
            out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
            out += static_cast<char>(0x80 | (c & 0x3f));
        }
    }
    return out;
}

struct Header {
    uint64_t first_usable = 0, last_usable = 0, entries_at = 0;  // sectors
    uint32_t count = 0, entry_bytes = 0, entries_crc = 0;
};

struct Gpt {
    const DiskReader& read;
    uint64_t size;
    uint32_t sector;

    /// Nothing: there is none. kCorrupt: there is one that contradicts itself.
    Result<std::optional<Header>> header_at(uint64_t lba) const {
        if (lba >= size / sector) return std::nullopt;
        std::vector<uint8_t> bytes(sector);
        CHECK_OK(read(lba * sector, bytes));
        if (le<uint64_t>(bytes, 0) != kSignature) return std::nullopt;
        const uint32_t length = le<uint32_t>(bytes, 12);
        if (length < kLeastHeader || length > sector) return wrong("its header has {} bytes", length);
        const uint32_t crc = le<uint32_t>(bytes, 16);
        std::memset(bytes.data() + 16, 0, 4);
        if (crc32(std::span(bytes).first(length)) != crc) return wrong("the checksum of its header is wrong");
        if (const uint64_t own = le<uint64_t>(bytes, 24); own != lba)
            return wrong("its header belongs to sector {}", own);
        Header header;
        header.first_usable = le<uint64_t>(bytes, 40);
        header.last_usable = le<uint64_t>(bytes, 48);
        header.entries_at = le<uint64_t>(bytes, 72);
        header.count = le<uint32_t>(bytes, 80);
        header.entry_bytes = le<uint32_t>(bytes, 84);
        header.entries_crc = le<uint32_t>(bytes, 88);
        if (header.entry_bytes < kLeastEntry || header.entry_bytes > kMostEntryBytes || header.entry_bytes % 8 != 0) {
            return wrong("its entries have {} bytes", header.entry_bytes);
        }
        const uint64_t table = uint64_t{header.count} * header.entry_bytes;
        if (table > kMostTableBytes) return wrong("it has {} entries", header.count);
        if (header.entries_at >= size / sector || table > size - header.entries_at * sector) {
            return wrong("its entries lie behind the end of the disk");
        }
        return header;
    }

    Result<PartitionTable> entries_of(const Header& header) const {
        std::vector<uint8_t> bytes(size_t{header.count} * header.entry_bytes);
        if (!bytes.empty()) CHECK_OK(read(header.entries_at * sector, bytes));
        if (crc32(bytes) != header.entries_crc) return wrong("the checksum of its entries is wrong");
        PartitionTable table;
        table.kind = "GPT";
        for (uint32_t i = 0; i < header.count; ++i) {
            const auto entry = std::span<const uint8_t>(bytes).subspan(size_t{i} * header.entry_bytes, kLeastEntry);
            const auto type = entry.first(16);
            if (std::ranges::all_of(type, [](uint8_t byte) { return byte == 0; })) continue;
            const uint64_t first = le<uint64_t>(entry, 32), last = le<uint64_t>(entry, 40);
            if (first == 0 || last < first || last >= size / sector) {
                table.note = fmt::format("partition {} does not lie on the disk", i + 1);
                continue;
            }
            table.partitions.push_back({i + 1, first * sector, (last - first + 1) * sector, type_name(guid_text(type)),
                                        name_text(entry.subspan(56, 72))});
        }
        return table;
    }

    template <class... Args>
    std::unexpected<Error> wrong(fmt::format_string<Args...> format, Args&&... args) const {
        return fail(ErrorKind::kCorrupt, "its GPT is damaged: {}", fmt::format(format, std::forward<Args>(args)...));
    }
};

}  // namespace

Result<std::optional<PartitionTable>> read_gpt(const DiskReader& read, uint64_t size, uint32_t sector) {
    const uint64_t sectors = size / sector;
    if (sectors < 3) return std::nullopt;
    const Gpt gpt{read, size, sector};
    std::optional<Error> damage;
    bool primary = true;
    for (const uint64_t lba : {uint64_t{1}, sectors - 1}) {
        auto header = gpt.header_at(lba);
        if (!header && header.error().kind() != ErrorKind::kCorrupt) return std::unexpected(std::move(header).error());
        if (!header && !damage) damage = std::move(header).error();
        if (header && *header) {
            auto table = gpt.entries_of(**header);
            if (table) {
                if (!primary && table->note.empty())
                    table->note = "its first GPT is damaged; the one at its end is used";
                return std::move(*table);
            }
            if (table.error().kind() != ErrorKind::kCorrupt) return std::unexpected(std::move(table).error());
            if (!damage) damage = std::move(table).error();
        }
        primary = false;
    }
    if (damage) return std::unexpected(std::move(*damage));
    return std::nullopt;
}

}  // namespace gantry::cli
