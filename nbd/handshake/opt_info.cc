// NBD_OPT_INFO: what GO would say, without any effect on the session.

#include "nbd/handshake/export_info.h"
#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_info(Handshake& hs, Payload payload, OptionOutput& out) {
    if (send_export_info(hs, payload, out, InfoPurpose::kInfo)) out.ack();
    return HandshakeStep::kContinue;
}

}  // namespace gantry::nbd
