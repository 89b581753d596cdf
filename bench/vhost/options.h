#pragma once

#include <cstdint>
#include <string>

#include "bench/loadgen/options.h"
#include "bench/loadgen/outcome.h"

namespace gantry::bench::vhost {

struct Options {
    std::string socket_path;
    Mode mode = Mode::kRandRead;  // one of kRandRead, kRandWrite, kRead, kWrite
    std::string mode_name = "randread";
    uint32_t block_bytes = 4096;
    uint32_t depth = 1;      // requests in flight on each queue
    uint32_t queues = 1;     // virtqueues
    uint32_t threads = 0;    // 0: one for each queue
    uint32_t ring_size = 0;  // descriptors of a ring; 0: 256, or more where the depth needs it
    uint32_t segments = 1;   // descriptors that the data of a request is spread over
    int64_t runtime_ns = 1'000'000'000;
    int64_t stall_ns = 10'000'000'000;
    uint64_t region_offset = 0;
    uint64_t region_bytes = 0;  // 0: to the end of the disk
    uint64_t seed = 1;
    bool packed = false;
    bool event_idx = false;
    bool indirect = false;
    bool spin = false;
    bool json = false;
    bool help = false;

    bool writes() const { return mode == Mode::kRandWrite || mode == Mode::kWrite; }
    /// Descriptors of one request: header, data, status.
    uint32_t chain_length() const { return segments + 2; }
};

/// Reads the command line. What depends on the server is checked after connecting.
Outcome<Options> parse_options(int argc, char** argv);

/// The text of --help.
const char* usage();

}  // namespace gantry::bench::vhost
