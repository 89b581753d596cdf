// One pass of a check: what it gathers, and its steps (check.cc puts them together).

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "block/formats/qcow2/check_counts.h"
#include "block/formats/qcow2/image.h"
#include "block/formats/qcow2/image_file.h"
#include "block/image_operations.h"

namespace gantry::block::qcow2 {

constexpr uint64_t kReservedInL1 = 0x7f000000000001ff;
constexpr uint64_t kReservedInL2 = 0x3f000000000001fe;  // standard clusters
constexpr uint64_t kReservedInRefcountTable = 0x1ff;
constexpr uint64_t kReservedInBitmapTable = 0xff000000000001fe;

/// How far a long check is; shared by its passes. Plain arithmetic on the main loop.
struct CheckProgress {
    Progress tell;
    uint64_t done = 0, total = 0;

    /// `bytes` more of metadata have been read. Lets others run. kCancelled when the caller wants no more.
    Task<Result<>> advance(uint64_t bytes);
};

/// A table of L2 entries and how often L1 entries point to it.
struct L2Ref {
    uint64_t offset = 0;
    uint64_t active = 0;    // from the active L1 table
    uint64_t inactive = 0;  // from those of snapshots
    uint64_t l1_index = 0;  // of one that does

    uint64_t times() const { return active + inactive; }
};

/// A refcount block as the refcount table names it.
struct BlockRef {
    uint64_t offset = 0;    // 0: absent
    bool counted = false;   // its cluster is among the references
    bool readable = false;  // can be asked for counts
    bool sound = false;     // and be written: nothing else lives there
};

/// Bytes of the file with metadata in them.
struct MetadataRange {
    uint64_t offset = 0, bytes = 0;
    bool may_be_mended = false;  // L1 and L2 tables: entry by entry, in place

    uint64_t end() const { return offset + bytes; }
    bool touches(uint64_t other, uint64_t other_bytes) const { return other < end() && offset < other + other_bytes; }
};

/// Offsets of tables, sorted: those whose entries stay as they are, and among them those whose COPIED flags do, too
/// (they lie on something that has no such flags in the same bits).
struct Contested {
    std::vector<uint64_t> tables, flags;
};

/// What one pass over the image gathers. Memory follows the number of clusters that the file has, and the number of L2
/// tables in it.
struct CheckRun {
    CheckRun(ImageFile& file, Image& image, CheckProgress& progress);

    ImageFile& file;
    Image& image;
    CheckProgress& progress;
    const Geometry g;
    const uint64_t file_bytes, file_clusters;

    ImageCheck found;
    CountMap counts;               // references; after compare_counts() with `keep_stored`: what is stored
    std::vector<L2Ref> tables;     // by offset
    std::vector<BlockRef> blocks;  // by refcount table index
    bool rebuild = false;          // a refcount block or the table is unusable, or missing
    bool unseen = false;           // some references could not be followed: nothing may be lowered
    bool unreadable = false;       // because the medium failed

    /// Clusters that pointers with stray low bits would name without them; sorted. Then those among them whose stored
    /// count has room for that reference: the pointer meant them.
    std::vector<uint64_t> rounded;
    std::unordered_set<uint64_t> adopted;

    /// L1 and L2 tables that lie on other metadata: which of both the place belongs to is not known.
    Contested contested;

    /// The snapshot table: its length in the file, and what it should be when entries are incomplete (else empty).
    uint64_t snapshot_bytes = 0;
    std::vector<uint8_t> mended_snapshots;

    /// Mends as it goes.
    bool fix = false;
    uint64_t mended = 0;  // changes written
    bool l1_changed = false;

    uint64_t cluster_size() const { return g.cluster_size(); }
    uint64_t cluster_of(uint64_t offset) const { return offset >> g.cluster_bits; }
    /// Whether entries of the L1 or L2 table at `table` are mended; otherwise they are taken as they are.
    bool mends(uint64_t table) const { return fix && !std::ranges::binary_search(contested.tables, table); }
    bool mends_flags(uint64_t table) const { return fix && !std::ranges::binary_search(contested.flags, table); }
    /// Ends a cluster or more beyond the end of the file.
    bool outside(uint64_t offset, uint64_t bytes) const {
        return offset > file_bytes + cluster_size() || offset + bytes > file_bytes + cluster_size();
    }

    template <class... Args>
    void corruption(uint64_t times, fmt::format_string<Args...> text, Args&&... args) {
        found.corruptions += times;
        note(text, std::forward<Args>(args)...);
    }
    template <class... Args>
    void leak(fmt::format_string<Args...> text, Args&&... args) {
        found.leaks++;
        note(text, std::forward<Args>(args)...);
    }
    template <class... Args>
    void error(fmt::format_string<Args...> text, Args&&... args) {
        found.check_errors++;
        note(text, std::forward<Args>(args)...);
    }

    /// Counts `times` references to each cluster that [offset, +bytes) touches; false, with a finding, when it is
    /// outside().
    bool count(uint64_t offset, uint64_t bytes, uint64_t times = 1);

  private:
    template <class... Args>
    void note(fmt::format_string<Args...> text, Args&&... args) {
        if (found.findings.size() < ImageCheck::kMaxFindings)
            found.findings.push_back(fmt::format(text, std::forward<Args>(args)...));
    }
};

/// kTooLarge: more clusters than a check can count.
Result<> check_file_size(const ImageFile& file, const Geometry& g);

// ---- The steps, in their order ----

/// Everything that refers to clusters: header, L1 and L2 tables, snapshots, refcounts, encryption, bitmaps. With
/// run.fix damaged references are mended in the file (not flushed).
Task<Result<>> count_references(CheckRun& run);

enum class CountChange : uint8_t { kNone, kRaise, kLower };
/// Compares run.counts with what is stored. kNone: findings. Else: writes the counts that are too low / too high (not
/// flushed), of sound blocks. `keep_stored`: run.counts become what is stored afterwards (kRaise: at least what they
/// were).
Task<Result<>> compare_counts(CheckRun& run, CountChange change, bool keep_stored);

/// COPIED flags of the active tables against run.counts, which are those stored.
Task<Result<>> check_flags(CheckRun& run);

/// New refcount blocks and table for run.counts, and run.mended_snapshots, behind the end of the file; the header then
/// names them all in one write. Flushed.
Task<Result<>> rebuild_refcounts(CheckRun& run);

// ---- Parts of count_references ----

/// L2 tables in pieces as large as they lie together. `visit` returns whether it changed the bytes; those are written.
/// Tables that cannot be read are check_errors.
Task<Result<>> visit_tables(CheckRun& run, bool active_only,
                            std::function<bool(const L2Ref&, std::span<uint8_t>)> visit);
/// Counts what the entries of a table refer to; true when it has mended some.
bool count_table(CheckRun& run, const L2Ref& table, std::span<uint8_t> bytes);
Task<Result<>> load_refcount_table(CheckRun& run);
/// Fills run.contested. `fixed`: everything but L2 tables, refcount table and blocks.
void find_contested(CheckRun& run, std::vector<MetadataRange> fixed);
void count_blocks(CheckRun& run);
Task<Result<>> count_bitmaps(CheckRun& run);

/// Whether a standard entry names a place for its cluster.
bool names_place(const Geometry& g, uint64_t entry);

// ---- Single writes to the header, each flushed ----

Task<Result<>> write_feature_words(ImageFile& file, const Header& header);
/// Clears the autoclear bit: nobody believes the stored bitmaps any more.
Task<Result<>> drop_bitmaps(ImageFile& file, Image& image);

}  // namespace gantry::block::qcow2
