// Services: what commands act on.

#pragma once

#include <functional>
#include <string>

#include "block/graph.h"
#include "exports/export.h"
#include "nbd/server.h"
#include "runtime/runtime.h"

namespace gantry::qmp {

class Objects;
class Monitors;

/// References to the parts of the daemon; made once by cli, alive as long as any monitor. Main loop only.
struct Services {
    Runtime& runtime;
    block::Graph& graph;
    exports::Registry& exports;
    nbd::Server& nbd_server;
    Objects& objects;
    Monitors& monitors;
    /// Begins an orderly end of the process; returns at once.
    std::function<void()> request_quit;
    /// A listening socket handed over by the service manager or inherited, by name or number.
    std::function<Result<UniqueFd>(std::string_view name)> resolve_fd;
};

}  // namespace gantry::qmp
