// Connection: one client of the server, from accept to close.

#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "nbd/handshake/handshake.h"
#include "nbd/session.h"
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
};

/// Main loop, except for the session, which runs on a loop of the export.
class Connection {
  public:
    Connection(Server& server, const ExportDirectory& exports, UniqueFd fd, ConnectionLimits limits);

    /// The whole life: handshake, transmission. The socket is closed when it returns.
    Task<void> run();
    /// Ends it soon, whatever it does: the socket is shut down, run() returns.
    void cut();
    const std::string& peer() const { return peer_; }
    /// {address, requests, bytes-read, bytes-written, in-flight}.
    json::object details() const;
    /// A sentence when the client broke the protocol; after run().
    std::string_view violation() const { return violation_; }

  private:
    Task<bool> negotiate();
    Task<void> transmit();
    Task<void> enforce_time_limit();
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
    std::string_view violation_;
    Timer time_limit_;
    TaskScope scope_;
    SessionCounters counters_;
};

}  // namespace gantry::nbd
