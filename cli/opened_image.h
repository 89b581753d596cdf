// The image of `gantry serve` and `gantry mount`: opened in a daemon of this process.

#pragma once

#include <optional>
#include <string>

#include "cli/daemon.h"

namespace gantry::cli {

struct ImageChoice {
    std::string image;     // path
    std::string format;    // empty: found out from its first bytes
    std::string snapshot;  // internal; empty: none
    bool write = false;
    std::optional<unsigned> partition;  // of the disk in it
};

/// Makes the nodes "file" (the image), "disk" and, of a partition, "partition"; the name of the one to export. A
/// probed raw image is never writable: a guest could turn it into another format.
Result<std::string> open_image(Daemon& daemon, const ImageChoice& choice);

}  // namespace gantry::cli
