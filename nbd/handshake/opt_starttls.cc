// NBD_OPT_STARTTLS on a server without credentials (mode "none"): refused by policy, the session goes on in the clear.

#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_starttls(Handshake&, Payload payload, OptionOutput& out) {
    if (!payload.empty()) {
        out.error(kRepErrInvalid, "STARTTLS takes no payload");
    } else {
        out.error(kRepErrPolicy, "TLS is not configured on this server");
    }
    return HandshakeStep::kContinue;
}

}  // namespace gantry::nbd
