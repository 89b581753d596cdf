#include "cli/partition_table.h"

#include <catch2/catch.hpp>
#include <cstring>

using namespace gantry;
using namespace gantry::cli;

namespace {

constexpr uint64_t kMiB = 1 << 20;

/// A disk in memory with the means to write tables into it.
struct Disk {
    explicit Disk(uint64_t size) : bytes(size) {}

    template <class T>
    void put(uint64_t at, T value) {
        for (size_t i = 0; i < sizeof(T); ++i) bytes.at(at + i) = static_cast<uint8_t>(value >> (8 * i));
    }
    template <class T>
    T get(uint64_t at) const {
        T value = 0;
        for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(static_cast<T>(bytes.at(at + i)) << (8 * i));
        return value;
    }
    /// An entry of the record at sector `record`, in sectors of 512 bytes.
    void entry(uint64_t record, unsigned index, uint8_t type, uint32_t first, uint32_t count) {
        const uint64_t at = record * 512 + 446 + index * 16;
        put<uint8_t>(at + 4, type);
        put<uint32_t>(at + 8, first);
        put<uint32_t>(at + 12, count);
        put<uint16_t>(record * 512 + 510, 0xaa55);
    }
    static uint32_t crc(const uint8_t* data, size_t size) {
        uint32_t crc = ~0u;
        for (size_t i = 0; i < size; ++i) {
            crc ^= data[i];
            for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0xedb88320 : crc >> 1;
        }
        return ~crc;
    }
    void gpt_entry(uint64_t table, unsigned index, uint64_t first, uint64_t last, const char16_t* name = u"") {
        const uint64_t at = table + index * 128;
        put<uint64_t>(at, 0x477284830fc63dafull);  // Linux
        put<uint64_t>(at + 8, 0xe47d47d8693d798eull);
        put<uint64_t>(at + 32, first);
        put<uint64_t>(at + 40, last);
        for (size_t i = 0; name[i] && i < 36; ++i) put<uint16_t>(at + 56 + 2 * i, name[i]);
    }
    /// Header at sector `own` over 128 entries at sector `table`.
    void seal(uint64_t own, uint64_t table, uint32_t sector) {
        const uint64_t at = own * sector;
        std::memcpy(&bytes.at(at), "EFI PART", 8);
        put<uint32_t>(at + 8, 0x10000);
        put<uint32_t>(at + 12, 92);
        put<uint64_t>(at + 24, own);
        put<uint64_t>(at + 72, table);
        put<uint32_t>(at + 80, 128);
        put<uint32_t>(at + 84, 128);
        put<uint32_t>(at + 88, crc(&bytes.at(table * sector), 128 * 128));
        put<uint32_t>(at + 16, 0);
        put<uint32_t>(at + 16, crc(&bytes.at(at), 92));
    }
    Result<PartitionTable> read() const {
        return read_partition_table(
            [this](uint64_t offset, std::span<uint8_t> room) -> Result<> {
                REQUIRE(offset + room.size() <= bytes.size());
                std::memcpy(room.data(), bytes.data() + offset, room.size());
                return {};
            },
            bytes.size());
    }
    /// "number:offset+size" of each, in MiB.
    std::string text() const {
        const auto table = read();
        if (!table) return "error: " + table.error().message();
        std::string out = table->kind;
        for (const Partition& p : table->partitions) {
            out += fmt::format(" {}:{}+{}", p.number, p.offset / kMiB, p.size / kMiB);
        }
        return out;
    }
    std::vector<uint8_t> bytes;
};

constexpr uint32_t kSectors = 2048;  // of a MiB

Disk gpt_disk(uint32_t sector) {
    Disk disk(64 * kMiB);
    const uint64_t last = 64 * kMiB / sector - 1, per_mib = kMiB / sector, table_sectors = 128 * 128 / sector;
    disk.entry(0, 0, kProtectiveType, 1, 0xffffffff);
    for (const uint64_t table : {uint64_t{2}, last - table_sectors}) {
        disk.gpt_entry(table * sector, 0, 1 * per_mib, 11 * per_mib - 1, u"root \u00e9\u20ac\n");
        disk.gpt_entry(table * sector, 6, 20 * per_mib, 40 * per_mib - 1);
    }
    disk.seal(1, 2, sector);
    disk.seal(last, last - table_sectors, sector);
    return disk;
}

}  // namespace

TEST_CASE("partitions: primary ones of an MBR", "[cli][partition]") {
    Disk disk(64 * kMiB);
    disk.entry(0, 0, 0x83, 1 * kSectors, 10 * kSectors);
    disk.entry(0, 2, 0x07, 20 * kSectors, 5 * kSectors);
    CHECK(disk.text() == "MBR 1:1+10 3:20+5");
    const auto table = disk.read();
    CHECK(table->partitions[0].type == "Linux");
    const auto missing = find_partition(*table, 2, "d.raw");
    REQUIRE(!missing);
    CHECK(missing.error().kind() == ErrorKind::kNotFound);
    CHECK(
        missing.error().message() ==
        "'d.raw' has no partition 2; its MBR has 1 (Linux, 10 MiB (10485760 bytes)), 3 (NTFS or exFAT, 5 MiB (5242880 "
        "bytes))");
    CHECK(find_partition(*table, 3, "d.raw")->offset == 20 * kMiB);
}

TEST_CASE("partitions: logical ones count from 5, whatever the primary ones are", "[cli][partition]") {
    Disk disk(64 * kMiB);
    disk.entry(0, 0, 0x83, 1 * kSectors, 4 * kSectors);
    disk.entry(0, 1, GENERATE(0x05, 0x0f, 0x85), 10 * kSectors, 50 * kSectors);
    disk.entry(10 * kSectors, 0, 0x83, 1 * kSectors, 4 * kSectors);
    disk.entry(10 * kSectors, 1, 0x05, 10 * kSectors, 20 * kSectors);
    disk.entry(20 * kSectors, 0, 0x82, 1 * kSectors, 8 * kSectors);
    disk.entry(20 * kSectors, 1, 0x05, 30 * kSectors, 20 * kSectors);
    disk.entry(40 * kSectors, 0, 0x83, 2 * kSectors, 3 * kSectors);
    CHECK(disk.text() == "MBR 1:1+4 5:11+4 6:21+8 7:42+3");
}

TEST_CASE("partitions: a chain of logical ones that leads nowhere ends", "[cli][partition]") {
    Disk disk(64 * kMiB);
    disk.entry(0, 1, 0x05, 10 * kSectors, 50 * kSectors);
    disk.entry(10 * kSectors, 0, 0x83, 1 * kSectors, 4 * kSectors);
    SECTION("a circle") { disk.entry(10 * kSectors, 1, 0x05, 0, 20 * kSectors); }
    SECTION("beyond the disk") { disk.entry(10 * kSectors, 1, 0x05, 100 * kSectors, 20 * kSectors); }
    SECTION("to no record") { disk.entry(10 * kSectors, 1, 0x05, 20 * kSectors, 20 * kSectors); }
    SECTION("to the largest number") { disk.entry(10 * kSectors, 1, 0x05, 0xffffffff, 1); }
    CHECK(disk.text() == "MBR 5:11+4");
    CHECK(!disk.read()->note.empty());
}

TEST_CASE("partitions: more logical ones than anybody has are cut off", "[cli][partition]") {
    Disk disk(64 * kMiB);
    disk.entry(0, 0, 0x05, 100, 100000);
    for (uint32_t i = 0; i < 300; ++i) {
        disk.entry(100 + i * 10, 0, 0x83, 1, 5);
        disk.entry(100 + i * 10, 1, 0x05, (i + 1) * 10, 10);
    }
    const auto table = disk.read();
    REQUIRE(table);
    CHECK(table->partitions.size() == 124);
    CHECK(table->note.find("124") != std::string::npos);
}

TEST_CASE("partitions: what does not lie on the disk is left out", "[cli][partition]") {
    Disk disk(64 * kMiB);
    disk.entry(0, 0, 0x83, 1 * kSectors, 10 * kSectors);
    disk.entry(0, 1, 0x83, 60 * kSectors, 10 * kSectors);
    disk.entry(0, 2, 0x83, 10 * kSectors, 0xffffffff);
    CHECK(disk.text() == "MBR 1:1+10");
    CHECK(disk.read()->note == "partition 3 does not lie on the disk");
}

TEST_CASE("partitions: boot sectors of file systems and empty disks have none", "[cli][partition]") {
    Disk disk(8 * kMiB);
    SECTION("nothing") {}
    SECTION("a signature alone") { disk.put<uint16_t>(510, 0xaa55); }
    SECTION("code where the table would be") {
        disk.entry(0, 0, 0x20, 12345, 100);
        disk.put<uint8_t>(446, 0x41);
    }
    SECTION("a start beyond the end") { disk.entry(0, 0, 0x83, 0x6f726574, 5); }
    const auto table = disk.read();
    REQUIRE(!table);
    CHECK(table.error().kind() == ErrorKind::kNotFound);
    CHECK(Disk(0).read().error().kind() == ErrorKind::kNotFound);
    CHECK(Disk(511).read().error().kind() == ErrorKind::kNotFound);
    CHECK(Disk(512).read().error().kind() == ErrorKind::kNotFound);
}

TEST_CASE("partitions: a GPT with sectors of either size", "[cli][partition]") {
    const Disk disk = gpt_disk(GENERATE(512u, 4096u));
    CHECK(disk.text() == "GPT 1:1+10 7:20+20");
    const auto table = disk.read();
    CHECK(table->partitions[0].name == "root \u00e9\u20ac?");
    CHECK(table->note.empty());
}

TEST_CASE("partitions: the GPT at the end stands in for a damaged one", "[cli][partition]") {
    const uint32_t sector = GENERATE(512u, 4096u);
    Disk disk = gpt_disk(sector);
    SECTION("header") { disk.bytes[sector + 40] ^= 1; }
    SECTION("entries") { disk.bytes[2 * sector + 200] ^= 1; }
    SECTION("overwritten, the MBR too") { std::memset(disk.bytes.data(), 0, 34 * 512); }
    SECTION("an absurd number of entries") {
        disk.put<uint32_t>(sector + 80, 0xffffffff);
        disk.put<uint32_t>(sector + 16, 0);
        disk.put<uint32_t>(sector + 16, Disk::crc(&disk.bytes[sector], 92));
    }
    SECTION("entries beyond the end") {
        disk.put<uint64_t>(sector + 72, UINT64_MAX / 2);
        disk.put<uint32_t>(sector + 16, 0);
        disk.put<uint32_t>(sector + 16, Disk::crc(&disk.bytes[sector], 92));
    }
    CHECK(disk.text() == "GPT 1:1+10 7:20+20");
    CHECK(disk.read()->note.find("at its end is used") != std::string::npos);
}

TEST_CASE("partitions: a GPT without a sound copy is refused, not guessed at", "[cli][partition]") {
    Disk disk = gpt_disk(512);
    disk.bytes[512 + 40] ^= 1;
    disk.bytes[64 * kMiB - 512 + 40] ^= 1;
    auto table = disk.read();
    REQUIRE(!table);
    CHECK(table.error().kind() == ErrorKind::kCorrupt);
    CHECK(table.error().message() == "its GPT is damaged: the checksum of its header is wrong");
    // Both gone, and the MBR still speaks of one.
    std::memset(&disk.bytes[512], 0, 512);
    std::memset(&disk.bytes[64 * kMiB - 512], 0, 512);
    table = disk.read();
    REQUIRE(!table);
    CHECK(table.error().kind() == ErrorKind::kCorrupt);
    CHECK(table.error().message().find("there is none") != std::string::npos);
}

TEST_CASE("partitions: entries of a GPT that lie beyond the disk are left out", "[cli][partition]") {
    Disk disk = gpt_disk(512);
    disk.gpt_entry(1024, 1, 50 * kSectors, UINT64_MAX);
    disk.gpt_entry(1024, 2, 60, 50);
    disk.gpt_entry(1024, 3, 0, 50);
    disk.seal(1, 2, 512);
    CHECK(disk.text() == "GPT 1:1+10 7:20+20");
    CHECK(!disk.read()->note.empty());
}

TEST_CASE("partitions: what the disk fails to read is said", "[cli][partition]") {
    const auto table = read_partition_table(
        [](uint64_t, std::span<uint8_t>) -> Result<> { return fail(ErrorKind::kIo, "no"); }, 1 << 20);
    REQUIRE(!table);
    CHECK(table.error().kind() == ErrorKind::kIo);
}
