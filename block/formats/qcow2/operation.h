// Operation: what every operation on a whole image has in common.

#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/metadata.h"

namespace gantry::block::qcow2 {

class Qcow2Node;

/// One operation on an open image: a clean beginning, places for new structures, the switch of the header to them, and
/// what is let go afterwards. The order is always: raise counts and write what is new; stabilise(); switch the header
/// with one write; release what is old; finish(). So a power cut at any write leaves the old state or the new one, and
/// at worst clusters that leak, which the next open for writing finds by the session mark.
///
/// Main loop, the node is drained. Holds Metadata::mutex() from begin() on, except between unlock() and lock().
class Operation {
  public:
    explicit Operation(Qcow2Node& node);
    Operation(const Operation&) = delete;

    /// Afterwards nothing is dirty, reserved or waiting to be freed, and the session is marked in the file. kReadOnly,
    /// EIO after corruption.
    Task<Result<>> begin();
    void unlock() { guard_.unlock(); }
    Task<void> lock();

    Qcow2Node& node() { return node_; }
    Metadata& metadata() { return *metadata_; }
    Refcounts& refcounts() { return metadata_->refcounts(); }
    ImageFile& file() { return metadata_->file(); }
    Image& image() { return metadata_->image(); }
    Header& header() { return metadata_->image().header; }
    const Geometry& geometry() const { return metadata_->image().geometry; }
    uint64_t clusters_for(uint64_t bytes) const;

    /// Clusters in a row for `bytes` (at least one), counted once. give_back() frees every row since the last keep().
    Task<Result<uint64_t>> allocate(uint64_t bytes);
    Task<void> give_back();
    void keep() { rows_.clear(); }

    /// Reads a whole L1 table. kTooLarge beyond the format's limit, kNoMemory.
    Task<Result<std::vector<uint64_t>>> read_l1(uint64_t offset, uint64_t entries);
    /// Writes whole clusters from `offset` on: the bytes, then zeroes.
    Task<Result<>> write_padded(uint64_t offset, std::span<const uint8_t> bytes, std::string_view what);
    Task<Result<>> write_l1(uint64_t offset, std::span<const uint64_t> words);

    /// Everything counted and written so far is stable.
    Task<Result<>> stabilise();
    /// Metadata::switch_header(); rows are kept unless the file certainly says what it said before.
    Task<Result<>> switch_header(uint64_t offset, std::span<const uint8_t> bytes);
    /// Nobody knows what the header says: what was made may be in use, so nothing is undone.
    bool header_lost() const;
    /// One write of the header (disk size and active L1 table, bytes 24 to 47), then a flush. Memory follows when that
    /// succeeded.
    Task<Result<>> switch_mapping(uint64_t disk_size, uint64_t l1_entries, uint64_t l1_offset);
    /// The same for the snapshot table (bytes 60 to 71).
    Task<Result<>> switch_snapshots(std::vector<Snapshot> snapshots, uint64_t table_offset);
    /// The L2 cache is dropped, L1 in memory becomes `words`: after every change of the active tables behind their
    /// back. The L1 table of the header has words.size() entries.
    void publish_mapping(std::span<const uint64_t> words);

    /// Drops one reference of each cluster of the range. What falls to 0 is remembered for finish().
    Task<Result<>> release(uint64_t offset, uint64_t bytes);
    /// What was released is stable; its space goes back to the host when `discard`. Long operations call it every now
    /// and then: between release() and finish() nothing may be allocated.
    Task<Result<>> finish(bool discard);
    size_t released_runs() const { return released_.size(); }

    /// Whether `offset` may be written as the L2 table that an entry says it is: no metadata of another kind lies there
    /// (as of the first call). kCorrupt.
    Result<> check_table_place(uint64_t offset);

  private:
    struct Row {
        uint64_t offset, bytes;
    };
    Qcow2Node& node_;
    Metadata* metadata_ = nullptr;
    AsyncMutex::Guard guard_;
    std::vector<Row> rows_;
    std::vector<HostRun> released_;
    std::vector<Row> metadata_places_;  // sorted; filled by the first check
};

/// Entries of the snapshot table get the extra data that version 3 asks for, where they lack it. snapshots.cc.
Task<Result<>> complete_snapshots(Operation& op);

}  // namespace gantry::block::qcow2
