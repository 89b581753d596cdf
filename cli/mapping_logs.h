// Mapping logs: where written images keep what they have acknowledged but not stored yet, so that a killed daemon's
// successor finds it. Files of a directory in memory, or memory files that the service manager keeps.

#pragma once

#include <map>
#include <string>

#include "exports/keeper.h"
#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::cli {

/// kInvalid unless `directory` is a directory in memory (tmpfs, ramfs): every new mapping is a write there.
Result<> check_mapping_log_directory(const std::string& directory);
/// The log of a node, "<directory>/<node>.map", made when it is not there. Locked for as long as this process lives, so
/// that a second daemon does not use it; kBusy when one does.
Result<UniqueFd> open_mapping_log(const std::string& directory, const std::string& node_name);

/// Logs in memory files that a keeper holds. Main loop only.
class KeptMappingLogs {
  public:
    explicit KeptMappingLogs(exports::Keeper& keeper) : keeper_(keeper) {}
    /// A descriptor of the log of a node: what a process before this one has left, or a new one; none when nobody keeps
    /// it.
    Result<UniqueFd> open(const std::string& node_name);
    /// Every node is closed: logs in which nothing is left are not kept any more. Those of images that could not be
    /// opened stay, for whoever can.
    void drop_empty();

  private:
    exports::Keeper& keeper_;
    std::map<std::string, UniqueFd> logs_;  // by the keeper's name
};

}  // namespace gantry::cli
