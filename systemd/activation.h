// Socket activation (sd_listen_fds(3)): listening sockets the service manager opened for us, by name.

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
    /// removes the variables. What is no listening stream socket is logged and closed. Empty when nothing was passed to
    /// this process.
    static ActivationSockets from_environment();
    ActivationSockets() = default;

    /// A duplicate of the first socket of that name; kNotFound lists the names there are.
    Result<UniqueFd> duplicate(std::string_view name) const;
    std::vector<std::string> names() const;
    bool has(std::string_view name) const;

  private:
    struct Socket {
        std::string name;
        UniqueFd fd;
    };
    std::vector<Socket> sockets_;
};

}  // namespace gantry::systemd
