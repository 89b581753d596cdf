// NBD_OPT_STARTTLS: spec/nbd.md section 4.2.

#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_starttls(Handshake& hs, Payload payload, OptionOutput& out) {
    if (!payload.empty()) {
        out.error(kRepErrInvalid, "STARTTLS takes no payload");
    } else if (hs.secure()) {
        out.error(kRepErrInvalid, "TLS already enabled");
    } else if (hs.tls() == TlsMode::kNone) {
        out.error(kRepErrPolicy, "TLS not configured on this server");
    } else {
        out.ack();
        return HandshakeStep::kStartTls;
    }
    return HandshakeStep::kContinue;
}

}  // namespace gantry::nbd
