// fusermount3: mounts and unmounts for users who may not do it themselves.

#pragma once

#include <string>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::fuse {

/// These block, at most half a minute. Any thread.
/// Mounts on `path` with `options` ("ro,fsname=...,..."); the descriptor of the new connection. Errors: kNotFound when
/// there is no fusermount3, kPermission when it refuses, kTimedOut.
Result<UniqueFd> helper_mount(const std::string& options, const std::string& path);
/// `lazy`: also while it is in use. Errors: kBusy, and those above.
Result<> helper_unmount(const std::string& path, bool lazy);

/// fusermount3 refused because /etc/fuse.conf does not have user_allow_other.
bool lacks_user_allow_other(const Error& error);

}  // namespace gantry::fuse
