// Mounts of ours, by whichever process, and what has become of their servers.

#pragma once

#include <chrono>
#include <string>

#include "fuse/mountinfo.h"
#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::fuse {

enum class ServerState : uint8_t {
    kAnswers,
    kSilent,  // it has the mount, and says nothing
    kGone,    // "not connected": whatever comes is refused by the kernel
};

/// Its root, O_PATH; nothing when the path leads elsewhere. While it is held the mount's numbers stay its own: those of
/// mounts that are gone are used again. It is a user of the mount, and no obstacle to a lazy unmount.
UniqueFd open_root(const MountEntry& mount);

/// Asks the server behind a mount, whose root is `fd`. In a process of its own, because whoever asks waits as long as
/// the server likes; at most `patience`. What cannot be found out counts as an answer. Blocks for that long. Any
/// thread.
ServerState probe(const MountEntry& mount, int fd, std::chrono::milliseconds patience = std::chrono::seconds(1));

/// Unmounts just the one that `fd` is the root of, in use or not; no error when it is gone already. kPermission.
Result<> detach(const MountEntry& mount, int fd);

/// It is what a path lookup finds: nothing is mounted over it.
bool is_on_top(const MountEntry& mount);

/// clean_stale_mounts() has been called in this process.
bool stale_mounts_looked_for();

/// By umount2(2) or fusermount3. No error when it is gone, or covered, meanwhile. kBusy (not with `lazy`), kPermission.
/// Blocks.
Result<> unmount_entry(const MountEntry& mount, bool lazy);

}  // namespace gantry::fuse
