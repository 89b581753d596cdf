// NBD_OPT_STRUCTURED_REPLY: reads are answered with chunks from now on.

#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_structured_reply(Handshake& hs, Payload payload, OptionOutput& out) {
    if (!payload.empty()) {
        out.error(kRepErrInvalid, "STRUCTURED_REPLY takes no payload");
    } else if (hs.extended()) {
        out.error(kRepErrExtHeaderRequired, "extended headers are on, which structured replies are part of");
    } else if (hs.structured()) {
        out.error(kRepErrInvalid, "structured replies are already on");
    } else {
        hs.set_structured();
        out.ack();
    }
    return HandshakeStep::kContinue;
}

}  // namespace gantry::nbd
