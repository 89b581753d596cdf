// FileNode: the leaf over a regular file; host_device.h derives the block device from it.

#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "block/driver.h"
#include "block/node.h"
#include "block/protocols/file_locks.h"
#include "block/protocols/file_open.h"
#include "block/protocols/file_options.h"
#include "block/protocols/file_write_queue.h"
#include "block/protocols/file_zeroes.h"
#include "block/request_epochs.h"
#include "runtime/sync.h"

namespace gantry::block {

extern const Driver kFileDriver;
extern const Driver kHostDeviceDriver;

/// Buffered reads are tried inline (RWF_NOWAIT) and go to the loop's back end when the page cache has not got them;
/// buffered writes run inline while the file is fast, else on the blocking pool; O_DIRECT goes through the back end.
///
/// Open for writing only while somebody may write (auto-read-only); the descriptor is exchanged by dup3() under the
/// same number, so a system call of another loop uses either the old or the new description, never a stranger's.
class FileNode : public Node {
  public:
    FileNode(std::string_view driver, std::string name, const NodeFlags& flags, FileOptions options, FileKind kind,
             OpenedFile file, bool use_locks);
    ~FileNode() override;

    // file_read.cc
    Task<Result<>> do_read(Request& rq, uint64_t offset, IoVec iov) override;
    int do_try_read(Request& rq, uint64_t offset, const IoVec& iov) override;
    Task<Result<>> do_preload(Request& rq, uint64_t offset, uint64_t length) override;
    // file_write.cc
    Task<Result<>> do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) override;
    int do_try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) override;
    Task<Result<>> do_flush(Request& rq) override;
    // file_allocation.cc
    Task<Result<>> do_write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) override;
    Task<Result<>> do_discard(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<BlockStatus>> do_block_status(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<size_t>> do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                           std::span<BlockStatus> out) override;
    // file.cc
    Task<Result<>> do_resize(uint64_t new_size) override;
    Task<void> close() override;
    std::string filename() const override { return options_.filename; }
    Task<Result<ImageInfo>> image_info() override;
    json::object driver_stats() const override;
    Result<Passthrough> passthrough() override { return Passthrough{fd_.get(), 0}; }
    // file_perms.cc
    Task<Result<>> prepare_perms(EdgePerms perms) override;
    void commit_perms(EdgePerms perms) override;
    void abort_perms() override;
    Task<Result<>> prepare_reopen(const json::object& options, const NodeFlags& flags) override;
    void commit_reopen() override;
    void abort_reopen() override;

  protected:
    // What differs between a file and a device; on the blocking pool. 0, -ENOTSUP or -errno.
    virtual int zero_blocking(const ZeroRequest& rq);
    virtual int discard_blocking(uint64_t offset, uint64_t length);
    /// Takes what depends on the descriptor: limits, alignment, whether inline I/O makes sense.
    virtual void adopt_limits();

    int fd() const { return fd_.get(); }
    FileKind kind() const { return kind_; }
    const FileOptions& file_options() const { return options_; }
    FileAbilities can_;

  private:
    /// A change of permissions, of flags, or of both, between prepare and commit.
    struct Pending {
        std::optional<EdgePerms> perms;
        std::optional<NodeFlags> flags;
        bool never_writable = false;
        std::optional<uint64_t> size;    // as found by the reopen, or by the first user after a time without any
        std::optional<OpenedFile> file;  // a new description, when the mode changes; holds no locks before its commit
        FileLockSet locks;               // held on fd_: the union of old and new
    };

    // file_read.cc
    int read_now(uint64_t offset, const IoVec& iov);
    // file_write.cc
    bool write_inline_ok(size_t bytes, int64_t now_ns) const;
    void note_write(uint64_t end, size_t bytes, int64_t took_ns, bool blocked);
    void note_slow_write(bool blocked);
    int write_now(uint64_t offset, const IoVec& iov, int64_t begin_ns);
    Task<int> write_buffered(const Request& rq, uint64_t offset, IoVec iov);
    Task<int> write_direct(uint64_t offset, IoVec iov, int rw_flags);
    int write_stable(uint64_t offset, const IoVec& iov);
    /// The page cache has lost something: no flush succeeds any more.
    void note_sync_error(int e);
    // file_allocation.cc
    size_t statuses_of(uint64_t offset, uint64_t length, std::span<BlockStatus> out);
    size_t mapped_statuses(uint64_t offset, uint64_t length, std::span<BlockStatus> out);
    size_t searched_statuses(uint64_t offset, uint64_t length, std::span<BlockStatus> out);
    bool known_data(uint64_t offset, uint64_t length, BlockStatus& status);
    void forget_data_extent();
    // file.cc
    void take_mode(const OpenedFile& file);
    int cut_padding();
    // file_perms.cc
    FileLockSet wanted_locks(const NodeFlags& flags, EdgePerms perms) const;
    Task<Result<>> prepare(const NodeFlags& flags, EdgePerms perms, bool never_writable);
    void forget_pending_part(bool perms);
    void take_pending_size();
    void finish_commit();
    void exchange_descriptor();
    void leave_description();

    FileOptions options_;
    const FileKind kind_;
    bool use_locks_;

    // ---- Any loop ----
    UniqueFd fd_;  // the number never changes while open
    std::atomic<bool> direct_{false};
    std::atomic<bool> writable_{false};
    std::atomic<bool> nowait_{true};         // the file system has RWF_NOWAIT reads
    std::atomic<bool> dirty_{false};         // written since the last flush began
    std::atomic<bool> padded_{false};        // an O_DIRECT write may have made the file longer than size()
    std::atomic<int64_t> slow_until_ns_{0};  // writes go to the pool until then
    std::atomic<int64_t> watch_until_ns_{0};
    std::atomic<int64_t> slow_period_ns_{0};  // how long that was
    std::atomic<int64_t> seek_slow_until_ns_{0};
    enum class CanMap : uint8_t { kUnknown, kYes, kNo };
    std::atomic<CanMap> can_map_{CanMap::kUnknown};
    std::atomic<int> sync_error_{0};  // errno of the first flush that failed; never reset
    RequestEpochs syncs_;             // calls that may be told of a lost page, until that is in sync_error_
    FileWriteQueue writes_;

    // The last extent of data that was found. Holes are not remembered: others may fill them, and "data" is never
    // wrong.
    std::mutex extent_mutex_;  // a leaf lock
    uint64_t data_begin_ = 0, data_end_ = 0;

    std::atomic<uint64_t> discards_ok_{0}, discards_failed_{0}, discarded_bytes_{0};

    // ---- Main loop ----
    NodeFlags mode_;  // the flags that the descriptor serves
    EdgePerms perms_;
    bool never_writable_ = false;
    OpenedFile attributes_;  // its fd is unused
    FileLockSet locks_;
    Pending pending_;
    uint32_t looks_ = 0;  // image_info() under way: close() waits for them
    WaitQueue looked_;
};

/// Opens a node of either kind.
Task<Result<std::shared_ptr<FileNode>>> open_file_node(OpenContext& ctx, std::string_view driver, FileKind kind);

/// Nanoseconds of the monotonic clock.
int64_t monotonic_ns();

}  // namespace gantry::block
