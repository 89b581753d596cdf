// Zeroes, discards and block status.

#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <new>

#include "block/protocols/file.h"
#include "runtime/blocking_pool.h"

namespace gantry::block {

namespace {

/// A search for data that takes longer than this waited for the disk; searches keep off the loop for a while then.
constexpr int64_t kSlowSeekNs = 500'000;
constexpr int64_t kSlowPeriodNs = 100'000'000;
/// One answer about many parts takes no longer, seen every so many parts: others on the loop wait for it.
constexpr int64_t kSeekShareNs = 250'000;
constexpr size_t kSeeksPerClock = 16;
/// Extents that one FIEMAP tells; fewer parts are not worth it.
constexpr size_t kMapExtents = 256;
constexpr size_t kMinMapParts = 16;

/// Where FIEMAP and SEEK_DATA tell the same: both ask the same function of the file system, which also knows what is in
/// memory only and has no place yet. They differ on preallocated extents alone. XFS is none of these: beside extents
/// that are shared, what was written into a hole stands in its COW fork until it is on disk; SEEK_DATA looks there,
/// FIEMAP tells a hole.
bool maps_truly(int fd) {
    struct statfs about{};
    return ::fstatfs(fd, &about) == 0 && about.f_type == EXT4_SUPER_MAGIC;
}

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

/// The same from the file system's extents, a fraction of the system calls. 0: ask it by searches.
size_t FileNode::mapped_statuses(uint64_t offset, uint64_t length, std::span<BlockStatus> out) {
    if (out.size() < kMinMapParts) return 0;
    auto can = can_map_.load(std::memory_order_relaxed);
    if (can == CanMap::kUnknown) {
        can = maps_truly(fd_.get()) ? CanMap::kYes : CanMap::kNo;
        can_map_.store(can, std::memory_order_relaxed);
    }
    if (can == CanMap::kNo) return 0;

    alignas(fiemap) std::array<std::byte, sizeof(fiemap) + kMapExtents * sizeof(fiemap_extent)> memory;
    auto* const map = new (memory.data()) fiemap{};
    auto* const extents = reinterpret_cast<const fiemap_extent*>(memory.data() + sizeof(fiemap));
    map->fm_start = offset;
    map->fm_length = length;
    // Each has a hole before it at most.
    map->fm_extent_count = static_cast<uint32_t>(std::min(kMapExtents, out.size() / 2));
    if (::ioctl(fd_.get(), FS_IOC_FIEMAP, map) != 0) {
        can_map_.store(CanMap::kNo, std::memory_order_relaxed);
        return 0;
    }
    const uint64_t end = offset + length;
    uint64_t pos = offset;
    size_t count = 0;
    const auto add = [&](uint64_t to, bool data) {
        to = std::min(to, end);
        if (to <= pos) return;
        if (count && out[count - 1].data == data) {
            out[count - 1].length += to - pos;
        } else if (count == out.size()) {
            return;
        } else {
            out[count] = {};
            out[count].length = to - pos;
            out[count].data = data;
            out[count++].zero = !data;
        }
        pos = to;
    };
    bool all = map->fm_mapped_extents < map->fm_extent_count;
    for (const fiemap_extent& extent : std::span(extents, map->fm_mapped_extents)) {
        add(extent.fe_logical, false);
        // Preallocated: what was written into it may be in memory only, which a search sees.
        if (extent.fe_flags & FIEMAP_EXTENT_UNWRITTEN) return count;
        add(extent.fe_logical + extent.fe_length, true);
        all = all || (extent.fe_flags & FIEMAP_EXTENT_LAST);
    }
    if (all) add(end, false);
    return count;
}

/// Where the file system has data: the parts from `offset` on, one system call each; how many. A failing search means
/// that it cannot tell: all data.
size_t FileNode::searched_statuses(uint64_t offset, uint64_t length, std::span<BlockStatus> out) {
    const int fd = fd_.get();
    const uint64_t end = offset + length;
    const int64_t until = monotonic_ns() + kSeekShareNs;
    uint64_t pos = offset;
    size_t count = 0;
    const auto add = [&](uint64_t to, bool data) {
        BlockStatus& status = out[count++];
        status = {};
        status.length = std::min(to, end) - pos;
        status.data = data;
        status.zero = !data;
        pos += status.length;
    };
    while (pos < end && count < out.size()) {
        if (count % kSeeksPerClock == kSeeksPerClock - 1 && monotonic_ns() > until) break;
        const off_t data = ::lseek(fd, static_cast<off_t>(pos), SEEK_DATA);
        if (data < 0) {
            // The end of the file, or a hole up to it; else it cannot tell.
            add(end, errno != ENXIO);
            break;
        }
        if (static_cast<uint64_t>(data) > pos) {
            add(static_cast<uint64_t>(data), false);
            if (pos == end || count == out.size()) break;
        }
        const off_t hole = ::lseek(fd, static_cast<off_t>(pos), SEEK_HOLE);
        if (hole <= static_cast<off_t>(pos)) {
            // Somebody made a hole here just now; "data" is never wrong.
            if (count == 0) add(end, true);
            break;
        }
        const uint64_t begin = pos;
        add(static_cast<uint64_t>(hole), true);
        if (static_cast<uint64_t>(hole) < end && count < out.size()) continue;
        const std::lock_guard lock(extent_mutex_);
        data_begin_ = begin;
        data_end_ = static_cast<uint64_t>(hole);
    }
    return count;
}

size_t FileNode::statuses_of(uint64_t offset, uint64_t length, std::span<BlockStatus> out) {
    size_t count = mapped_statuses(offset, length, out);
    if (count == 0) count = searched_statuses(offset, length, out);
    // This layer decides for every byte: what is no data reads as zeroes.
    uint64_t at = offset;
    for (BlockStatus& status : out.first(count)) {
        status.allocated = true;
        status.depth = 1;
        status.file = this;
        status.host_offset = at;
        status.has_offset = true;
        at += status.length;
        status.eof = at >= size();
    }
    return count;
}

bool FileNode::known_data(uint64_t offset, uint64_t length, BlockStatus& status) {
    const std::lock_guard lock(extent_mutex_);
    if (offset < data_begin_ || offset >= data_end_) return false;
    status = {};
    status.length = std::min(length, data_end_ - offset);
    status.data = status.allocated = status.has_offset = true;
    status.depth = 1;
    status.file = this;
    status.host_offset = offset;
    status.eof = offset + status.length >= size();
    return true;
}

Task<Result<BlockStatus>> FileNode::do_block_status(Request& rq, uint64_t offset, uint64_t length) {
    BlockStatus status;
    if (!known_data(offset, length, status)) {
        const Result<size_t> count = co_await do_block_statuses(rq, offset, length, std::span(&status, 1));
        if (!count) co_return std::unexpected(count.error());
    }
    co_return status;
}

Task<Result<size_t>> FileNode::do_block_statuses(Request&, uint64_t offset, uint64_t length,
                                                 std::span<BlockStatus> out) {
    if (known_data(offset, length, out[0])) co_return size_t{1};
    size_t count = 0;
    const int64_t begin = monotonic_ns();
    // Usually a microsecond per system call; a cold extent tree is read from disk.
    if (begin >= seek_slow_until_ns_.load(std::memory_order_relaxed)) {
        count = statuses_of(offset, length, out);
    } else {
        count = co_await run_blocking([&] { return statuses_of(offset, length, out); });
    }
    const int64_t end = monotonic_ns();
    if (end - begin > kSlowSeekNs) seek_slow_until_ns_.store(end + kSlowPeriodNs, std::memory_order_relaxed);
    co_return count;
}

}  // namespace gantry::block
