// The one table from errno to the error numbers of the NBD wire (nbd/README.md has it with its "safe to retry?"
// column).

#pragma once

#include <cstdint>
#include <string_view>

#include "nbd/protocol.h"
#include "runtime/error.h"

namespace gantry::nbd {

/// `errno_value` > 0. `fast_zero`: the answer to a request with FAST_ZERO, the only place where ENOTSUP may appear.
/// Never returns EOVERFLOW: its two cases are decided when a request is checked.
WireError wire_error(int errno_value, bool fast_zero = false);
WireError wire_error(const Error& error, bool fast_zero = false);

/// "Input/output error" etc., for texts of error chunks.
std::string_view wire_error_text(WireError error);

}  // namespace gantry::nbd
