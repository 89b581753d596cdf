// The kernel's side of a mount: the first words, further descriptors, notifications.

#pragma once

#include "fuse/init.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"

namespace gantry::fuse {

/// Reads INIT from `fd`, a fresh mount's descriptor, answers it, and makes the descriptor non-blocking. Current loop.
Task<Result<Negotiated>> agree_with_kernel(int fd, InitWishes wishes);

/// A further descriptor of the same mount, non-blocking; kUnsupported when the kernel gives none.
Result<UniqueFd> clone_descriptor(int fd);

/// The file has changed behind the kernel's back: `pages`, too, or only what stat tells. May wait for pages that are
/// being read: not on a loop that serves the file. Failures are logged.
void notify_changed(int fd, bool pages);
/// Asks for all requests that were read and not answered, with kResent in their numbers.
Result<> notify_resend(int fd);

}  // namespace gantry::fuse
