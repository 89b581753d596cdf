// Failures in the words of a reply. The table: README.md.

#pragma once

#include "runtime/error.h"

namespace gantry::fuse {

/// What clients are told: a positive errno that the kernel hands on as it is. Numbers that would mean something to the
/// kernel itself (ENOSYS: never ask again) or to nobody become EIO or EOPNOTSUPP.
int reply_errno(int errno_value);
int reply_errno(const Error& error);

}  // namespace gantry::fuse
