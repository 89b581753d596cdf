// The option phase from the client's side (spec/nbd.md section 14.2): TLS, extended headers or structured replies, the
// meta context, GO or EXPORT_NAME. The server is not trusted.

#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "nbd/client/config.h"
#include "nbd/client/transport.h"
#include "nbd/protocol.h"

namespace gantry::nbd::client {

/// What client and server agreed upon for one connection.
struct Negotiated {
    uint64_t size = 0;   // bytes, at most block::kMaxOffset
    uint16_t flags = 0;  // TransmissionFlag
    bool structured = false;
    bool extended = false;  // then structured is true, too
    std::optional<uint32_t> context_id;
    // Zero: the server did not say.
    uint32_t min_block = 0;
    uint32_t preferred_block = 0;
    uint32_t max_payload = 0;  // of one READ or WRITE; 0xffffffff: no limit

    bool can(TransmissionFlag flag) const { return (flags & flag) != 0; }
};

/// From the greeting to the beginning of transmission. Texts begin with what was tried ("Failed to connect to 'X'" is
/// not part of them). Ends early when the transport is shut down.
Task<Result<Negotiated>> negotiate(Transport& transport, const ClientConfig& config);

/// Whether a connection made later may take the place of one that had `first`: nothing that was promised to the layers
/// above is missing. `writable`: the node may be written.
Result<> check_same_export(const Negotiated& first, const Negotiated& now, bool writable);

/// Text of a server for an error of ours: printable ASCII, at most 200 bytes.
std::string printable(std::string_view text);

}  // namespace gantry::nbd::client
