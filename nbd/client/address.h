// ServerAddress: a SocketAddress of the schema, from the client's side.

#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/socket.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"
#include "schema/value.h"

namespace gantry::nbd::client {

struct SocketTarget {
    sockaddr_storage storage{};
    socklen_t length = 0;
    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

/// Immutable but for the descriptor of type "fd", which serves one connection. Any loop.
class ServerAddress {
  public:
    ServerAddress() = default;
    /// `address` is validated and flat. `find_fd` turns the name of an address of type "fd" into a descriptor. Texts
    /// say what is wrong with the address.
    static Result<ServerAddress> parse(const json::object& address,
                                       const std::function<Result<UniqueFd>(std::string_view)>& find_fd);

    /// "PATH", "HOST:PORT", "vsock:CID:PORT", "fd:NAME": as the texts of errors want it.
    const std::string& text() const { return text_; }
    /// Of inet, else empty: what a certificate must name unless told otherwise.
    const std::string& host() const { return host_; }
    /// Where an URI of nbd leads, percent-encoded: "nbd://HOST:PORT/%" and "nbd+unix:///%?socket=PATH" with % for the
    /// export's name; empty when no URI says it.
    std::string uri(std::string_view export_name) const;
    /// Of inet: whether and how a silent server is probed.
    bool keep_alive() const { return keep_alive_; }
    Keepalive probes() const { return probes_; }
    /// Whether there is more than one connection in it.
    bool can_connect_again() const { return !fd_; }

    /// What to connect to, in this order; looks names up on the blocking pool.
    Task<Result<std::vector<SocketTarget>>> resolve() const;
    /// The connected socket of an address of type "fd", once; invalid for all others.
    UniqueFd take_socket() const;

  private:
    enum class Kind : uint8_t { kUnix, kInet, kVsock, kFd };
    Kind kind_ = Kind::kUnix;
    std::string text_, host_, port_, path_;
    bool abstract_ = false, tight_ = true;
    InetFamilies families_;
    bool keep_alive_ = true;
    Keepalive probes_{.idle = std::chrono::seconds(30), .interval = std::chrono::seconds(10), .count = 3};
    uint32_t cid_ = 0, vsock_port_ = 0;
    std::shared_ptr<UniqueFd> fd_;
};

}  // namespace gantry::nbd::client
