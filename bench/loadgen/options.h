#pragma once

#include <cstdint>
#include <string>

#include "bench/loadgen/common_options.h"

namespace gantry::bench {

struct Options : CommonOptions {
    std::string unix_path;  // one of unix_path and tcp_host is set
    std::string tcp_host;
    std::string tcp_port = "10809";
    std::string export_name;
    uint32_t connections = 1;
    int64_t limit_ns = 120'000'000'000;  // for --fill and the final check, each
    uint32_t read_percent = 50;
    uint32_t socket_buffer_bytes = 0;  // 0: the kernel's default
    bool structured = false;
    bool verify = false;
    bool fill = false;

    bool writes() const { return fill || mode == Mode::kRandWrite || mode == Mode::kWrite || mode == Mode::kRandRw; }
};

/// Reads the command line. Refuses what makes no sense by itself; what depends on the export is checked after
/// connecting.
Outcome<Options> parse_options(int argc, char** argv);

/// The text of --help.
const char* usage();

}  // namespace gantry::bench
