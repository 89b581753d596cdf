// The NBD server of the process: listeners, connections, the exports by name.

#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "exports/export.h"
#include "runtime/unique_fd.h"

namespace gantry::nbd {

class NbdExport;

struct ServerOptions {
    json::object address;                    // validated SocketAddress (flat)
    uint32_t max_connections = 100;          // 0 = unlimited
    std::chrono::seconds handshake_max{10};  // 0 = no limit
    /// Turns an address of type "fd" (a name or number) into a listening socket; from cli (socket activation, getfd).
    std::function<Result<UniqueFd>(std::string_view name)> resolve_fd;
};

/// One per process. Main loop only; connections live on the loops of their export after the handshake.
class Server {
  public:
    explicit Server(Runtime& runtime);
    ~Server();  // stopped

    bool running() const;
    /// Clients that connect wait until let_clients_in(): while the process starts up its exports come one by one.
    void hold_clients();
    void let_clients_in();
    /// nbd-server-start: "NBD server already running"; listens when it returns.
    Task<Result<>> start(ServerOptions options);
    /// Closes listeners (unlinking unix sockets it made), cuts off every client, also in the handshake, waits for them.
    /// The caller has removed the exports.
    Task<void> stop();

    /// Names are unique: "NBD server already has export named 'X'"; "NBD server not running".
    Result<> add_export(NbdExport& e);
    void remove_export(NbdExport& e);
    NbdExport* find(std::string_view name) const;
    std::vector<NbdExport*> exports() const;
    uint32_t max_connections() const;
    /// nbd URIs clients may use (for people).
    std::vector<std::string> uris() const;
    size_t connections() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

/// The server that exports of type "nbd" belong to. Set once at start-up, before any export is made.
void set_process_server(Server* server);
Server* process_server();

/// The row for the export table.
extern const exports::ExportType kNbdExportType;

}  // namespace gantry::nbd
