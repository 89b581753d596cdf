// ExportDisk: a node in memory for tests of exporters, with a map of holes and switches to hold requests, to fail them
// and to report holes.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "block/driver.h"
#include "block/graph.h"
#include "block/node.h"
#include "runtime/timer.h"

namespace gantry::test {

/// Driver "memory": {driver, node-name, size, fast?: bool, alignment?: int, read-only?: bool, zeroes?: bool}. Unwritten
/// pages are holes. Any loop.
class ExportDisk final : public block::Node {
  public:
    static constexpr size_t kPage = 4096;

    ExportDisk(std::string name, block::NodeFlags flags, uint64_t size, bool fast, uint32_t alignment, bool fast_zero)
        : Node("memory", std::move(name), flags),
          bytes_((size + kPage - 1) / kPage * kPage),
          present_(bytes_.size() / kPage) {
        set_size(size);
        limits_.request_alignment = alignment;
        limits_.supports_zeroes = fast_zero;
        allow_fast_paths(fast, fast);
    }

    std::atomic<bool> hold{false};             // requests wait while it is set
    std::atomic<int> held{0};                  // how many wait
    std::atomic<bool> cancel_releases{false};  // cancel_in_flight() lets go those that wait
    std::atomic<int> fail_reads{0}, fail_writes{0}, fail_flush{0}, fail_status{0};  // errno, 0: work
    std::atomic<uint64_t> reads{0}, writes{0}, flushes{0}, discards{0}, zeroes{0}, fua_writes{0}, preloads{0};
    std::atomic<bool> last_zero_may_unmap{false};

    std::vector<uint8_t> contents() {
        const std::lock_guard lock(m_);
        return {bytes_.begin(), bytes_.begin() + static_cast<ptrdiff_t>(size())};
    }
    void fill(uint64_t offset, uint64_t length, uint8_t byte) {
        const std::lock_guard lock(m_);
        std::memset(bytes_.data() + offset, byte, length);
        mark(offset, length, true);
    }

    Task<Result<>> do_read(block::Request&, uint64_t offset, IoVec iov) override {
        ++reads;
        co_await wait_while_held();
        if (const int e = fail_reads.load()) co_return fail_errno(e, "reading memory");
        read_bytes(offset, iov);
        co_return Result<>();
    }
    Task<Result<>> do_write(block::Request&, uint64_t offset, IoVec iov, block::WriteFlags flags) override {
        ++writes;
        if (block::has(flags, block::WriteFlags::kFua)) ++fua_writes;
        co_await wait_while_held();
        if (const int e = fail_writes.load()) co_return fail_errno(e, "writing memory");
        write_bytes(offset, iov);
        co_return Result<>();
    }
    Task<Result<>> do_write_zeroes(block::Request&, uint64_t offset, uint64_t length,
                                   block::WriteFlags flags) override {
        ++zeroes;
        co_await wait_while_held();
        const bool unmap = block::has(flags, block::WriteFlags::kMayUnmap);
        last_zero_may_unmap = unmap;
        const std::lock_guard lock(m_);
        std::memset(bytes_.data() + offset, 0, length);
        mark(offset, length, !unmap);
        co_return Result<>();
    }
    Task<Result<>> do_discard(block::Request&, uint64_t offset, uint64_t length) override {
        ++discards;
        co_await wait_while_held();
        const std::lock_guard lock(m_);
        const uint64_t first = (offset + kPage - 1) / kPage, last = (offset + length) / kPage;
        for (uint64_t page = first; page < last; ++page) {
            std::memset(bytes_.data() + page * kPage, 0, kPage);
            present_[page] = false;
        }
        co_return Result<>();
    }
    Task<Result<>> do_flush(block::Request&) override {
        ++flushes;
        co_await wait_while_held();
        if (const int e = fail_flush.load()) co_return fail_errno(e, "flushing memory");
        co_return Result<>();
    }
    Task<Result<>> do_preload(block::Request&, uint64_t, uint64_t) override {
        ++preloads;
        co_return Result<>();
    }
    Task<Result<block::BlockStatus>> do_block_status(block::Request&, uint64_t offset, uint64_t length) override {
        if (const int e = fail_status.load()) co_return fail_errno(e, "asking memory");
        const std::lock_guard lock(m_);
        block::BlockStatus status;
        const bool here = present_[offset / kPage];
        uint64_t end = offset / kPage + 1;
        while (end * kPage < offset + length && present_[end] == here) ++end;
        status.length = std::min(end * kPage, offset + length) - offset;
        status.data = here;
        status.zero = !here;
        status.allocated = here;
        co_return status;
    }
    int do_try_read(block::Request&, uint64_t offset, const IoVec& iov) override {
        if (hold.load()) return -EAGAIN;
        ++reads;
        if (const int e = fail_reads.load()) return -e;
        read_bytes(offset, iov);
        return 0;
    }
    int do_try_write(block::Request&, uint64_t offset, const IoVec& iov, block::WriteFlags flags) override {
        if (hold.load() || block::has(flags, block::WriteFlags::kFua)) return -EAGAIN;
        ++writes;
        if (const int e = fail_writes.load()) return -e;
        write_bytes(offset, iov);
        return 0;
    }

    void cancel_in_flight() override {
        if (cancel_releases.load()) ++cancelled_;
    }

    static Task<Result<std::shared_ptr<Node>>> open(block::OpenContext& context) {
        const schema::Options options = context.options();
        co_return std::make_shared<ExportDisk>(
            context.node_name(), context.flags(), options.size("size", 1 << 20), options.flag("fast", true),
            static_cast<uint32_t>(options.size("alignment", 1)), options.flag("zeroes", true));
    }

  private:
    Task<void> wait_while_held() {
        if (!hold.load()) co_return;
        ++held;
        const int before = cancelled_.load();
        while (hold.load() && cancelled_.load() == before) co_await sleep_for(std::chrono::microseconds(100));
        --held;
    }
    void read_bytes(uint64_t offset, const IoVec& iov) {
        const std::lock_guard lock(m_);
        copy_to_iovec(iov, 0, bytes_.data() + offset, iov.bytes);
    }
    void write_bytes(uint64_t offset, const IoVec& iov) {
        const std::lock_guard lock(m_);
        copy_from_iovec(iov, 0, bytes_.data() + offset, iov.bytes);
        mark(offset, iov.bytes, true);
    }
    void mark(uint64_t offset, uint64_t length, bool here) {
        if (length == 0) return;
        for (uint64_t page = offset / kPage; page <= (offset + length - 1) / kPage; ++page) present_[page] = here;
    }

    std::atomic<int> cancelled_{0};
    std::mutex m_;
    std::vector<uint8_t> bytes_;
    std::vector<bool> present_;
};

inline constinit const block::Driver kExportDiskDriver{.name = "memory", .open = ExportDisk::open, .is_protocol = true};

}  // namespace gantry::test
