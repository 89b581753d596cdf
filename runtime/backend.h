// The two I/O back ends' factories. Used by loop.cc and runtime.cc only.

#pragma once

#include <memory>
#include <string>

#include "runtime/loop.h"

namespace gantry {

/// What io_uring this kernel gives us ("kernel 6.1.0: single issuer, deferred task work"), or why none. The answer is
/// computed once.
const Result<std::string>& probe_io_uring();

/// `loop` outlives the back end. kUnsupported with the reason when the kernel refuses.
Result<std::unique_ptr<IoBackend>> make_uring_backend(Loop& loop);
Result<std::unique_ptr<IoBackend>> make_epoll_backend(Loop& loop);

/// Bytes of a driver's command.
constexpr uint32_t kMaxCommand = 80;

/// poll(2) without waiting: the events of `events` (and POLLERR, POLLHUP, POLLNVAL) that hold, or -errno.
int poll_now(int fd, uint32_t events);

}  // namespace gantry
