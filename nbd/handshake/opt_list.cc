// NBD_OPT_LIST: names and descriptions of the exports.

#include "nbd/handshake/options.h"

namespace gantry::nbd {

HandshakeStep opt_list(Handshake& hs, Payload payload, OptionOutput& out) {
    if (!payload.empty()) {
        out.error(kRepErrInvalid, "LIST takes no payload");
        return HandshakeStep::kContinue;
    }
    std::vector<uint8_t> entry;
    for (const ExportDirectory::Listed& e : hs.exports().list()) {
        entry.resize(4);
        store_big(entry.data(), static_cast<uint32_t>(e.name.size()));
        entry.insert(entry.end(), e.name.begin(), e.name.end());
        entry.insert(entry.end(), e.description.begin(), e.description.end());
        out.reply(kRepServer, entry);
    }
    out.ack();
    return HandshakeStep::kContinue;
}

}  // namespace gantry::nbd
