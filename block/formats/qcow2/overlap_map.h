// OverlapMap: where the metadata of an image lies, so that nothing else is written there (spec/qcow2.md section 14).

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/layout.h"
#include "runtime/error.h"
#include "schema/options.h"

namespace gantry::block::qcow2 {

enum class Structure : uint8_t {
    kMainHeader,
    kActiveL1,
    kActiveL2,
    kRefcountBlock,
    kRefcountTable,
    kSnapshotTable,
    kInactiveL1,
    kInactiveL2,
    kBitmapDirectory,
    kCount
};
/// "active L1 table" etc.
std::string_view structure_name(Structure s);

/// Bit per Structure.
using StructureSet = uint16_t;
/// Of a set that is not empty.
Structure first_of(StructureSet set);
constexpr StructureSet bit_of(Structure s) { return static_cast<StructureSet>(1u << static_cast<unsigned>(s)); }
constexpr StructureSet kOverlapNone = 0;
constexpr StructureSet kOverlapConstant = bit_of(Structure::kMainHeader) | bit_of(Structure::kActiveL1) |
                                          bit_of(Structure::kRefcountTable) | bit_of(Structure::kSnapshotTable) |
                                          bit_of(Structure::kBitmapDirectory);
constexpr StructureSet kOverlapCached = kOverlapConstant | bit_of(Structure::kActiveL2) |
                                        bit_of(Structure::kRefcountBlock) | bit_of(Structure::kInactiveL1);
constexpr StructureSet kOverlapAll = kOverlapCached | bit_of(Structure::kInactiveL2);
/// From option overlap-check (template name, or object with a template and single switches). kInvalid.
Result<StructureSet> overlap_flags(const schema::Options& options);

/// Which structures each cluster of the file holds, of those that are checked. add/remove under Metadata::mutex() (or
/// drained); hits() on any thread without a lock, a few loads. Memory: in proportion to where metadata lies.
///
/// A table of pointers to chunks, each for a run of clusters, found by hashing. Chunks are never moved or freed while
/// the map lives; a table that gets too full is replaced by a larger one, and stays for those who read it.
class OverlapMap {
  public:
    OverlapMap(const Geometry& geometry, StructureSet checked);
    ~OverlapMap();
    OverlapMap(const OverlapMap&) = delete;
    OverlapMap& operator=(const OverlapMap&) = delete;

    StructureSet checked() const { return checked_; }
    /// Whole clusters are marked. No-op for structures that are not checked, and beyond 2^56. Marks do not count: one
    /// remove() undoes any number of add().
    void add(Structure s, uint64_t offset, uint64_t bytes);
    void remove(Structure s, uint64_t offset, uint64_t bytes);
    /// Whether a write to [offset, offset + bytes) of the file would touch metadata.
    bool hits(uint64_t offset, uint64_t bytes) const { return touched(offset, bytes) != 0; }
    /// All structures that it would touch. Any thread.
    StructureSet touched(uint64_t offset, uint64_t bytes) const;
    /// The first of them, for the report.
    std::optional<Structure> what(uint64_t offset, uint64_t bytes) const;

  private:
    struct Chunk;
    struct Top;
    struct Clusters {
        uint64_t first, last;
    };
    std::optional<Clusters> clusters(uint64_t offset, uint64_t bytes) const;
    uint64_t hash(uint64_t key) const;
    Chunk* find(const Top& top, uint64_t key) const;
    Chunk& find_or_make(uint64_t key);
    void grow();

    const uint32_t cluster_bits_;
    const StructureSet checked_;
    const uint64_t seed_;
    std::atomic<Top*> top_{nullptr};
    std::vector<std::unique_ptr<Top>> tops_;  // the last one is in use
    std::vector<std::unique_ptr<Chunk[]>> slabs_;
    uint64_t chunks_ = 0;
    mutable std::mutex mutex_;
};

}  // namespace gantry::block::qcow2
