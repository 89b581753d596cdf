// Services: what commands act on.

#pragma once

#include <functional>
#include <string>

#include "block/graph.h"
#include "exports/export.h"
#include "nbd/servers.h"
#include "runtime/runtime.h"

namespace gantry::qmp {

class Objects;
class Monitors;
class MonitorDescriptors;

/// References to the parts of the daemon; made once by cli, alive as long as any monitor; each
/// session has a copy with its own descriptors. Main loop only.
struct Services {
    Runtime& runtime;
    block::Graph& graph;
    exports::Registry& exports;
    nbd::Servers& nbd_servers;
    Objects& objects;
    Monitors& monitors;
    /// Begins an orderly end of the process; returns at once.
    std::function<void()> request_quit;
    /// A listening socket handed over by the service manager or inherited, by name or number.
    /// For a command: or what its monitor has passed, which is given away.
    std::function<Result<UniqueFd>(std::string_view name)> resolve_fd;
    /// What the monitor has passed whose command is executed; null on the command line.
    MonitorDescriptors* descriptors = nullptr;
};

}  // namespace gantry::qmp
