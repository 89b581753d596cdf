// FileService: answers requests for the one file of an export, whichever way they came.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "block/root.h"
#include "fuse/attributes.h"
#include "fuse/call.h"
#include "runtime/sync.h"
#include "runtime/task.h"

namespace gantry::fuse {

struct ServiceOptions {
    bool writable = false;
    bool growable = false;        // writes and zeroing beyond the end enlarge the node
    bool honour_o_trunc = false;  // open(O_TRUNC) cuts the file
    bool allow_other = false;     // somebody else than the mounting user can get here: modes and owners may be changed
    bool cached = false;          // the kernel may keep pages (read-only exports)
    uint32_t uid = 0, gid = 0;    // who owns the file
    /// Makes the node `size` bytes long; only called on the main loop. `grow_only`: nothing happens when it is as
    /// large.
    std::function<Task<Result<>>(uint64_t size, bool grow_only)> resize = {};
    /// Bytes that the image takes up, for st_blocks (allocated_bytes() below); nullopt: unknown. Only called on the
    /// main loop, at most every few milliseconds. Empty: always unknown.
    std::function<Task<std::optional<uint64_t>>()> allocated = {};
    /// Mode or owner have changed, and nobody was told yet. On the loop of the call. Empty: nobody wants to know.
    std::function<void()> status_changed = {};
};

/// What the storage of `node` takes up. Main loop; takes no lock of the graph.
Task<std::optional<uint64_t>> allocated_bytes(std::shared_ptr<block::Node> node);

/// When the file that holds the data of `node` was written last, in nanoseconds since 1970; nullopt: there is no such
/// file. Main loop; `node` has a user.
Task<std::optional<int64_t>> last_written_ns(std::shared_ptr<block::Node> node);

/// Any loop unless said otherwise: each call on the loop of the channel that is passed with it. spec/fuse.md section 1.
/// While its channel is drained a call waits holding nothing, and no call waits for the main loop inside a request of
/// its channel. Lock order: resize_mutex_, then nothing of ours.
class FileService {
  public:
    FileService(Loop& main_loop, ServiceOptions options);
    ~FileService();

    /// Answers at once what needs no waiting; false: answer() must.
    bool try_answer(Call& call, block::Channel& channel);
    /// Answers (or marks it silent) what try_answer() has refused. `call` and its memory stay until completion.
    Task<void> answer(Call& call, block::Channel& channel);

    /// From now on OPEN hands out the file behind this id of the kernel (passthrough) and `fd` tells its times and
    /// blocks; it stays open until no call can use it any more. 0: no longer.
    void set_backing(int32_t backing_id, int fd = -1);
    /// The node has another size, changed by whomever: the file has changed.
    void touched();
    /// Calls that go on for long (zeroing terabytes) end with EINTR at their next step, also later ones.
    void hurry();
    /// Files that are open at present. READs and WRITEs need one.
    uint64_t open_files() const { return open_files_.load(std::memory_order_relaxed); }
    /// As a process before this one has counted, which may have written what it did not flush. Before the first call.
    void adopt_open_files(uint64_t count) {
        open_files_.store(count, std::memory_order_relaxed);
        unflushed_.store(options_.writable, std::memory_order_relaxed);
    }
    Attributes& attributes() { return attributes_; }

  private:
    struct LongCall;

    bool try_read(Call& call, block::Channel& channel);
    bool try_write(Call& call, block::Channel& channel);
    void open(Call& call);
    void release();
    void statfs(Call& call, block::Channel& channel) const;
    /// Bits, rights and sizes; fails `call` and says false.
    bool check_setattr(Call& call, const SetattrIn& in) const;
    bool attributes_known() const;

    Task<void> do_read(Call& call, block::Channel& channel);
    Task<void> do_write(Call& call, block::Channel& channel);
    Task<void> do_open(Call& call, block::Channel& channel);
    Task<void> do_flush(Call& call, block::Channel& channel);
    Task<void> do_getattr(Call& call, block::Channel& channel);
    Task<void> do_setattr(Call& call, block::Channel& channel);
    Task<void> do_fallocate(Call& call, block::Channel& channel);
    Task<void> do_lseek(Call& call, block::Channel& channel);

    /// A positive errno, 0: done.
    Task<int> zero(const LongCall& self, block::Channel& channel, uint64_t offset, uint64_t length,
                   block::WriteFlags flags);
    Task<int> punch(const LongCall& self, block::Channel& channel, uint64_t offset, uint64_t length);
    Task<int> allocate(const LongCall& self, block::Channel& channel, const FallocateIn& in);
    /// Makes the node at least `size` bytes long; it may become a little longer where its format counts in sectors.
    Task<Result<>> grow(block::Channel& channel, uint64_t size);
    Task<Result<>> truncate(block::Channel& channel, uint64_t size);
    Task<Result<>> resize_on_main(uint64_t size, bool grow_only);
    Task<void> refresh_allocation();
    void written();

    Loop& main_loop_;
    ServiceOptions options_;
    Attributes attributes_;
    AsyncMutex resize_mutex_;  // one change of the size at a time
    std::atomic<int32_t> backing_id_{0};
    std::atomic<int> backing_fd_{-1};
    std::atomic<bool> hurry_{false};
    std::atomic<bool> asking_allocation_{false};
    std::mutex long_calls_mutex_;  // of the list, a few instructions
    LongCall* long_calls_ = nullptr;
    alignas(64) std::atomic<uint64_t> open_files_{0};
    /// Something was written since the last flush began. Written by writing loops when it changes.
    alignas(64) std::atomic<bool> unflushed_{false};
};

}  // namespace gantry::fuse
