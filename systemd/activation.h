// Descriptors the service manager passes at the start (sd_listen_fds(3)), by name: listening sockets, and what a
// process before this one has left in the descriptor store.

#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::systemd {

/// Main thread only.
class ActivationSockets {
  public:
    /// Takes the descriptors announced by LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES, marks them close-on-exec, and
    /// removes the variables. Empty when nothing was passed to this process.
    static ActivationSockets from_environment();
    ActivationSockets() = default;

    /// A duplicate of the first socket of that name; kNotFound lists the names there are.
    Result<UniqueFd> duplicate(std::string_view name) const;
    std::vector<std::string> names() const;
    bool has(std::string_view name) const;

    struct Passed {
        std::string name;
        UniqueFd fd;
    };
    /// What is no listening stream socket and has a name that `ours` accepts, in the order it came. Everything else of
    /// that kind is logged and closed.
    std::vector<Passed> take_others(bool (*ours)(std::string_view name));

  private:
    std::vector<Passed> sockets_;
    std::vector<Passed> others_;
};

}  // namespace gantry::systemd
