// What a client node was told: where the server is, what to ask it for, and how long to wait for it.

#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "nbd/client/address.h"
#include "nbd/tls/objects.h"

namespace gantry::nbd::client {

inline constexpr uint32_t kMaxConnections = 16;

/// Immutable, shared by the connections of one node.
struct ClientConfig {
    std::string node_name;
    ServerAddress address;
    std::string export_name;
    /// The meta context whose flags are what block status shows; without it the node is no good (x-dirty-bitmap).
    std::string context = "base:allocation";
    bool context_required = false;
    std::shared_ptr<const TlsObject> tls;  // null: in the clear
    std::string tls_hostname;              // empty: that of the address
    std::chrono::nanoseconds reconnect_delay{0};
    std::chrono::nanoseconds open_timeout{0};
    /// One attempt to connect, from the look-up of the name to the end of the negotiation.
    std::chrono::nanoseconds attempt_limit = std::chrono::seconds(30);

    bool wants_depth() const { return context == "qemu:allocation-depth"; }
    const std::string& hostname() const { return tls_hostname.empty() ? address.host() : tls_hostname; }
};

/// How long to wait before attempt number `failed` + 1: 1, 2, 4, 8, 16, 16, ... seconds.
constexpr std::chrono::seconds retry_pause(unsigned failed) {
    return std::chrono::seconds(failed >= 5 ? 16 : 1 << (failed == 0 ? 0 : failed - 1));
}

}  // namespace gantry::nbd::client
