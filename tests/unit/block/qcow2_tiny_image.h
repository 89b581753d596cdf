// TinyImage: a qcow2 image of a few clusters, put together byte by byte. Header only.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gantry::test {

/// Version 3, clusters of 512 bytes: 0 header, 1 refcount table, 2 refcount block, 3 L1 (one entry), 4 L2, 5.. data. A
/// disk of 32 KiB (64 clusters: one L2 table); guest cluster 0 holds 'a' at host cluster 5, the rest is unallocated.
struct TinyImage {
    static constexpr uint32_t kCluster = 512;
    static constexpr uint64_t kRefcountTable = 512, kRefcountBlock = 1024, kL1 = 1536, kL2 = 2048, kData = 2560;
    static constexpr uint64_t kDiskSize = 32768;
    static constexpr uint32_t kExtensions = 112;  // header_length
    static constexpr uint64_t kCopied = uint64_t{1} << 63;

    std::vector<uint8_t> bytes = std::vector<uint8_t>(kData + kCluster);

    TinyImage() {
        put32(0, 0x514649fb);
        put32(4, 3);
        put32(20, 9);
        put64(24, kDiskSize);
        put32(36, 1);
        put64(40, kL1);
        put64(48, kRefcountTable);
        put32(56, 1);
        put32(96, 4);
        put32(100, kExtensions);
        put64(kRefcountTable, kRefcountBlock);
        for (uint64_t i = 0; i < 6; i++) put16(kRefcountBlock + i * 2, 1);
        put64(kL1, kL2 | kCopied);
        put64(kL2, kData | kCopied);
        for (uint32_t i = 0; i < kCluster; i++) bytes[kData + i] = 'a';
    }

    void grow(uint64_t size) {
        if (bytes.size() < size) bytes.resize(size);
    }
    TinyImage& put8(uint64_t at, uint8_t v) {
        grow(at + 1);
        bytes[at] = v;
        return *this;
    }
    TinyImage& put16(uint64_t at, uint16_t v) {
        return put8(at, static_cast<uint8_t>(v >> 8)).put8(at + 1, static_cast<uint8_t>(v));
    }
    TinyImage& put32(uint64_t at, uint32_t v) {
        return put16(at, static_cast<uint16_t>(v >> 16)).put16(at + 2, static_cast<uint16_t>(v));
    }
    TinyImage& put64(uint64_t at, uint64_t v) {
        return put32(at, static_cast<uint32_t>(v >> 32)).put32(at + 4, static_cast<uint32_t>(v));
    }
    TinyImage& put_text(uint64_t at, std::string_view text) {
        for (size_t i = 0; i < text.size(); i++) put8(at + i, static_cast<uint8_t>(text[i]));
        return *this;
    }
    TinyImage& incompatible(uint64_t bits) { return put64(72, bits); }
    TinyImage& autoclear(uint64_t bits) { return put64(88, bits); }
    /// An extension at `at` (kExtensions for the first).
    TinyImage& extension(uint64_t at, uint32_t type, std::string_view data) {
        return put32(at, type).put32(at + 4, static_cast<uint32_t>(data.size())).put_text(at + 8, data);
    }
    TinyImage& bitmaps_extension(uint32_t count, uint32_t reserved, uint64_t size, uint64_t offset) {
        return autoclear(1)
            .put32(kExtensions, 0x23852875)
            .put32(kExtensions + 4, 24)
            .put32(kExtensions + 8, count)
            .put32(kExtensions + 12, reserved)
            .put64(kExtensions + 16, size)
            .put64(kExtensions + 24, offset);
    }
    /// One directory entry at `at`; its length is 32 bytes with a name of up to 8 bytes.
    TinyImage& bitmap_entry(uint64_t at, uint64_t table, uint32_t entries, uint32_t flags, uint8_t type,
                            uint8_t granularity, std::string_view name) {
        grow(at + 32);
        return put64(at, table)
            .put32(at + 8, entries)
            .put32(at + 12, flags)
            .put8(at + 16, type)
            .put8(at + 17, granularity)
            .put16(at + 18, static_cast<uint16_t>(name.size()))
            .put32(at + 20, 0)
            .put_text(at + 24, name);
    }
    TinyImage& snapshots(uint32_t count, uint64_t offset) { return put32(60, count).put64(64, offset); }
    /// A snapshot entry at `at` with 16 bytes of extra data, one-letter id and name: 58 bytes, padded to 64.
    TinyImage& snapshot_entry(uint64_t at, uint64_t l1, uint32_t l1_size, char id, char name, uint64_t disk_size) {
        grow(at + 64);
        return put64(at, l1)
            .put32(at + 8, l1_size)
            .put16(at + 12, 1)
            .put16(at + 14, 1)
            .put32(at + 16, 1234)
            .put32(at + 36, 16)
            .put64(at + 40, 0)
            .put64(at + 48, disk_size)
            .put8(at + 56, static_cast<uint8_t>(id))
            .put8(at + 57, static_cast<uint8_t>(name));
    }
};

}  // namespace gantry::test
