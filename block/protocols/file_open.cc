#include "block/protocols/file_open.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>

#include "block/protocols/file_alignment.h"
#include "runtime/fd_sets.h"
#include "runtime/own_mounts.h"

namespace gantry::block {

namespace {

bool is_access_error(int e) { return e == EACCES || e == EPERM || e == EROFS || e == ETXTBSY; }

/// What may help the operator after "Could not open 'F': <errno>".
std::string open_hint(const OpenRequest& rq, int e) {
    switch (e) {
        case EROFS:
        case ETXTBSY:
            return rq.write ? "; read-only=on opens it for reading" : "";
        case EACCES:
        case EPERM:
            return fmt::format("; this process runs as uid {} gid {}{}", ::geteuid(), ::getegid(),
                               rq.write ? ", and read-only=on asks for reading alone" : "");
        case ENOENT:
            if (!rq.filename.starts_with('/')) {
                char cwd[4096];
                if (::getcwd(cwd, sizeof cwd)) return fmt::format("; relative to the working directory '{}'", cwd);
            }
            return "";
        case ENOTCONN:
            return fmt::format("; a daemon that is gone has left its mount there: 'gantry umount {}' removes it",
                               rq.filename);
        case EMFILE:
            return "; raise the limit of open files (LimitNOFILE=, ulimit -n)";
        default:
            return "";
    }
}

std::unexpected<Error> open_failed(const OpenRequest& rq, int e) {
    if (FdSets::is_set(rq.filename)) {
        auto again = FdSets::process().open(rq.filename, rq.write ? O_RDWR : O_RDONLY);
        if (!again) return std::unexpected(std::move(again).error());
    }
    const std::string hint = open_hint(rq, e);
    Error error = Error::from_errno(e, fmt::format("Could not open '{}'", rq.filename));
    if (hint.empty()) return std::unexpected(std::move(error));
    return std::unexpected(Error(error.kind(), error.message() + hint, e));
}

Result<> check_kind(const OpenRequest& rq, mode_t mode) {
    if (S_ISDIR(mode)) return open_failed(rq, EISDIR);
    if (rq.kind == FileKind::kRegular) {
        if (S_ISREG(mode)) return {};
        std::string hint;
        if (S_ISBLK(mode)) hint = "; use driver host_device for a block device";
        return fail(ErrorKind::kInvalid, "'{}' driver requires '{}' to be a regular file{}", rq.driver, rq.filename,
                    hint);
    }
    if (S_ISBLK(mode)) return {};
    if (S_ISCHR(mode)) {
        return fail(ErrorKind::kUnsupported,
                    "'{}' is a character device: SCSI generic devices are not supported; use the block device of the "
                    "same disk",
                    rq.filename);
    }
    return fail(ErrorKind::kInvalid, "'{}' driver requires '{}' to be either a character or block device{}", rq.driver,
                rq.filename, S_ISREG(mode) ? "; use driver file for a regular file" : "");
}

int open_retrying(const char* path, int flags) {
    int fd;
    do {
        fd = ::open(path, flags);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

/// Opens what the request names; errno in the error's place. `again` goes through /proc, which also finds files without
/// a name; where /proc is missing through the name, if that still is the same file.
/// A descriptor out of a set is only ever duplicated: who passed it may open the file, we need not.
int open_raw(const OpenRequest& rq, int flags, OpenedFile& out) {
    if (FdSets::is_set(rq.filename)) {
        auto opened = FdSets::process().open(rq.filename, flags);
        if (!opened) {
            errno = opened.error().errno_value();
            return -1;
        }
        out.fd_set_use = std::move(opened->use);
        return opened->fd.release();
    }
    flags |= O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    if (rq.again < 0) return open_retrying(rq.filename.c_str(), flags);
    const int fd = open_retrying(fmt::format("/proc/self/fd/{}", rq.again).c_str(), flags);
    if (fd >= 0 || errno != ENOENT) return fd;
    UniqueFd named(open_retrying(rq.filename.c_str(), flags));
    if (!named) return -1;
    if (!OwnMounts::process().check_fd(named.get(), rq.filename)) {
        errno = EDEADLK;
        return -1;
    }
    struct stat a, b;
    if (::fstat(rq.again, &a) < 0 || ::fstat(named.get(), &b) < 0) return -1;
    if (a.st_dev != b.st_dev || a.st_ino != b.st_ino) {
        errno = ESTALE;
        return -1;
    }
    return named.release();
}

/// The descriptor, with `writable`, `direct`, `never_writable` set.
Result<OpenedFile> open_mode(const OpenRequest& rq) {
    OpenedFile out;
    out.direct = rq.direct;
    const int direct = rq.direct ? O_DIRECT : 0;
    int e = 0;
    if (rq.write) {
        out.fd.reset(open_raw(rq, O_RDWR | direct, out));
        e = errno;
        int read_only = 0;
        if (out.fd && rq.kind == FileKind::kBlockDevice && ::ioctl(out.fd.get(), BLKROGET, &read_only) == 0 &&
            read_only) {
            out.fd.reset();
            e = EACCES;
        }
        out.writable = static_cast<bool>(out.fd);
        out.never_writable = !out.fd && rq.read_only_if_must && is_access_error(e);
    }
    if (!rq.write || out.never_writable) {
        out.fd.reset(open_raw(rq, O_RDONLY | direct, out));
        e = errno;
    }
    if (out.fd) return out;
    if (rq.direct && e == EINVAL) {
        return std::unexpected(Error(
            ErrorKind::kInvalid,
            fmt::format("Could not open '{}': filesystem does not support O_DIRECT; use cache.direct=off", rq.filename),
            e));
    }
    return open_failed(rq, e);
}

}  // namespace

bool file_could_be_written(int fd, const std::string& filename, FileKind kind) {
    if (kind == FileKind::kBlockDevice) {
        int read_only = 0;
        if (::ioctl(fd, BLKROGET, &read_only) == 0 && read_only) return false;
    }
    const std::string self = fmt::format("/proc/self/fd/{}", fd);
    int r = ::faccessat(AT_FDCWD, self.c_str(), W_OK, AT_EACCESS);
    if (r < 0 && errno == ENOENT && OwnMounts::process().check_path(filename)) {
        r = ::faccessat(AT_FDCWD, filename.c_str(), W_OK, AT_EACCESS);
    }
    return r == 0 || !is_access_error(errno);
}

Result<uint64_t> file_size(int fd, FileKind kind) {
    if (kind == FileKind::kBlockDevice) {
        uint64_t bytes = 0;
        if (::ioctl(fd, BLKGETSIZE64, &bytes) < 0) return fail_errno(errno, "Could not get the size of the device");
        return bytes;
    }
    struct stat st;
    if (::fstat(fd, &st) < 0) return fail_errno(errno, "Could not get the size of the file");
    return static_cast<uint64_t>(st.st_size);
}

Result<OpenedFile> open_file(const OpenRequest& rq) {
    struct stat st;
    if (rq.again < 0 && !FdSets::is_set(rq.filename)) {
        if (const UniqueFd below = OwnMounts::process().below_left_behind(rq.filename)) {
            OpenRequest through = rq;
            through.again = below.get();
            return open_file(through);
        }
        CHECK_OK(OwnMounts::process().check_path(rq.filename));
        // Opening is an act for some devices and sockets; what is of the wrong kind is not even opened.
        if (::stat(rq.filename.c_str(), &st) < 0) return open_failed(rq, errno);
        CHECK_OK(check_kind(rq, st.st_mode));
    }
    TRY(OpenedFile out, open_mode(rq));
    const int fd = out.fd.get();
    // An export may have come there meanwhile.
    CHECK_OK(OwnMounts::process().check_fd(fd, rq.filename));
    if (::fstat(fd, &st) < 0) return open_failed(rq, errno);
    CHECK_OK(check_kind(rq, st.st_mode));
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0 || ::fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0) return open_failed(rq, errno);

    if (!rq.write && rq.probe_write) out.never_writable = !file_could_be_written(fd, rq.filename, rq.kind);
    auto size = file_size(fd, rq.kind);
    if (!size) return std::unexpected(std::move(size).error().context(fmt::format("Could not open '{}'", rq.filename)));
    out.size = *size;
    const auto block = static_cast<uint64_t>(st.st_blksize);
    out.block_size = std::has_single_bit(block) && block <= (1u << 20) ? static_cast<uint32_t>(block) : 4096;
    if (rq.kind == FileKind::kBlockDevice) out.block_size = logical_block_size(fd);
    if (out.direct) {
        const DirectAlignment a = direct_alignment(fd, rq.kind);
        out.request_alignment = a.request;
        out.memory_alignment = a.memory;
    }
    return out;
}

}  // namespace gantry::block
