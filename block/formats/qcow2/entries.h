// L1 and L2 entries: what one mapping word (two with extended L2) says about guest bytes (spec/qcow2.md sections 3 to
// 5). Pure.

#pragma once

#include <cstdint>
#include <string>

#include "block/extent.h"
#include "block/formats/qcow2/layout.h"

namespace gantry::block::qcow2 {

constexpr uint64_t kCopied = uint64_t{1} << 63;
constexpr uint64_t kCompressed = uint64_t{1} << 62;
constexpr uint64_t kReadsAsZero = 1;
constexpr uint64_t kOffsetMask = 0x00fffffffffffe00;  // bits 9..55

/// Why an entry cannot be believed.
enum class Damage : uint8_t {
    kNone,
    kUnaligned,          // the host offset is not on a cluster
    kZeroFlagInV2,       // bit 0 set where it has no meaning
    kAllocatedAndZero,   // extended: a subcluster is both
    kAllocatedNowhere,   // extended: allocated subclusters without a host offset
    kCompressedOutside,  // compressed, but the data lives in an external file
    kElsewhere,          // external data: host offset is not the guest offset
};

/// A run of guest bytes inside one cluster that are of one kind.
struct Piece {
    Extent::Kind kind = Extent::Kind::kUnallocated;
    bool allocated = false;
    bool must_copy = false;
    Damage damage = Damage::kNone;
    uint64_t length = 0;  // from the asked offset on
    uint64_t host = 0;    // kData: host offset of the asked byte; kEncoded: where the blob begins
    uint64_t bytes = 0;   // kEncoded: length of the blob at most
};

/// The L2 table that an L1 entry points to; 0: none.
inline uint64_t l2_table_offset(uint64_t l1_entry) { return l1_entry & kOffsetMask; }

/// The words of one cluster. `bitmap`: only with extended L2.
struct Entry {
    uint64_t word = 0, bitmap = 0;
    bool operator==(const Entry&) const = default;

    bool is_compressed() const { return (word & kCompressed) != 0; }
    uint32_t allocated() const { return static_cast<uint32_t>(bitmap); }
    uint32_t zero() const { return static_cast<uint32_t>(bitmap >> 32); }
    static uint64_t bits(uint32_t allocated, uint32_t zero) { return uint64_t{zero} << 32 | allocated; }
};

/// The entry is not a compressed one and names a host cluster.
inline bool has_place(const Geometry& g, const Entry& e) {
    return !e.is_compressed() && ((e.word & kOffsetMask) != 0 || (g.external_data && (e.word & kCopied)));
}
/// ... which may be written to, because nobody else refers to it.
inline bool has_own_place(const Geometry& g, const Entry& e) { return has_place(g, e) && (e.word & kCopied) != 0; }
inline uint64_t place_of(const Entry& e) { return e.word & kOffsetMask; }

/// Where a compressed entry's blob lies; `bytes` up to the end of its last sector.
struct Blob {
    uint64_t host = 0, bytes = 0;
};
Blob blob_of(const Geometry& geometry, const Entry& entry);
/// The word for `bytes` > 0 at `host`; 0 when it cannot be expressed.
uint64_t compressed_word(const Geometry& geometry, uint64_t host, uint64_t bytes);

/// Subclusters of the cluster that begins at guest offset `cluster` which [from, to) touches, a bit for each.
uint32_t subclusters_touched(const Geometry& geometry, uint64_t cluster, uint64_t from, uint64_t to);

/// Describes guest byte `guest_offset` and its equals up to the end of the cluster, from the entry of that cluster.
/// `bitmap`: second word of an extended entry. A compressed piece spans the whole rest of the cluster.
Piece describe_entry(const Geometry& geometry, uint64_t entry, uint64_t bitmap, uint64_t guest_offset);

/// The sentence for the operator about an entry that describe_entry() found damaged, in the L2 table at `l2_offset`.
std::string damage_text(Damage damage, uint64_t entry, uint64_t bitmap, uint64_t l2_offset, uint64_t l2_index);

}  // namespace gantry::block::qcow2
