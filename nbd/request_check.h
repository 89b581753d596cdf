// The checks of a request before it touches the disk: pure functions.

#pragma once

#include <string_view>

#include "nbd/protocol.h"

namespace gantry::nbd {

/// What was negotiated, as far as requests are judged by it.
struct RequestRules {
    uint64_t size = 0;  // of the export, bytes
    bool read_only = false;
    bool structured = false;  // or extended
    bool extended = false;
    bool good_bye = false;      // the server ends: nothing is begun any more
    bool has_contexts = false;  // a meta context was selected for this export
};

/// Verdict on a request: kWireOk, or the error and its reason (a static text).
struct Verdict {
    WireError error = kWireOk;
    std::string_view reason;
};

/// In the order: command and flags, read-only, range (nbd/README.md). The framing (magic, payload limit) is the
/// reader's. The range of a BLOCK_STATUS with PAYLOAD_LEN is in its payload and is not checked here. DISC is always
/// fine. Lengths of zero pass, except for BLOCK_STATUS.
Verdict check_request(const RequestHeader& request, const RequestRules& rules);

}  // namespace gantry::nbd
