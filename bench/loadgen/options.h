#pragma once

#include <cstdint>
#include <string>

#include "bench/loadgen/outcome.h"

namespace gantry::bench {

enum class Mode { kRandRead, kRandWrite, kRandRw, kRead, kWrite, kConnect };

struct Options {
    std::string unix_path;  // one of unix_path and tcp_host is set
    std::string tcp_host;
    std::string tcp_port = "10809";
    std::string export_name;
    Mode mode = Mode::kRandRead;
    std::string mode_name = "randread";
    uint32_t block_bytes = 4096;
    uint32_t depth = 1;
    uint32_t connections = 1;
    uint32_t threads = 0;  // 0: one for each connection
    int64_t runtime_ns = 1'000'000'000;
    int64_t stall_ns = 10'000'000'000;   // a server silent for so long has failed
    int64_t limit_ns = 120'000'000'000;  // for --fill and the final check, each
    uint64_t region_offset = 0;
    uint64_t region_bytes = 0;  // 0: to the end of the export
    uint32_t read_percent = 50;
    uint64_t seed = 1;
    uint32_t socket_buffer_bytes = 0;  // 0: the kernel's default
    bool structured = false;
    bool verify = false;
    bool fill = false;
    bool json = false;
    bool help = false;

    bool writes() const { return fill || mode == Mode::kRandWrite || mode == Mode::kWrite || mode == Mode::kRandRw; }
};

/// Reads the command line. Refuses what makes no sense by itself; what depends on the export is checked after
/// connecting.
Outcome<Options> parse_options(int argc, char** argv);

/// The text of --help.
const char* usage();

}  // namespace gantry::bench
