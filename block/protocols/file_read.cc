// Reads: inline when the page cache can answer, else through the loop's back end.

#include <fcntl.h>
#include <limits.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>

#include "block/protocols/file.h"
#include "runtime/io.h"

namespace gantry::block {

namespace {

/// More than this is copied by the pool, so that the loop stays responsive (1 MiB takes it some 50-200 us).
constexpr size_t kInlineMax = 1 << 20;

}  // namespace

/// One preadv2(RWF_NOWAIT): bytes, 0 at the end of the file, or -errno; -EAGAIN when this cannot be done inline.
int FileNode::read_now(uint64_t offset, const IoVec& iov) {
    const ssize_t n = ::preadv2(fd_.get(), iov.data, static_cast<int>(std::min<uint32_t>(iov.count, IOV_MAX)),
                                static_cast<off_t>(offset), RWF_NOWAIT);
    if (n >= 0) return static_cast<int>(n);
    if (errno == EOPNOTSUPP || errno == EINVAL || errno == ENOSYS) {
        nowait_.store(false, std::memory_order_relaxed);  // never again for this file
        return -EAGAIN;
    }
    return errno == EINTR ? -EAGAIN : -errno;
}

int FileNode::do_try_read(Request&, uint64_t offset, const IoVec& iov) {
    if (iov.bytes > kInlineMax || direct_.load(std::memory_order_relaxed) || !nowait_.load(std::memory_order_relaxed)) {
        return -EAGAIN;
    }
    const int n = read_now(offset, iov);
    if (n < 0) return n;
    // A short answer is the end of what is cached or the end of the file; only a read that may wait can tell.
    return static_cast<size_t>(n) == iov.bytes ? 0 : -EAGAIN;
}

Task<Result<>> FileNode::do_read(Request& rq, uint64_t offset, IoVec iov) {
    const bool direct = direct_.load(std::memory_order_relaxed);
    const bool large = iov.bytes > kInlineMax;
    size_t done = 0;
    if (!direct && !large && !rq.inline_tried && nowait_.load(std::memory_order_relaxed)) {
        const int n = read_now(offset, iov);
        if (n > 0) done = static_cast<size_t>(n);
        if (done == iov.bytes) co_return Result<>();
    }
    int error = 0;
    if (large && !direct) {
        error = co_await run_blocking([&] { return read_all(fd_.get(), iov, offset); });
        if (error) co_return fail_errno(-error, "reading {} bytes of '{}' at {}", iov.bytes, filename(), offset);
        co_return Result<>();
    }

    const uint32_t unit = limits_.request_alignment;
    while (done < iov.bytes) {
        const IoVecSlice rest(iov, done, iov.bytes - done);
        const int n = co_await io_readv(fd_.get(), rest.view(), offset + done);
        if (n == -EINTR) continue;
        if (n == -EAGAIN) {
            const IoVec left = rest.view();
            error = co_await run_blocking([&] { return read_all(fd_.get(), left, offset + done); });
            if (error == 0) co_return Result<>();
        } else if (n < 0) {
            error = n;
        }
        if (error) co_return fail_errno(-error, "reading {} bytes of '{}' at {}", iov.bytes, filename(), offset);
        done += static_cast<size_t>(n);
        // The end of the file; an O_DIRECT read can end there in the middle of a unit and could not go on.
        if (n == 0 || (direct && done < iov.bytes && (done & (unit - 1)))) {
            fill_iovec(iov, done, iov.bytes - done);
            break;
        }
    }
    co_return Result<>();
}

Task<Result<>> FileNode::do_preload(Request&, uint64_t offset, uint64_t length) {
    if (direct_.load(std::memory_order_relaxed)) co_return Result<>();
    const int e = co_await run_blocking([&] {
        return ::posix_fadvise(fd_.get(), static_cast<off_t>(offset), static_cast<off_t>(length), POSIX_FADV_WILLNEED);
    });
    if (e) co_return fail_errno(e, "preloading {} bytes of '{}' at {}", length, filename(), offset);
    co_return Result<>();
}

}  // namespace gantry::block
