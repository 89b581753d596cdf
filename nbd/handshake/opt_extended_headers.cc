// NBD_OPT_EXTENDED_HEADERS: requests and replies have 32-byte headers with 64-bit lengths from transmission on; all
// that STRUCTURED_REPLY gives is part of it.

#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_extended_headers(Handshake& hs, Payload payload, OptionOutput& out) {
    if (!payload.empty()) {
        out.error(kRepErrInvalid, "EXTENDED_HEADERS takes no payload");
    } else if (hs.extended()) {
        out.error(kRepErrInvalid, "extended headers are already on");
    } else {
        hs.set_extended();
        out.ack();
    }
    return HandshakeStep::kContinue;
}

}  // namespace gantry::nbd
