// Mounts of ours, by whichever process, and what has become of their servers.

#pragma once

#include <chrono>
#include <string>

#include "fuse/mountinfo.h"
#include "runtime/error.h"

namespace gantry::fuse {

enum class ServerState : uint8_t {
    kAnswers,
    kSilent,  // it has the mount, and says nothing
    kGone,    // "not connected": whatever comes is refused by the kernel
};

/// Asks the server behind a mount. In a process of its own, because whoever asks waits as long as the server likes; at
/// most `patience`. Blocks for that long. Any thread.
ServerState probe(const MountEntry& mount, std::chrono::milliseconds patience = std::chrono::seconds(1));

/// It is what a path lookup finds: nothing is mounted over it.
bool is_on_top(const MountEntry& mount);

/// clean_stale_mounts() has been called in this process.
bool stale_mounts_looked_for();

/// By umount2(2) or fusermount3. kBusy (not with `lazy`), kPermission. Blocks.
Result<> unmount_entry(const MountEntry& mount, bool lazy);

}  // namespace gantry::fuse
