#include "cli/connect.h"

namespace gantry::cli {

Result<QmpClient> connect_to_daemon(const std::string& given) {
    if (!given.empty()) return QmpClient::connect(given);
    std::vector<std::string> living;
    std::vector<QmpClient> clients;
    for (const std::string& path : find_control_sockets()) {
        auto client = QmpClient::connect(path);
        if (!client) continue;
        living.push_back(path);
        clients.push_back(std::move(*client));
    }
    if (clients.empty()) {
        return fail(ErrorKind::kNotFound, "No running daemon has a control socket in {}; name one with --qmp SOCKET",
                    control_directory());
    }
    if (clients.size() > 1) {
        return fail(ErrorKind::kInvalid, "Several daemons are running; choose one with --qmp: {}",
                    fmt::join(living, " "));
    }
    return std::move(clients.front());
}

}  // namespace gantry::cli
