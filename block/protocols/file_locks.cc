#include "block/protocols/file_locks.h"

#include <fcntl.h>

#include <cerrno>
#include <chrono>
#include <thread>

namespace gantry::block {

namespace {

constexpr unsigned kTakenBase = 100;
constexpr unsigned kUnsharedBase = 200;
constexpr unsigned kPermCount = 4;
/// The kernel closes what a killed process had in io_uring some time after the process is gone: such a lock has no
/// holder, and is waited for.
constexpr std::chrono::milliseconds kOrphanStep{20};
constexpr int kOrphanSteps = 50;

constexpr Perm perm_of(unsigned n) { return static_cast<Perm>(1u << n); }

struct flock byte_lock(short type, unsigned byte) {
    struct flock fl{};
    fl.l_type = type;
    fl.l_whence = SEEK_SET;
    fl.l_start = byte;
    fl.l_len = 1;
    return fl;
}

/// 0 or errno.
int set_lock(int fd, short type, unsigned byte) {
    struct flock fl = byte_lock(type, byte);
    int r;
    do {
        r = ::fcntl(fd, F_OFD_SETLK, &fl);
    } while (r < 0 && errno == EINTR);
    return r < 0 ? errno : 0;
}

/// Calls fn(byte) for each byte of `set`, those of taken permissions first; stops at the first nonzero answer and
/// returns it.
template <class Fn>
int for_each_byte(FileLockSet set, Fn fn) {
    for (unsigned n = 0; n < kPermCount; ++n) {
        if (any(set.taken & perm_of(n))) {
            if (const int r = fn(kTakenBase + n)) return r;
        }
    }
    for (unsigned n = 0; n < kPermCount; ++n) {
        if (any(set.unshared & perm_of(n))) {
            if (const int r = fn(kUnsharedBase + n)) return r;
        }
    }
    return 0;
}

FileLockSet minus(FileLockSet a, FileLockSet b) { return {a.taken & ~b.taken, a.unshared & ~b.unshared}; }

/// The question and the culprit that follow every refusal.
std::string culprit(int fd, unsigned byte, int pid_hint, std::string_view filename, std::string_view way_out) {
    std::string text = fmt::format("; Is another process using the image [{}]?", filename);
    const std::string holder = file_lock_holder(fd, byte, pid_hint);
    if (holder == "this process") {
        text += " This process has it open already, through another node";
    } else if (!holder.empty()) {
        text += fmt::format(" The lock is held by {}: stop it{}", holder, way_out);
    }
    return text;
}

/// Who has a lock on `byte` that conflicts with an exclusive one: 0 nobody, 1 somebody (`pid`: -1 when unknown), else
/// -errno.
int find_lock(int fd, unsigned byte, int& pid) {
    struct flock fl = byte_lock(F_WRLCK, byte);
    int r;
    do {
        r = ::fcntl(fd, F_OFD_GETLK, &fl);
    } while (r < 0 && errno == EINTR);
    if (r < 0) return -errno;
    pid = fl.l_pid;
    return fl.l_type == F_UNLCK ? 0 : 1;
}

/// The same, past locks that no process has any more (or one that /proc does not show us).
int find_held_lock(int fd, unsigned byte, int& pid) {
    for (int step = 0;; ++step) {
        const int found = find_lock(fd, byte, pid);
        if (found <= 0 || step == kOrphanSteps || !file_lock_holder(fd, byte, pid).empty()) return found;
        std::this_thread::sleep_for(kOrphanStep);
    }
}

Result<> check_byte(int fd, Perm perm, bool unshared, std::string_view filename) {
    // Whoever takes a permission looks at the byte of those who do not share it, and the other way round.
    const unsigned n = static_cast<unsigned>(__builtin_ctz(static_cast<unsigned>(perm)));
    const unsigned byte = (unshared ? kTakenBase : kUnsharedBase) + n;
    int pid = -1;
    const int found = find_held_lock(fd, byte, pid);
    if (found < 0) return fail_errno(-found, "Failed to look at the lock of byte {} of '{}'", byte, filename);
    if (found == 0) return {};
    const std::string_view way_out = unshared ? ""
                                     : perm == Perm::kConsistentRead
                                         ? ", or read the image as it is with read-only=on,force-share=on"
                                         : ", or open the image with read-only=on";
    return std::unexpected(Error(ErrorKind::kPermission,
                                 fmt::format("Failed to get {}\"{}\" lock{}", unshared ? "shared " : "",
                                             perm_names(perm), culprit(fd, byte, pid, filename, way_out)),
                                 EAGAIN));
}

}  // namespace

bool file_locks_supported(int fd) {
    int pid = -1;
    return find_lock(fd, kTakenBase, pid) >= 0;
}

Result<> file_lock_more(int fd, FileLockSet held, FileLockSet wanted, std::string_view filename) {
    FileLockSet got;
    unsigned failed_byte = 0;
    const int e = for_each_byte(minus(wanted, held), [&](unsigned byte) {
        if (const int r = set_lock(fd, F_RDLCK, byte)) {
            failed_byte = byte;
            return r;
        }
        if (byte >= kUnsharedBase) {
            got.unshared |= perm_of(byte - kUnsharedBase);
        } else {
            got.taken |= perm_of(byte - kTakenBase);
        }
        return 0;
    });
    if (e == 0) return {};
    file_unlock(fd, got, {});
    if (e != EAGAIN && e != EACCES) return fail_errno(e, "Failed to lock byte {} of '{}'", failed_byte, filename);
    // Somebody locked the byte exclusively, which no block layer does.
    return std::unexpected(
        Error(ErrorKind::kPermission,
              fmt::format("Failed to lock byte {}{}", failed_byte, culprit(fd, failed_byte, -1, filename, "")), e));
}

Result<> file_lock_check(int fd, FileLockSet wanted, std::string_view filename) {
    for (unsigned n = 0; n < kPermCount; ++n) {
        if (any(wanted.taken & perm_of(n))) CHECK_OK(check_byte(fd, perm_of(n), false, filename));
    }
    for (unsigned n = 0; n < kPermCount; ++n) {
        if (any(wanted.unshared & perm_of(n))) CHECK_OK(check_byte(fd, perm_of(n), true, filename));
    }
    return {};
}

void file_unlock(int fd, FileLockSet held, FileLockSet keep) {
    // Unlocking fails only where locking did; there is nobody to tell and nothing to undo.
    (void)for_each_byte(minus(held, keep), [fd](unsigned byte) {
        (void)set_lock(fd, F_UNLCK, byte);
        return 0;
    });
}

}  // namespace gantry::block
