// Writes: inline while the file is fast, else on the blocking pool; O_DIRECT through the loop's back end. And flushes.

#include <fcntl.h>
#include <limits.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>

#include "block/protocols/file.h"
#include "runtime/io.h"

namespace gantry::block {

namespace {

/// More than this is copied by the pool, so that the loop stays responsive.
constexpr size_t kInlineMax = 1 << 20;
/// Who has tried, or chosen not to try, a write of more than this inline wants it done beside the loop.
constexpr size_t kOverlapMin = 128 << 10;
/// A buffered write that takes longer than this plus its copying was throttled or waited for the disk - or its thread
/// was kept from a processor, as happens on a busy machine. After one, writes are looked at closely (a system call
/// more) for a while, and one that then sleeps that long moves the file's writes off the loop: longer each time when
/// the next one follows soon.
constexpr int64_t kSlowNs = 1'000'000;
constexpr int64_t kWatchPeriodNs = 1'000'000'000;
constexpr int64_t kFirstSlowPeriodNs = 4'000'000;
constexpr int64_t kLastSlowPeriodNs = 256'000'000;

/// Copying at 1 byte per nanosecond is not yet a reason to call a write slow.
bool is_slow(size_t bytes, int64_t took_ns) { return took_ns > kSlowNs + static_cast<int64_t>(bytes); }

}  // namespace

bool FileNode::write_inline_ok(size_t bytes, int64_t now_ns) const {
    return bytes <= kInlineMax && now_ns >= slow_until_ns_.load(std::memory_order_relaxed);
}

/// After every write that has reached the file, also a failed one (part of it may have). No shared line is written when
/// nothing changes.
void FileNode::note_write(uint64_t end, size_t bytes, int64_t took_ns, bool blocked) {
    if (!dirty_.load(std::memory_order_relaxed)) dirty_.store(true, std::memory_order_relaxed);
    if (took_ns > kSlowNs && is_slow(bytes, took_ns)) note_slow_write(blocked);
    if (end > size() && direct_.load(std::memory_order_relaxed)) padded_.store(true, std::memory_order_relaxed);
}

void FileNode::note_slow_write(bool blocked) {
    const int64_t now = monotonic_ns();
    watch_until_ns_.store(now + kWatchPeriodNs, std::memory_order_relaxed);
    if (!blocked) return;
    const int64_t last = slow_period_ns_.load(std::memory_order_relaxed);
    const bool soon = now < slow_until_ns_.load(std::memory_order_relaxed) + 8 * last;
    const int64_t period = soon ? std::clamp(last * 2, kFirstSlowPeriodNs, kLastSlowPeriodNs) : kFirstSlowPeriodNs;
    slow_period_ns_.store(period, std::memory_order_relaxed);
    slow_until_ns_.store(now + period, std::memory_order_relaxed);
}

/// Inline: 0 or -errno.
int FileNode::write_now(uint64_t offset, const IoVec& iov, int64_t begin_ns) {
    const bool watched = begin_ns < watch_until_ns_.load(std::memory_order_relaxed);
    const int64_t switches = watched ? voluntary_switches() : 0;
    const ssize_t n = ::pwritev(fd_.get(), iov.data, static_cast<int>(std::min<uint32_t>(iov.count, IOV_MAX)),
                                static_cast<off_t>(offset));
    int r = 0;
    if (n < 0 && errno != EINTR) {
        r = -errno;
    } else if (static_cast<size_t>(n) != iov.bytes) {
        const size_t done = n < 0 ? 0 : static_cast<size_t>(n);
        const IoVecSlice rest(iov, done, iov.bytes - done);
        r = write_all(fd_.get(), rest.view(), offset + done, 0);
    }
    const int64_t took_ns = monotonic_ns() - begin_ns;
    note_write(offset + iov.bytes, iov.bytes, took_ns,
               watched && took_ns > kSlowNs && voluntary_switches() != switches);
    return r;
}

int FileNode::do_try_write(Request&, uint64_t offset, const IoVec& iov, WriteFlags flags) {
    if (has(flags, WriteFlags::kFua) || direct_.load(std::memory_order_relaxed) ||
        !writable_.load(std::memory_order_relaxed)) {
        return -EAGAIN;
    }
    const int64_t now = monotonic_ns();
    if (!write_inline_ok(iov.bytes, now)) return -EAGAIN;
    const int r = write_now(offset, iov, now);
    return r == -EAGAIN ? -EIO : r;
}

Task<int> FileNode::write_buffered(const Request& rq, uint64_t offset, IoVec iov) {
    const int64_t now = monotonic_ns();
    const bool beside = rq.inline_tried && iov.bytes > kOverlapMin;
    if (!beside && write_inline_ok(iov.bytes, now)) co_return write_now(offset, iov, now);
    auto write = writes_.write(fd_.get(), iov, offset);
    const int r = co_await write;
    note_write(offset + iov.bytes, iov.bytes, write.took_ns, write.blocked);
    co_return r;
}

Task<int> FileNode::write_direct(uint64_t offset, IoVec iov, int rw_flags) {
    size_t done = 0;
    int r = 0;
    while (done < iov.bytes) {
        const IoVecSlice rest(iov, done, iov.bytes - done);
        const int n = co_await io_writev(fd_.get(), rest.view(), offset + done, rw_flags);
        if (n == -EINTR) continue;
        if (n == -EAGAIN) {
            const IoVec left = rest.view();
            r = co_await run_blocking([&] { return write_all(fd_.get(), left, offset + done, rw_flags); });
            break;
        }
        if (n <= 0) {
            r = n < 0 ? n : -EIO;
            break;
        }
        done += static_cast<size_t>(n);
    }
    note_write(offset + iov.bytes, iov.bytes, 0, false);
    co_return r;
}

void FileNode::note_sync_error(int e) {
    int none = 0;
    sync_error_.compare_exchange_strong(none, e);
}

/// Buffered FUA, on the pool: 0 or -errno. The kernel reports a lost page once per description, to whichever sync comes
/// first, so the error may be about an earlier write: the next flush must not succeed.
int FileNode::write_stable(uint64_t offset, const IoVec& iov) {
    const RequestEpochs::Token token = syncs_.enter();
    int r = write_all(fd_.get(), iov, offset, RWF_DSYNC);
    bool lost = r == -EIO;
    // No space for this write is its own affair; for the pages that it waited for it is a loss.
    if (r == -ENOSPC || r == -EDQUOT) lost = write_all(fd_.get(), iov, offset, 0) == 0;
    if (lost) note_sync_error(-r);
    syncs_.leave(token);
    if (r == 0) r = -sync_error_.load();
    return r;
}

Task<Result<>> FileNode::do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    const bool fua = has(flags, WriteFlags::kFua);
    int r;
    if (direct_.load(std::memory_order_relaxed)) {
        RequestEpochs::Token token;
        if (fua) token = syncs_.enter();
        r = co_await write_direct(offset, iov, fua ? RWF_DSYNC : 0);
        if (fua) {
            if (r == -EIO) note_sync_error(EIO);
            syncs_.leave(token);
            if (r == 0) r = -sync_error_.load();
        }
    } else if (fua) {
        // Waits for the disk. Not through the write queue: these overlap there and share the journal's commits.
        r = co_await run_blocking([&] { return write_stable(offset, iov); });
        note_write(offset + iov.bytes, iov.bytes, 0, false);
    } else {
        r = co_await write_buffered(rq, offset, iov);
    }
    if (r < 0) co_return fail_errno(-r, "writing {} bytes to '{}' at {}", iov.bytes, filename(), offset);
    co_return Result<>();
}

Task<Result<>> FileNode::do_flush(Request&) {
    int e = sync_error_.load();
    if (e == 0) {
        dirty_.store(false, std::memory_order_relaxed);
        const RequestEpochs::Token token = syncs_.enter();
        do {
            e = -co_await io_fdatasync(fd_.get());
        } while (e == EINTR);
        if (e) {
            dirty_.store(true, std::memory_order_relaxed);
            note_sync_error(e);
        }
        syncs_.leave(token);
    }
    if (e == 0) {
        // A sync beside ours may have been told of a page that we waited for: then ours heard nothing of it.
        AsyncEvent told;
        syncs_.retire([&told] { told.set(); });
        co_await told.wait();
        e = sync_error_.load();
    }
    // Pages that could not be written are marked clean by the kernel: a later fdatasync would say yes without them.
    if (e) co_return fail_errno(e, "flushing '{}'", filename());
    co_return Result<>();
}

}  // namespace gantry::block
