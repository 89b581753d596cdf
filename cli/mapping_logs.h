// Mapping logs of writable images in a directory of memory files.

#pragma once

#include <string>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::cli {

/// What outlives a killed daemon lives in memory that the kernel holds: `directory` must be on tmpfs, or a power cut
/// could leave a log that is newer than the image. kInvalid otherwise; kNotFound.
Result<> check_mapping_log_directory(const std::string& directory);

/// The log of the node `node_name`: made when it is not there, mode 0600, locked against a second daemon (kBusy).
Result<UniqueFd> open_mapping_log(const std::string& directory, const std::string& node_name);

}  // namespace gantry::cli
