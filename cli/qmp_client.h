// A blocking QMP client for the gantry tool.

#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"
#include "schema/json_dialect.h"

namespace gantry::cli {

/// One connection to a control socket, negotiated. Not thread-safe; every call may block, at most `kTimeoutSeconds`
/// without an answer.
class QmpClient {
  public:
    static constexpr int kTimeoutSeconds = 30;

    /// kNotFound / kPermission / kTimedOut with the socket's path.
    static Result<QmpClient> connect(const std::string& socket_path);

    /// Sends a command and waits for its reply; events in between are dropped. The daemon's errors come back as they
    /// are.
    Result<json::value> execute(std::string_view command, json::object arguments);
    /// {"qemu": ..., "package": ...} of the greeting.
    const json::object& version() const { return version_; }

  private:
    Result<json::object> receive();
    std::string path_;
    UniqueFd fd_;
    schema::JsonReader reader_;
    json::object version_;
};

/// Where daemons put their control sockets: $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/gantry, /run/gantry (root), else a
/// private folder under the temporary directory.
std::string control_directory();
/// Every "*.qmp" socket in control_directory() and in the instance folders below it.
std::vector<std::string> find_control_sockets();

}  // namespace gantry::cli
