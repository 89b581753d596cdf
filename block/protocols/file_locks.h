// Locks on the bytes of an image file by which openers in different processes protect each other (spec/qmp.md 12.2).

#pragma once

#include <string>
#include <string_view>

#include "block/permissions.h"
#include "runtime/error.h"

namespace gantry::block {

/// What an opener tells the others: byte 100 + n is locked for a permission that it takes, byte 200 + n for one that it
/// does not share. All locks are shared (read) locks of the open file description; a conflict is looked for, not run
/// into.
struct FileLockSet {
    Perm taken = Perm::kNone;
    Perm unshared = Perm::kNone;

    static FileLockSet of(EdgePerms perms) { return {perms.need, ~perms.share}; }
    FileLockSet operator|(FileLockSet o) const { return {taken | o.taken, unshared | o.unshared}; }
    bool operator==(const FileLockSet&) const = default;
};

/// The functions below make system calls that may go to a file server: call them where blocking is allowed. Any thread.

/// True when the kernel and the file system behind `fd` know locks of open file descriptions.
bool file_locks_supported(int fd);

/// Locks what `wanted` has more than `held`; `fd` is open for reading. On failure the locks are those of `held` again.
Result<> file_lock_more(int fd, FileLockSet held, FileLockSet wanted, std::string_view filename);

/// Refuses (kPermission) when another description takes what `wanted` does not share, or does not share what it takes.
/// The text names the process where /proc tells; where it shows none, the refusal comes after a second, because a
/// process that was killed may leave its locks behind it for a moment. To be called after file_lock_more(): of two
/// openers at once at least one notices.
Result<> file_lock_check(int fd, FileLockSet wanted, std::string_view filename);

/// Unlocks what `held` has more than `keep`.
void file_unlock(int fd, FileLockSet held, FileLockSet keep);

/// "process 4711 (qemu-img)" or "this process": who holds a lock on `byte` of the file behind `fd` through another
/// description; empty when /proc does not tell. `pid_hint` > 0: what the kernel said already.
std::string file_lock_holder(int fd, unsigned byte, int pid_hint);

}  // namespace gantry::block
