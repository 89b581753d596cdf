// NBD_OPT_GO: information about an export, then transmission.

#include "nbd/handshake/export_info.h"
#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_go(Handshake& hs, Payload payload, OptionOutput& out) {
    const auto name = send_export_info(hs, payload, out, InfoPurpose::kGo);
    if (!name) return HandshakeStep::kContinue;
    out.ack();
    return hs.enter(*name);
}

}  // namespace gantry::nbd
