// TlsPolicy: what a server asks of its clients before they see anything.

#pragma once

#include <memory>
#include <string>

#include "nbd/handshake/handshake.h"
#include "nbd/tls/objects.h"

namespace gantry::nbd {

struct TlsPolicy {
    std::shared_ptr<const TlsObject> object;  // null: no TLS
    std::string authz;                        // id, looked up for each client; empty: whoever the handshake lets in
    bool required = true;

    TlsMode mode() const {
        if (!object) return TlsMode::kNone;
        return required ? TlsMode::kRequired : TlsMode::kOptional;
    }
};

/// From the members tls-creds, tls-authz and tls-required of validated server options: "No TLS credentials with id
/// 'X'", "'tls-authz' requires 'tls-creds'". Main loop.
Result<TlsPolicy> tls_policy(const json::object& options);

}  // namespace gantry::nbd
