#include "block/protocols/file_zeroes.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "block/align.h"
#include "runtime/buffer.h"

namespace gantry::block {

namespace {

/// Does the file system or driver simply not have this?
bool is_unsupported(int e) {
    return e == EOPNOTSUPP || e == ENOTSUP || e == ENOSYS || e == ENOTTY || e == ENODEV || e == EPERM;
}

/// fallocate(2), remembered in `known` when it does not exist here. 0 or -errno, -ENOTSUP for all ways to say "cannot".
int try_fallocate(int fd, std::atomic<bool>& known, int mode, uint64_t offset, uint64_t length) {
    if (!known.load(std::memory_order_relaxed)) return -ENOTSUP;
    int r;
    do {
        r = ::fallocate(fd, mode, static_cast<off_t>(offset), static_cast<off_t>(length));
    } while (r < 0 && errno == EINTR);
    if (r == 0) return 0;
    if (is_unsupported(errno)) {
        known.store(false, std::memory_order_relaxed);
        return -ENOTSUP;
    }
    // Some file systems refuse what is not aligned to their blocks; the next range may be.
    return errno == EINVAL ? -ENOTSUP : -errno;
}

/// Makes the file at least `end` bytes long without changing what is in it: not ftruncate(2), which would cut off what
/// another request has just written behind it. The last byte before `end` is known to be (or to become) zero.
int extend_file(int fd, FileAbilities& can, uint64_t end, uint32_t block) {
    struct stat st;
    if (::fstat(fd, &st) < 0) return -errno;
    if (static_cast<uint64_t>(st.st_size) >= end) return 0;
    const int r = try_fallocate(fd, can.allocate, 0, end - 1, 1);
    if (r != -ENOTSUP) return r;
    const uint64_t begin = align_down(end - 1, block);
    Buffer zeroes = Buffer::alloc(block);
    fill_iovec(IoVec(zeroes.iov()), 0, block);
    const uint64_t length = block == 1 ? 1 : block;
    const ssize_t n = ::pwrite(fd, zeroes.data(), length, static_cast<off_t>(begin));
    if (n < 0) return -errno;
    return static_cast<uint64_t>(n) == length ? 0 : -EIO;
}

}  // namespace

int zero_file_range(int fd, FileAbilities& can, const ZeroRequest& rq, uint32_t block) {
    const uint64_t end = rq.offset + rq.length;
    struct stat st;
    if (::fstat(fd, &st) < 0) return -errno;
    const auto size = static_cast<uint64_t>(st.st_size);

    if (rq.may_unmap) {
        if (rq.offset < size) {
            const int r = try_fallocate(fd, can.punch_hole, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, rq.offset,
                                        std::min(end, size) - rq.offset);
            if (r == 0) return extend_file(fd, can, end, block);
            if (r != -ENOTSUP) return r;
        } else {
            return extend_file(fd, can, end, block);
        }
    }
    int r = try_fallocate(fd, can.zero_range, FALLOC_FL_ZERO_RANGE, rq.offset, rq.length);
    if (r != -ENOTSUP) return r;
    if (!can.allocate.load(std::memory_order_relaxed)) return -ENOTSUP;
    if (rq.offset < size) {
        // "Cannot" must come before anything was changed, so allocation is proved to work before the hole is made.
        if (!can.allocate_works.load(std::memory_order_relaxed)) {
            r = try_fallocate(fd, can.allocate, 0, rq.offset, rq.length);
            if (r != 0) return r;
            can.allocate_works.store(true, std::memory_order_relaxed);
        }
        r = try_fallocate(fd, can.punch_hole, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, rq.offset,
                          std::min(end, size) - rq.offset);
        if (r != 0) return r;
    }
    // Reads as zeroes now; what remains is that the blocks are there and the file is long enough.
    return try_fallocate(fd, can.allocate, 0, rq.offset, rq.length);
}

int zero_device_range(int fd, FileAbilities& can, const ZeroRequest& rq) {
    if (rq.may_unmap) {
        const int r =
            try_fallocate(fd, can.punch_hole, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, rq.offset, rq.length);
        if (r != -ENOTSUP) return r;
    }
    // Without help from the device the kernel would write the zeroes itself: not what a fast zero asks for.
    if (rq.no_fallback && !can.fast_device_zeroes) return -ENOTSUP;
    int r = try_fallocate(fd, can.zero_range, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, rq.offset, rq.length);
    if (r != -ENOTSUP) return r;
    uint64_t range[2] = {rq.offset, rq.length};
    do {
        r = ::ioctl(fd, BLKZEROOUT, range);
    } while (r < 0 && errno == EINTR);
    if (r == 0) return 0;
    return is_unsupported(errno) || errno == EINVAL ? -ENOTSUP : -errno;
}

int discard_file_range(int fd, FileAbilities& can, uint64_t offset, uint64_t length) {
    return try_fallocate(fd, can.punch_hole, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
}

int discard_device_range(int fd, FileAbilities& can, uint64_t offset, uint64_t length) {
    if (!can.discard.load(std::memory_order_relaxed)) return -ENOTSUP;
    uint64_t range[2] = {offset, length};
    int r;
    do {
        r = ::ioctl(fd, BLKDISCARD, range);
    } while (r < 0 && errno == EINTR);
    if (r == 0) return 0;
    if (!is_unsupported(errno)) return -errno;
    can.discard.store(false, std::memory_order_relaxed);
    return -ENOTSUP;
}

uint64_t device_queue_value(int fd, const char* name) {
    struct stat st;
    if (::fstat(fd, &st) < 0) return 0;
    // A partition has the queue of its disk.
    for (const char* up : {"", "../"}) {
        const std::string path =
            fmt::format("/sys/dev/block/{}:{}/{}queue/{}", major(st.st_rdev), minor(st.st_rdev), up, name);
        const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
        if (!file) continue;
        char text[32] = {};
        if (::read(file.get(), text, sizeof text - 1) > 0) return std::strtoull(text, nullptr, 10);
    }
    return 0;
}

}  // namespace gantry::block
