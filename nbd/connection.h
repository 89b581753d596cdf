// Connection: one client of the server, from accept to close.

#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "nbd/handshake/handshake.h"
#include "nbd/session.h"
#include "nbd/tls/policy.h"
#include "nbd/tls/stream.h"
#include "runtime/socket.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"
#include "runtime/unique_fd.h"
#include "schema/value.h"

namespace gantry::nbd {

class NbdExport;
class Server;

struct ConnectionLimits {
    std::chrono::seconds handshake_max{10};  // 0: none
    uint64_t memory = 64u << 20;             // of a session
    TlsPolicy tls;
};

/// Main loop, except for the session, which runs on a loop of the export.
class Connection {
  public:
    Connection(Server& server, const ExportDirectory& exports, UniqueFd fd, ConnectionLimits limits);

    /// The whole life: handshake, transmission. The socket is closed when it returns.
    Task<void> run();
    /// Ends it soon, whatever it does: the socket is shut down, run() returns.
    void cut();
    /// Options are answered by ERR_SHUTDOWN and requests by ESHUTDOWN from now on; what is in flight is finished.
    void say_good_bye();
    /// A number that changes when the client sends an option or a request.
    uint64_t activity() const { return options_ + counters_.requests.load(std::memory_order_relaxed); }
    /// Requests are in flight.
    bool busy() const { return counters_.in_flight.load(std::memory_order_relaxed) != 0; }
    const std::string& peer() const { return peer_; }
    /// NbdClientInfo.
    json::object details() const;
    /// A sentence when the client broke the protocol; after run().
    std::string_view violation() const { return violation_; }

  private:
    Task<bool> negotiate();
    /// STARTTLS is acknowledged. False: no way back, the connection ends.
    Task<bool> start_tls();
    Task<void> transmit();
    Task<void> enforce_time_limit();
    Task<int> receive_some(std::span<uint8_t> into);
    Task<bool> receive(std::span<uint8_t> into);
    Task<bool> skip(uint64_t bytes);
    Task<bool> send(std::span<const uint8_t> bytes);

    Server& server_;
    UniqueFd fd_;
    ConnectionLimits limits_;
    std::string peer_;
    Handshake handshake_;
    NbdExport* export_ = nullptr;  // entered
    Loop* loop_ = nullptr;         // of the session
    uint64_t options_ = 0;         // received
    bool good_bye_ = false;
    const Clock::time_point since_ = Clock::now();
    std::string violation_;
    std::unique_ptr<TlsStream> tls_;  // moves to the loop of the session and back
    Timer time_limit_;
    TaskScope scope_;
    SessionCounters counters_;
};

}  // namespace gantry::nbd
