#pragma once

#include <cstdint>
#include <string>

#include "bench/loadgen/common_options.h"

namespace gantry::bench::vhost {

struct Options : CommonOptions {  // not the modes kRandRw and kConnect
    std::string socket_path;
    uint32_t queues = 1;     // virtqueues
    uint32_t ring_size = 0;  // descriptors of a ring; 0: 256, or more where the depth needs it
    uint32_t segments = 1;   // descriptors that the data of a request is spread over
    bool packed = false;
    bool event_idx = false;
    bool indirect = false;
    bool spin = false;

    bool writes() const { return mode == Mode::kRandWrite || mode == Mode::kWrite; }
    /// Descriptors of one request: header, data, status.
    uint32_t chain_length() const { return segments + 2; }
};

/// Reads the command line. What depends on the server is checked after connecting.
Outcome<Options> parse_options(int argc, char** argv);

/// The text of --help.
const char* usage();

}  // namespace gantry::bench::vhost
