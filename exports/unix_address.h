// Listening unix sockets as the type UnixSocketAddress of the schema describes them.

#pragma once

#include "runtime/error.h"
#include "runtime/unique_fd.h"
#include "schema/value.h"

namespace gantry::exports {

/// A listening, non-blocking socket. `address`: validated, with path and perhaps abstract, tight, mode, group. kInvalid
/// for names, modes and groups that make no sense; kBusy while somebody listens there.
Result<UniqueFd> listen_unix_address(const json::object& address);

}  // namespace gantry::exports
