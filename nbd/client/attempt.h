// Attempt: connecting to a server and negotiating with it, once.

#pragma once

#include <memory>

#include "nbd/client/config.h"
#include "nbd/client/negotiate.h"
#include "nbd/client/transport.h"
#include "runtime/io.h"
#include "runtime/timer.h"

namespace gantry::nbd::client {

struct Connected {
    std::unique_ptr<Transport> transport;
    Negotiated negotiated;
};

/// Reusable, one attempt at a time; its own loop only.
class Attempt {
  public:
    /// Ends at `deadline`, or after ClientConfig::attempt_limit, or when cancelled. Texts: "Failed to connect to
    /// 'X': ...", and for what comes later "NBD server 'X': ...".
    Task<Result<Connected>> run(std::shared_ptr<const ClientConfig> config, Clock::time_point deadline);
    /// The attempt under way fails soon (kCancelled); a look-up of a name may still take its time.
    void cancel();

  private:
    Task<Result<UniqueFd>> connect(const ClientConfig* config);
    Task<int> connect_to(int fd, const SocketTarget* target);
    Task<void> watch(Clock::time_point deadline);
    void interrupt();

    Transport* transport_ = nullptr;  // negotiating
    CancellableIo* connecting_ = nullptr;
    Timer pause_;  // before another try at a socket whose backlog is full
    Timer limit_;
    bool running_ = false, cancelled_ = false, expired_ = false;
};

}  // namespace gantry::nbd::client
