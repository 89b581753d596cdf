// One NBD server: listeners, connections, the exports by name.

#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "exports/export.h"
#include "nbd/tls/policy.h"
#include "runtime/unique_fd.h"

namespace gantry::nbd {

class NbdExport;

struct ServerOptions {
    json::object address;                    // validated SocketAddress (flat)
    json::array more_addresses;              // further ones, of the same kind
    uint32_t max_connections = 100;          // 0 = unlimited
    std::chrono::seconds handshake_max{10};  // 0 = no limit
    TlsPolicy tls;
    /// Turns an address of type "fd" (a name or number) into a listening socket; from cli (socket activation, getfd).
    std::function<Result<UniqueFd>(std::string_view name)> resolve_fd;
};

/// Main loop only; connections live on the loops of their export after the handshake.
class Server {
  public:
    /// `id` "": the server that exports belong to which name none.
    explicit Server(Runtime& runtime, std::string id = {});
    ~Server();  // stopped

    const std::string& id() const;
    bool running() const;
    /// Clients that connect wait until let_clients_in(): while the process starts up its exports come one by one.
    void hold_clients();
    void let_clients_in();
    /// nbd-server-start: "NBD server already running"; listens when it returns.
    Task<Result<>> start(ServerOptions options);
    /// The beginning of stop(), with the exports still there: nobody else is let in (the sockets are closed and
    /// unlinked), options are answered by ERR_SHUTDOWN and requests by ESHUTDOWN. Returns when no client has asked for
    /// anything for a moment, after half a second at the latest.
    Task<void> say_good_bye();
    /// Closes listeners (unlinking unix sockets it made), cuts off every client, also in the handshake, waits for them.
    /// The caller has removed the exports.
    Task<void> stop();

    /// Names are unique: "NBD server already has export named 'X'"; "NBD server not running".
    Result<> add_export(NbdExport& e);
    void remove_export(NbdExport& e);
    NbdExport* find(std::string_view name) const;
    std::vector<NbdExport*> exports() const;
    uint32_t max_connections() const;
    /// nbd URIs clients may use (for people): of each export at each address.
    std::vector<std::string> uris() const;
    size_t connections() const;
    /// NbdServerInfo: what query-nbd-servers shows, clients included.
    json::object details() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

/// The row for the export table.
extern const exports::ExportType kNbdExportType;

}  // namespace gantry::nbd
