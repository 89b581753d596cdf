// NBD_OPT_ABORT: the client leaves. Its payload is ignored.

#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_abort(Handshake&, Payload, OptionOutput& out) {
    out.ack();
    return HandshakeStep::kClose;
}

}  // namespace gantry::nbd
