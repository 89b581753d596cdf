// Zeroes, discards and block status.

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "block/protocols/file.h"
#include "runtime/blocking_pool.h"

namespace gantry::block {

namespace {

/// A search for data that takes longer than this waited for the disk; searches keep off the loop for a while then.
constexpr int64_t kSlowSeekNs = 500'000;
constexpr int64_t kSlowPeriodNs = 100'000'000;

}  // namespace

int FileNode::zero_blocking(const ZeroRequest& rq) {
    return zero_file_range(fd_.get(), can_, rq, attributes_.direct ? attributes_.request_alignment : 1);
}

int FileNode::discard_blocking(uint64_t offset, uint64_t length) {
    return discard_file_range(fd_.get(), can_, offset, length);
}

Task<Result<>> FileNode::do_write_zeroes(Request&, uint64_t offset, uint64_t length, WriteFlags flags) {
    const ZeroRequest zero{offset, length, has(flags, WriteFlags::kMayUnmap), has(flags, WriteFlags::kNoFallback)};
    const bool fua = has(flags, WriteFlags::kFua);
    int r = sync_error_.load(std::memory_order_relaxed);
    if (fua && r) co_return fail_errno(r, "zeroing {} bytes of '{}' at {}", length, filename(), offset);
    r = co_await run_blocking([&] { return zero_blocking(zero); });
    forget_data_extent();
    if (r == -ENOTSUP) {
        co_return fail(ErrorKind::kUnsupported, "'{}' cannot zero {} bytes at {} without writing them", filename(),
                       length, offset);
    }
    if (!dirty_.load(std::memory_order_relaxed)) dirty_.store(true, std::memory_order_relaxed);
    if (direct_.load(std::memory_order_relaxed) && offset + length > size())
        padded_.store(true, std::memory_order_relaxed);
    if (r < 0) co_return fail_errno(-r, "zeroing {} bytes of '{}' at {}", length, filename(), offset);
    if (fua) {
        // The allocation is metadata: only a sync makes it stable.
        Request rq = Request::internal();
        co_return co_await do_flush(rq);
    }
    co_return Result<>();
}

Task<Result<>> FileNode::do_discard(Request&, uint64_t offset, uint64_t length) {
    const int r = co_await run_blocking([&] { return discard_blocking(offset, length); });
    forget_data_extent();
    if (r == 0) {
        if (!dirty_.load(std::memory_order_relaxed)) dirty_.store(true, std::memory_order_relaxed);
        discards_ok_.fetch_add(1, std::memory_order_relaxed);
        discarded_bytes_.fetch_add(length, std::memory_order_relaxed);
        co_return Result<>();
    }
    discards_failed_.fetch_add(1, std::memory_order_relaxed);
    if (r == -ENOTSUP) {
        co_return fail(ErrorKind::kUnsupported, "'{}' cannot discard {} bytes at {}", filename(), length, offset);
    }
    co_return fail_errno(-r, "discarding {} bytes of '{}' at {}", length, filename(), offset);
}

void FileNode::forget_data_extent() {
    const std::lock_guard lock(extent_mutex_);
    data_begin_ = data_end_ = 0;
}

/// Where the file system has data. A failing search means that it cannot tell: all data.
BlockStatus FileNode::status_of(uint64_t offset, uint64_t length) {
    BlockStatus status;
    status.length = length;
    status.data = true;
    const int fd = fd_.get();
    const off_t data = ::lseek(fd, static_cast<off_t>(offset), SEEK_DATA);
    if (data < 0 && errno == ENXIO) {
        // The end of the file, or a hole up to it.
        status.data = false;
        status.zero = true;
    } else if (data > static_cast<off_t>(offset)) {
        status.data = false;
        status.zero = true;
        status.length = std::min(length, static_cast<uint64_t>(data) - offset);
    } else if (data == static_cast<off_t>(offset)) {
        const off_t hole = ::lseek(fd, static_cast<off_t>(offset), SEEK_HOLE);
        if (hole > static_cast<off_t>(offset)) {
            const auto end = static_cast<uint64_t>(hole);
            status.length = std::min(length, end - offset);
            const std::lock_guard lock(extent_mutex_);
            data_begin_ = offset;
            data_end_ = end;
        }
        // Else somebody made a hole here just now; "data" is never wrong.
    }
    return status;
}

Task<Result<BlockStatus>> FileNode::do_block_status(Request&, uint64_t offset, uint64_t length) {
    BlockStatus status;
    bool known = false;
    {
        const std::lock_guard lock(extent_mutex_);
        if (offset >= data_begin_ && offset < data_end_) {
            known = true;
            status.data = true;
            status.length = std::min(length, data_end_ - offset);
        }
    }
    if (!known) {
        const int64_t begin = monotonic_ns();
        // Usually two system calls of a microsecond; a cold extent tree is read from disk.
        if (begin >= seek_slow_until_ns_.load(std::memory_order_relaxed)) {
            status = status_of(offset, length);
        } else {
            status = co_await run_blocking([&] { return status_of(offset, length); });
        }
        const int64_t end = monotonic_ns();
        if (end - begin > kSlowSeekNs) seek_slow_until_ns_.store(end + kSlowPeriodNs, std::memory_order_relaxed);
    }
    // This layer decides for every byte: what is no data reads as zeroes.
    status.allocated = true;
    status.depth = 1;
    status.file = this;
    status.host_offset = offset;
    status.has_offset = true;
    status.eof = offset + status.length >= size();
    co_return status;
}

}  // namespace gantry::block
