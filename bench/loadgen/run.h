#pragma once

#include <cstdint>

#include "bench/loadgen/histogram.h"
#include "bench/loadgen/options.h"
#include "bench/loadgen/outcome.h"

namespace gantry::bench {

/// What the measured phase did, all connections together.
struct Report {
    uint64_t export_bytes = 0;
    uint64_t requests = 0;
    uint64_t bytes = 0;
    uint64_t receives = 0;
    uint64_t verified_bytes = 0;  // over all phases
    double seconds = 0;
    double cpu_seconds = 0;  // of this process
    Histogram latency;
};

/// Connects, runs the phases (fill, the measured one, the final check) and disconnects.
/// The first failure of any connection ends all of them.
Outcome<Report> run(const Options& options);

}  // namespace gantry::bench
