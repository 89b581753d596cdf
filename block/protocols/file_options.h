// The options of `file` and `host_device`.

#pragma once

#include <string>
#include <string_view>

#include "block/node.h"
#include "schema/options.h"

namespace gantry::block {

struct FileOptions {
    enum class Locking : uint8_t { kAuto, kOn, kOff };

    std::string filename;  // as given, without the driver's prefix ("file:")
    Locking locking = Locking::kAuto;

    /// From validated options. Refuses what this build cannot do, by name: pr-manager, x-check-cache-dropped,
    /// aio=native without cache.direct. aio chooses nothing else: the I/O back end of the loop does the work in every
    /// case.
    static Result<FileOptions> parse(std::string_view driver, const schema::Options& options, const NodeFlags& flags);
};

}  // namespace gantry::block
