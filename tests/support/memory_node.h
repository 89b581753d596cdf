// The driver "memory": a protocol node in RAM for tests, with delays, faults, a gate and any limits.

#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "block/driver.h"
#include "runtime/buffer.h"
#include "runtime/sync.h"
#include "runtime/unique_fd.h"

namespace gantry::test {

/// The bytes, apart from the node, so that they outlive it: a node opened later with the same "disk" name finds them
/// again. Any thread.
class MemoryDisk {
  public:
    static constexpr uint64_t kCapacity = uint64_t{1} << 30;  // sparse

    enum class Op : uint8_t { kRead, kWrite, kZeroes, kDiscard, kFlush, kCount };

    /// The disk of that name, made on first use; forget() drops it (open nodes keep theirs).
    static std::shared_ptr<MemoryDisk> named(std::string_view name);
    static void forget(std::string_view name);

    MemoryDisk();
    ~MemoryDisk();

    uint64_t size() const { return size_.load(); }
    /// What lies beyond a smaller size is zero when the disk grows again.
    void resize(uint64_t size);
    void read(uint64_t offset, void* to, size_t length) const;
    /// `grow`: a larger size() when the end lies beyond it.
    void write(uint64_t offset, const void* from, size_t length, bool grow = true);
    void zero(uint64_t offset, uint64_t length, bool grow = true);
    std::vector<uint8_t> bytes(uint64_t offset, size_t length) const;
    int fd() const { return fd_.get(); }

    /// Called at the start of every operation, on the request's loop: an errno fails it, 0 lets it go. Null: none.
    void set_fault(std::function<int(Op, uint64_t offset, uint64_t length)> fault);
    int fault(Op op, uint64_t offset, uint64_t length) const;
    bool has_fault() const { return has_fault_.load(); }

    /// While closed, requests wait inside the node; at_gate() counts them.
    void close_gate() { gate_.reset(); }
    void open_gate() { gate_.set(); }
    AsyncEvent& gate() { return gate_; }
    uint64_t at_gate() const { return at_gate_.load(); }

    uint64_t count(Op op) const { return counts_[static_cast<size_t>(op)].load(); }

    /// What the graph did to the node: "prepare_perms", "commit_perms", "quiesce", ... Main loop.
    std::vector<std::string> events;
    /// The text of the error with which the next prepare_perms / prepare_reopen fails; empty: they succeed. Main loop.
    std::string perms_error, reopen_error;

  private:
    friend class MemoryNode;
    UniqueFd fd_;
    uint8_t* base_ = nullptr;
    std::atomic<uint64_t> size_{0};
    mutable std::mutex mutex_;
    std::function<int(Op, uint64_t, uint64_t)> fault_;
    std::atomic<bool> has_fault_{false};
    AsyncEvent gate_;
    std::atomic<uint64_t> at_gate_{0};
    std::atomic<uint64_t> counts_[static_cast<size_t>(Op::kCount)] = {};
};

/// Options: size (for a disk that has none yet), disk (a name; absent: a fresh one), latency-ns (reopen may change it),
/// and of the limits: request-alignment, memory-alignment, max-transfer, discard-alignment, zeroes-alignment, growable,
/// fua, no-zeroes, no-inline.
class MemoryNode final : public block::Node {
  public:
    MemoryNode(const block::OpenContext& context, std::shared_ptr<MemoryDisk> disk);

    MemoryDisk& disk() const { return *disk_; }
    bool quiesced() const { return quiesced_; }

    Task<Result<>> do_read(block::Request& rq, uint64_t offset, IoVec iov) override;
    Task<Result<>> do_write(block::Request& rq, uint64_t offset, IoVec iov, block::WriteFlags flags) override;
    Task<Result<>> do_write_zeroes(block::Request& rq, uint64_t offset, uint64_t length,
                                   block::WriteFlags flags) override;
    Task<Result<>> do_discard(block::Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> do_flush(block::Request& rq) override;
    int do_try_read(block::Request& rq, uint64_t offset, const IoVec& iov) override;
    int do_try_write(block::Request& rq, uint64_t offset, const IoVec& iov, block::WriteFlags flags) override;
    Task<Result<>> do_resize(uint64_t new_size) override;
    Task<void> quiesce() override;
    void unquiesce() override;
    Task<void> close() override;
    Task<Result<>> prepare_perms(block::EdgePerms perms) override;
    void commit_perms(block::EdgePerms perms) override;
    void abort_perms() override;
    Task<Result<>> prepare_reopen(const json::object& options, const block::NodeFlags& flags) override;
    void commit_reopen() override;
    void abort_reopen() override;
    std::string filename() const override;
    Result<Passthrough> passthrough() override;

  private:
    Task<Result<>> enter(MemoryDisk::Op op, uint64_t offset, uint64_t length);
    int enter_inline(MemoryDisk::Op op);

    std::shared_ptr<MemoryDisk> disk_;
    std::atomic<int64_t> latency_ns_;
    int64_t next_latency_ns_ = 0;
    bool quiesced_ = false;
};

extern const block::Driver kMemoryDriver;

}  // namespace gantry::test
