// Constants and limits of the format, and the sizes that follow from a header (spec/qcow2.md sections 1, 3 and 5).

#pragma once

#include <cstdint>

namespace gantry::block::qcow2 {

constexpr uint32_t kMagic = 0x514649fb;  // "QFI\xfb"

constexpr uint32_t kHeaderBytesV2 = 72;
constexpr uint32_t kHeaderBytesV3 = 104;     // without the fields that may be absent
constexpr uint32_t kHeaderBytesKnown = 112;  // with compression type and padding

constexpr uint32_t kMinClusterBits = 9;
constexpr uint32_t kMaxClusterBits = 21;
constexpr uint32_t kMinClusterBitsExtended = 14;

constexpr uint64_t kIncompatDirty = 1 << 0;
constexpr uint64_t kIncompatCorrupt = 1 << 1;
constexpr uint64_t kIncompatDataFile = 1 << 2;
constexpr uint64_t kIncompatCompression = 1 << 3;
constexpr uint64_t kIncompatExtendedL2 = 1 << 4;
constexpr uint64_t kIncompatKnown = 0x1f;
constexpr uint64_t kCompatLazyRefcounts = 1 << 0;
constexpr uint64_t kAutoclearBitmaps = 1 << 0;
constexpr uint64_t kAutoclearRawData = 1 << 1;
/// Ours: since we set it nobody else has written to the image (whoever does not know a bit here clears it before it
/// writes), so that a mapping log of the session may be replayed.
constexpr uint64_t kAutoclearSession = uint64_t{1} << 63;
constexpr uint64_t kAutoclearKnown = kAutoclearBitmaps | kAutoclearRawData | kAutoclearSession;

constexpr uint32_t kExtensionEnd = 0;
constexpr uint32_t kExtensionBackingFormat = 0xe2792aca;
constexpr uint32_t kExtensionDataFile = 0x44415441;
constexpr uint32_t kExtensionFeatureTable = 0x6803f857;
constexpr uint32_t kExtensionBitmaps = 0x23852875;
constexpr uint32_t kExtensionCrypto = 0x0537be77;
/// Ours ("GNTR"), 16 bytes: u64 session number, u64 flags. Bit 0: open for writing; when it is found set at open, the
/// image was not closed and may have leaked clusters. Others carry it along as an unknown extension.
constexpr uint32_t kExtensionSession = 0x474e5452;
constexpr uint64_t kSessionOpen = 1;

constexpr uint64_t kMaxL1Bytes = uint64_t{32} << 20;
constexpr uint64_t kMaxL1Entries = kMaxL1Bytes / 8;
constexpr uint64_t kMaxRefcountTableBytes = uint64_t{8} << 20;
constexpr uint32_t kMaxSnapshots = 65536;
constexpr uint64_t kMaxSnapshotTableBytes = uint64_t{64} << 20;
constexpr uint32_t kMaxSnapshotExtraBytes = 1024;
constexpr uint32_t kMaxBackingNameBytes = 1023;
constexpr uint32_t kMaxBackingFormatBytes = 15;
constexpr uint32_t kMaxBitmaps = 65535;
constexpr uint64_t kMaxBitmapDirectoryBytes = uint64_t{kMaxBitmaps} * 1024;
constexpr uint32_t kMaxBitmapNameBytes = 1023;
constexpr uint32_t kMinBitmapGranularityBits = 9;
constexpr uint32_t kMaxBitmapGranularityBits = 31;
constexpr uint64_t kMaxBitmapBytes = uint64_t{512} << 20;
constexpr uint64_t kMaxBitmapTableEntries = uint64_t{1} << 27;
/// A LUKS header with eight slots of the longest keys takes 4 MiB; a check counts each cluster of it.
constexpr uint64_t kMaxCryptoHeaderBytes = uint64_t{256} << 20;
/// Offsets and sizes stay below this, so that sums of two never wrap.
constexpr uint64_t kMaxOffset = INT64_MAX;

/// True when [offset, offset + bytes) does not end below kMaxOffset.
constexpr bool wraps(uint64_t offset, uint64_t bytes) { return offset > kMaxOffset || bytes > kMaxOffset - offset; }

/// What decides how L1 and L2 are read.
struct Geometry {
    uint32_t cluster_bits = 16;
    bool extended_l2 = false;
    bool zero_flag = true;           // v3: bit 0 of a standard entry means "reads as zeroes"
    bool external_data = false;      // guest clusters live in the data file, at their guest offset
    bool raw_external_data = false;  // and that file alone is a faithful raw image

    uint64_t cluster_size() const { return uint64_t{1} << cluster_bits; }
    uint64_t offset_in_cluster(uint64_t offset) const { return offset & (cluster_size() - 1); }
    uint32_t l2_entry_bytes() const { return extended_l2 ? 16 : 8; }
    /// log2 of the entries of one L2 table.
    uint32_t l2_bits() const { return cluster_bits - (extended_l2 ? 4 : 3); }
    uint32_t subcluster_bits() const { return extended_l2 ? cluster_bits - 5 : cluster_bits; }
    /// Guest bytes of one L2 table.
    uint32_t l1_shift() const { return cluster_bits + l2_bits(); }
    /// L1 entries that a disk of `bytes` needs.
    uint64_t l1_entries_for(uint64_t bytes) const {
        return (bytes >> l1_shift()) + ((bytes & ((uint64_t{1} << l1_shift()) - 1)) != 0);
    }
};

}  // namespace gantry::block::qcow2
