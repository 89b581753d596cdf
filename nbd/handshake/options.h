// The handlers of the options, one file each, and their table.

#pragma once

#include <span>

#include "nbd/handshake/handshake.h"

namespace gantry::nbd {

using Payload = std::span<const uint8_t>;

HandshakeStep opt_export_name(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_abort(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_list(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_starttls(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_info(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_go(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_structured_reply(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_list_meta_context(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_set_meta_context(Handshake& hs, Payload payload, OptionOutput& out);
HandshakeStep opt_extended_headers(Handshake& hs, Payload payload, OptionOutput& out);

struct OptionRow {
    uint32_t number;
    HandshakeStep (*handle)(Handshake& hs, Payload payload, OptionOutput& out);
};

/// What is not listed answers ERR_UNSUP: PEEK_EXPORT is withdrawn.
inline constexpr OptionRow kOptionTable[] = {
    {kOptExportName, opt_export_name},
    {kOptAbort, opt_abort},
    {kOptList, opt_list},
    {kOptStartTls, opt_starttls},
    {kOptInfo, opt_info},
    {kOptGo, opt_go},
    {kOptStructuredReply, opt_structured_reply},
    {kOptListMetaContext, opt_list_meta_context},
    {kOptSetMetaContext, opt_set_meta_context},
    {kOptExtendedHeaders, opt_extended_headers},
};

}  // namespace gantry::nbd
