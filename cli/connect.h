// Finding the daemon a tool command is meant for.

#pragma once

#include <string>
#include <vector>

#include "cli/qmp_client.h"

namespace gantry::cli {

/// The one control socket to use: `given` unless empty, else the only living daemon in control_directory(). An error
/// names the choices.
Result<QmpClient> connect_to_daemon(const std::string& given);

}  // namespace gantry::cli
