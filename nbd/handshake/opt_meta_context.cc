// NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.

#include "nbd/handshake/options.h"
#include "nbd/handshake/payload.h"

namespace gantry::nbd {

namespace {

void context_reply(OptionOutput& out, uint32_t id, std::string_view name) {
    std::vector<uint8_t> reply(4);
    store_big(reply.data(), id);
    reply.insert(reply.end(), name.begin(), name.end());
    out.reply(kRepMetaContext, reply);
}

HandshakeStep meta_context(Handshake& hs, Payload payload, OptionOutput& out, bool listing) {
    // SET replaces the earlier selection, also when it fails.
    if (!listing) hs.selection().clear();
    if (!listing && !hs.structured()) {
        out.error(kRepErrInvalid, "negotiate structured replies or extended headers first");
        return HandshakeStep::kContinue;
    }
    std::string_view why;
    auto request = parse_context_request(payload, why);
    if (!request) {
        out.error(kRepErrInvalid, why);
        return HandshakeStep::kContinue;
    }
    const auto facts = hs.exports().find(request->name);
    if (!facts) {
        out.error(kRepErrUnknown, "no export named " + quote(request->name));
        return HandshakeStep::kContinue;
    }
    ContextList chosen = match_contexts(*facts->contexts, request->queries, listing);
    for (const MetaContext& context : chosen) context_reply(out, listing ? 0 : context.id, context.name);
    if (!listing) hs.selection() = {std::string(request->name), std::move(chosen), facts->contexts};
    out.ack();
    return HandshakeStep::kContinue;
}

}  // namespace

HandshakeStep opt_list_meta_context(Handshake& hs, Payload payload, OptionOutput& out) {
    return meta_context(hs, payload, out, true);
}

HandshakeStep opt_set_meta_context(Handshake& hs, Payload payload, OptionOutput& out) {
    return meta_context(hs, payload, out, false);
}

}  // namespace gantry::nbd
