// The file that an export is going to cover, and the act of covering it.

#pragma once

#include <cstdint>
#include <string>

#include "fuse/mount.h"
#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::fuse {

/// A regular file that is no export of anybody yet.
struct MountPoint {
    UniqueFd fd;       // O_PATH
    UniqueFd lock;     // keeps other daemons from covering it while it is there; invalid: it cannot be had
    std::string path;  // links resolved
    uint64_t device = 0, inode = 0;
};

/// Checks spec/fuse.md section 1, "Mount point rules" (what a daemon that is gone has left there is unmounted first);
/// for the errors see Mount::create. Two daemons that come at the same time get it one after the other. Blocks as long
/// as the path's file system does, but never for an export.
Result<MountPoint> find_mount_point(const std::string& path);

struct Covered {
    UniqueFd fd;  // of the connection
    bool allow_other = false;
};
/// Mounts there: by mount(2), where that is not allowed by fusermount3. Blocks.
Result<Covered> cover(const MountPoint& point, const MountRequest& request);

/// "gantry:disk": what df and mount show.
std::string mount_source(const std::string& export_id);

}  // namespace gantry::fuse
