// The driver "blocks": a small writable image format of the tests, which proves what FormatNode offers to formats.

#pragma once

#include <array>
#include <atomic>
#include <mutex>
#include <vector>

#include "block/driver.h"
#include "block/format_node.h"
#include "tests/support/memory_node.h"

namespace gantry::test {

/// Blocks of 64 KiB in any order after a table; each block has 16 sub-blocks of 4 KiB that are allocated, zero or
/// neither (then the backing file shows). Blocks can be shared (a write moves them) or run-length encoded (a write
/// decodes them to a new place). With a key every byte is XORed with a stream that depends on its place in the file.
///
/// Crash safety: table entries are written after a flush of the data they name; a freed block is used again only when
/// no request can hold its address (retire) and the table on disk no longer names it. Lock order: flush_mutex_,
/// alloc_mutex_, load_mutex_, then the leaf locks table_mutex_ and space_mutex_.
///
/// Options: file, backing; write-through (the table is written by each change, after flushing what was copied); forget
/// (pages of the table are dropped at every flush, so that they must be loaded again).
class BlockFormat final : public block::FormatNode {
  public:
    static constexpr uint64_t kBlock = 64 << 10;
    static constexpr uint64_t kSub = 4 << 10;
    static constexpr unsigned kSubs = kBlock / kSub;
    static constexpr uint64_t kPageEntries = 16;  // of the table, loaded and written together
    static constexpr uint64_t kEntryBytes = 16;
    static constexpr uint64_t kPageBytes = kPageEntries * kEntryBytes;

    struct Header {
        uint64_t size = 0;
        uint64_t capacity = 0;  // blocks the table has room for
        uint64_t key = 0;
        uint64_t data_offset() const;
    };
    /// Where a guest block is.
    struct Entry {
        uint64_t host = 0;  // 0: nowhere
        uint16_t alloc = 0, zero = 0;
        bool shared = false;
        uint16_t encoded = 0;  // bytes; 0: plain
    };

    /// Writes an empty image of `size` bytes that can grow to `max_size`.
    static void create(MemoryDisk& disk, uint64_t size, uint64_t max_size, uint64_t key = 0);
    /// What is wrong with the image on `disk`; empty: nothing. (References outside the file, or twice to one place.)
    static std::string check(const MemoryDisk& disk);

    BlockFormat(const block::OpenContext& context, Header header);
    Task<Result<>> load_space(block::Node& file);

    /// As a snapshot would: everything allocated becomes shared and stays where it is for good. Drained.
    Task<Result<>> share_all();
    /// Blocks that wait for requests to end or for the table to be written, and free ones.
    size_t retired_blocks() const;
    size_t free_blocks() const;
    uint64_t plans() const { return plans_.load(); }

    MapResult map(uint64_t offset, uint64_t length, block::Extent& out) override;
    Task<Result<block::Extent>> load_map(block::Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> read_encoded(block::Request& rq, const block::Extent& extent, uint64_t offset, IoVec iov) override;
    Task<Result<>> decode_in_place(block::Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) override;
    Task<Result<>> encode_in_place(block::Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) override;
    uint32_t write_unit(uint64_t offset) override;
    Task<Result<block::WritePlan>> plan_write(block::Request& rq, uint64_t offset, uint64_t length,
                                              block::WriteFlags flags) override;
    Task<Result<>> commit_write(block::Request& rq, block::WritePlan& plan) override;
    Task<void> abort_write(block::Request& rq, block::WritePlan& plan) override;
    bool transforms_writes() const override { return header_.key != 0; }
    Task<Result<>> zero_mapped(block::Request& rq, uint64_t offset, uint64_t length, block::WriteFlags flags) override;
    Task<Result<>> discard_mapped(block::Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> write_compressed(block::Request& rq, uint64_t offset, IoVec iov) override;
    Task<Result<>> flush_metadata(block::Request& rq) override;
    Task<Result<>> do_resize(uint64_t new_size) override;
    uint32_t cluster_size() const override { return kBlock; }

  private:
    struct Plan;
    /// Entries as they were, to undo a change whose table page could not be written.
    using Undo = std::vector<std::pair<uint64_t, Entry>>;

    bool loaded(uint64_t index);
    Entry entry(uint64_t index);
    void set_entry(uint64_t index, const Entry& e);
    Task<Result<>> load_page(block::Request& rq, uint64_t page);
    Task<Result<>> load_range(block::Request& rq, uint64_t offset, uint64_t length);
    std::array<uint8_t, kPageBytes> page_bytes(uint64_t page);
    Task<Result<>> write_page(block::Request& rq, uint64_t page);
    /// Write-through: the pages of the entries just changed; undoes the changes on failure. Under alloc_mutex_.
    Task<Result<>> write_through(block::Request& rq, Undo undo);

    /// `count` blocks in a row, or fewer; `fresh`: never used before.
    uint64_t take_blocks(unsigned& count, bool& fresh);
    void give_back(uint64_t host, unsigned count);
    void free_later(uint64_t host);
    void apply_key(uint64_t host_offset, const IoVec& iov) const;

    Header header_;
    bool write_through_;
    bool forget_;

    AsyncMutex flush_mutex_;
    AsyncMutex alloc_mutex_;  // holders may change entries and drop pages
    AsyncMutex load_mutex_;
    std::mutex table_mutex_;
    std::vector<Entry> entries_;
    std::vector<uint8_t> page_loaded_, page_dirty_;

    mutable std::mutex space_mutex_;
    uint64_t next_host_ = 0;
    std::vector<uint64_t> free_;
    std::vector<uint64_t> awaiting_flush_;  // no request holds them any more, the table on disk may
    size_t retiring_ = 0;
    std::atomic<uint64_t> plans_{0};
};

extern const block::Driver kBlockFormatDriver;

}  // namespace gantry::test
