#pragma once

#include <cstdint>

#include "bench/loadgen/histogram.h"
#include "bench/loadgen/outcome.h"
#include "bench/vhost/front_end.h"
#include "bench/vhost/options.h"

namespace gantry::bench::vhost {

/// What happened, all queues together.
struct Report {
    Disk disk;
    uint64_t requests = 0;
    uint64_t bytes = 0;
    uint64_t kicks = 0;
    uint64_t signals = 0;
    uint64_t sleeps = 0;  // of threads that had nothing to do
    double seconds = 0;
    double cpu_seconds = 0;  // of this process
    Histogram latency;
};

/// Connects, loads, stops the queues and disconnects. The first failure of any queue ends all of them.
Outcome<Report> run(const Options& options);

}  // namespace gantry::bench::vhost
