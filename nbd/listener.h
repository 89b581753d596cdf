// Listening sockets of the NBD server, from a SocketAddress.

#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/socket.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"
#include "schema/value.h"

namespace gantry::nbd {

/// A listening, non-blocking stream socket. A unix socket file that we made is removed with it, if it is still ours.
class ListenSocket {
  public:
    ListenSocket(UniqueFd fd, std::string uri_authority, std::string uri_query, bool owns_path_of_unix,
                 std::string_view scheme = "nbd");
    ListenSocket(ListenSocket&&) = default;
    ListenSocket& operator=(ListenSocket&&) = delete;

    int fd() const { return fd_.get(); }
    bool is_unix() const { return !query_.empty(); }
    /// No more connections; the file of a unix socket is removed. The loop has forgotten the descriptor.
    void close();
    /// "nbd://host:port/name", "nbd+unix:///name?socket=path" or "nbd+vsock://cid:port/name".
    /// `tls`: for clients that must use TLS.
    std::string uri(std::string_view export_name, bool tls = false) const;

  private:
    UniqueFd fd_;
    std::string_view scheme_;  // static text that begins with "nbd"
    std::string authority_;
    std::string query_;
    SocketFile file_;
};

/// A TCP port as SocketAddress spells it: 0..65535, or the name of a service (false). kInvalid for numbers beyond and
/// "".
Result<bool> port_is_number(std::string_view port);

/// Opens what `address` (a validated flat SocketAddress) names. Errors leave nothing behind. Main loop.
Task<Result<std::vector<ListenSocket>>> open_listeners(json::object address,
                                                       std::function<Result<UniqueFd>(std::string_view)> resolve_fd);

/// RFC 3986: everything but unreserved characters and those in `keep` as %XX.
std::string percent_encode(std::string_view text, std::string_view keep = {});

}  // namespace gantry::nbd
