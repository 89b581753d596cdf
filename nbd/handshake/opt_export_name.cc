// NBD_OPT_EXPORT_NAME: the oldest way into transmission. There is no error reply: whatever is wrong ends the
// connection.

#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_export_name(Handshake& hs, Payload payload, OptionOutput& out) {
    // Extended headers need GO.
    if (hs.extended() || payload.size() > kMaxString) return HandshakeStep::kClose;
    const std::string name(reinterpret_cast<const char*>(payload.data()), payload.size());
    const auto facts = hs.exports().find(name);
    if (!facts) return HandshakeStep::kClose;
    uint8_t answer[8 + 2 + 124] = {};
    store_big(store_big(answer, facts->size), hs.transmission_flags(name, *facts));
    out.raw({answer, hs.no_zeroes() ? size_t{10} : sizeof answer});
    return hs.enter(name);
}

}  // namespace gantry::nbd
