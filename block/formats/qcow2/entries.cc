#include "block/formats/qcow2/entries.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

namespace gantry::block::qcow2 {

namespace {

using Kind = Extent::Kind;

Piece damaged(Damage damage) {
    Piece piece;
    piece.damage = damage;
    return piece;
}

Piece compressed(const Geometry& g, uint64_t entry, uint64_t in_cluster) {
    if (g.external_data) return damaged(Damage::kCompressedOutside);
    Piece piece;
    piece.kind = Kind::kEncoded;
    piece.allocated = true;
    piece.must_copy = true;
    piece.length = g.cluster_size() - in_cluster;
    const Blob blob = blob_of(g, {.word = entry});
    piece.host = blob.host;
    piece.bytes = blob.bytes;
    return piece;
}

/// The subclusters of an extended entry: `host` = 0 without an allocation.
Piece subclusters(const Geometry& g, bool has_host, uint64_t host, uint64_t bitmap, uint64_t in_cluster) {
    const auto allocated = static_cast<uint32_t>(bitmap);
    const auto zero = static_cast<uint32_t>(bitmap >> 32);
    if (allocated & zero) return damaged(Damage::kAllocatedAndZero);
    if (allocated && !has_host) return damaged(Damage::kAllocatedNowhere);
    const auto first = static_cast<uint32_t>(in_cluster >> g.subcluster_bits());
    const uint32_t bit = uint32_t{1} << first;
    Piece piece;
    uint32_t same = ~(allocated | zero);
    if (allocated & bit) {
        piece.kind = Kind::kData;
        piece.host = host + in_cluster;
        same = allocated;
    } else if (zero & bit) {
        piece.kind = Kind::kZero;
        same = zero;
    }
    piece.allocated = piece.kind != Kind::kUnallocated;
    const auto run = static_cast<uint32_t>(std::countr_one(same >> first));
    piece.length = (uint64_t{first + run} << g.subcluster_bits()) - in_cluster;
    return piece;
}

}  // namespace

Blob blob_of(const Geometry& g, const Entry& entry) {
    const uint32_t x = 62 - (g.cluster_bits - 8);
    const uint64_t sectors = ((entry.word & ~kCopied & ~kCompressed) >> x) + 1;
    Blob blob;
    blob.host = entry.word & ((uint64_t{1} << x) - 1) & ((uint64_t{1} << 56) - 1);
    blob.bytes = sectors * 512 - (blob.host & 511);
    return blob;
}

uint64_t compressed_word(const Geometry& g, uint64_t host, uint64_t bytes) {
    const uint32_t x = 62 - (g.cluster_bits - 8);
    const uint64_t more_sectors = (host + bytes - 1) / 512 - host / 512;
    if (host >> std::min(x, 56u) || more_sectors >> (62 - x)) return 0;
    return kCompressed | more_sectors << x | host;
}

uint32_t subclusters_touched(const Geometry& g, uint64_t cluster, uint64_t from, uint64_t to) {
    from = std::max(from, cluster);
    to = std::min(to, cluster + g.cluster_size());
    if (from >= to) return 0;
    const auto first = static_cast<uint32_t>((from - cluster) >> g.subcluster_bits());
    const auto last = static_cast<uint32_t>((to - 1 - cluster) >> g.subcluster_bits());
    return static_cast<uint32_t>((uint64_t{2} << last) - (uint64_t{1} << first));
}

Piece describe_entry(const Geometry& g, uint64_t entry, uint64_t bitmap, uint64_t guest_offset) {
    const uint64_t in_cluster = g.offset_in_cluster(guest_offset);
    if (entry & kCompressed) return compressed(g, entry, in_cluster);

    const uint64_t host = entry & kOffsetMask;
    // With an external data file offset 0 is a place like any other; COPIED tells it from "none".
    const bool has_host = host != 0 || (g.external_data && (entry & kCopied));
    if (g.offset_in_cluster(host) != 0) return damaged(Damage::kUnaligned);
    if (has_host && g.external_data && host != guest_offset - in_cluster) return damaged(Damage::kElsewhere);

    Piece piece;
    if (g.extended_l2) {
        piece = subclusters(g, has_host, host, bitmap, in_cluster);
    } else {
        piece.length = g.cluster_size() - in_cluster;
        if (entry & kReadsAsZero) {
            if (!g.zero_flag) return damaged(Damage::kZeroFlagInV2);
            piece.kind = Kind::kZero;
        } else if (has_host) {
            piece.kind = Kind::kData;
            piece.host = host + in_cluster;
        }
        piece.allocated = piece.kind != Kind::kUnallocated;
    }
    piece.must_copy = has_host && !(entry & kCopied);
    if (piece.kind == Kind::kUnallocated && g.raw_external_data && piece.damage == Damage::kNone) {
        // The data file alone is the disk, so what no entry describes is found there too.
        piece.kind = Kind::kData;
        piece.allocated = true;
        piece.must_copy = true;
        piece.host = guest_offset;
    }
    return piece;
}

std::string damage_text(Damage damage, uint64_t entry, uint64_t bitmap, uint64_t l2_offset, uint64_t l2_index) {
    const std::string where = fmt::format("(L2 offset: {:#x}, L2 index: {})", l2_offset, l2_index);
    const uint64_t host = entry & kOffsetMask;
    switch (damage) {
        case Damage::kNone:
            break;
        case Damage::kUnaligned:
            return fmt::format("Cluster allocation offset {:#x} unaligned {}", host, where);
        case Damage::kZeroFlagInV2:
            return fmt::format("Zero cluster entry {:#x} found in pre-v3 image {}", entry, where);
        case Damage::kAllocatedAndZero:
            return fmt::format("Subclusters are both allocated and zero: bitmap {:#x} {}", bitmap, where);
        case Damage::kAllocatedNowhere:
            return fmt::format("Subclusters are allocated without a host cluster: bitmap {:#x} {}", bitmap, where);
        case Damage::kCompressedOutside:
            return fmt::format("Compressed cluster entry {:#x} found in image with external data file {}", entry,
                               where);
        case Damage::kElsewhere:
            return fmt::format("External data file host cluster offset {:#x} does not match its guest cluster {}", host,
                               where);
    }
    return fmt::format("L2 entry {:#x} is damaged {}", entry, where);
}

}  // namespace gantry::block::qcow2
