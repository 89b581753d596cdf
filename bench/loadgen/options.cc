#include "bench/loadgen/options.h"

#include <getopt.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <utility>

#include "bench/loadgen/numbers.h"
#include "bench/loadgen/wire.h"

namespace gantry::bench {

namespace {

constexpr uint32_t kMaxDepth = 4096;
constexpr uint32_t kMaxConnections = 1024;
constexpr uint64_t kMaxVerifyBuffers = uint64_t{1} << 30;

constexpr ModeName kModes[] = {
    {"randread", Mode::kRandRead}, {"randwrite", Mode::kRandWrite}, {"randrw", Mode::kRandRw},
    {"read", Mode::kRead},         {"write", Mode::kWrite},         {"connect", Mode::kConnect},
};

constexpr CommonLimits kLimits = {kModes, kMaxPayloadBytes, kMaxDepth, kMaxConnections};

void parse_tcp(const std::string& text, Options& options) {
    const size_t colon = text.rfind(':');
    const bool has_port = colon != std::string::npos && text.find(']', colon) == std::string::npos;
    options.tcp_host = text.substr(0, has_port ? colon : std::string::npos);
    if (has_port) options.tcp_port = text.substr(colon + 1);
    if (options.tcp_host.starts_with('[') && options.tcp_host.ends_with(']')) {
        options.tcp_host = options.tcp_host.substr(1, options.tcp_host.size() - 2);
    }
}

constexpr option kOwnOptions[] = {
    {"unix", required_argument, nullptr, 'u'},
    {"tcp", required_argument, nullptr, 't'},
    {"export", required_argument, nullptr, 'e'},
    {"connections", required_argument, nullptr, 'c'},
    {"limit", required_argument, nullptr, 'l'},
    {"read-percent", required_argument, nullptr, 'p'},
    {"socket-buffer", required_argument, nullptr, 'B'},
    {"structured", no_argument, nullptr, 'R'},
    {"verify", no_argument, nullptr, 'v'},
    {"fill", no_argument, nullptr, 'f'},
};

Outcome<> apply(int key, const char* text, Options& options) {
    switch (key) {
        case 'u':
            options.unix_path = text;
            return {};
        case 't':
            parse_tcp(text, options);
            return {};
        case 'e':
            options.export_name = text;
            return {};
        case 'c':
            return assign(parse_size("connections", text, 1, kMaxConnections), options.connections);
        case 'l':
            return assign_time(parse_time("limit", text), options.limit_ns);
        case 'p':
            return assign(parse_size("read-percent", text, 0, 100), options.read_percent);
        case 'B':
            return assign(parse_size("socket-buffer", text, 4096, 1u << 30), options.socket_buffer_bytes);
        case 'R':
            options.structured = true;
            return {};
        case 'v':
            options.verify = true;
            return {};
        case 'f':
            options.fill = true;
            return {};
        default:
            return apply_common(key, text, kLimits, options);
    }
}

Outcome<> check(Options& options) {
    if (options.unix_path.empty() == options.tcp_host.empty()) {
        return failure("say where the server is: either --unix=PATH or --tcp=HOST[:PORT]");
    }
    if (options.export_name.size() > 4096) return failure("--export: a name has at most 4096 bytes");
    if (options.threads == 0 || options.threads > options.connections) options.threads = options.connections;
    const uint64_t buffers = uint64_t{options.connections} * options.depth * options.block_bytes;
    if (options.verify && buffers > kMaxVerifyBuffers) {
        return failure("--verify needs connections * qd * bs of memory, at most 1 GiB");
    }
    return {};
}

}  // namespace

Outcome<Options> parse_options(int argc, char** argv) {
    return parse_words<Options>(argc, argv, kOwnOptions, apply, check);
}

const char* usage() {
    return "usage: gantry-bench-load --unix=PATH | --tcp=HOST[:PORT] [options]\n"
           "\n"
           "Loads one NBD export and reports what the server gave.\n"
           "\n"
           "  --export=NAME       export to use (default: the empty name)\n"
           "  --rw=MODE           randread (default), randwrite, randrw, read, write,\n"
           "                      connect (negotiate and disconnect, over and over)\n"
           "  --read-percent=N    share of reads of randrw (default 50)\n"
           "  --bs=BYTES          size of a request (default 4k)\n"
           "  --qd=N              requests outstanding on each connection (default 1)\n"
           "  --connections=N     connections (default 1)\n"
           "  --threads=N         threads that serve them (default: one each)\n"
           "  --runtime=TIME      1.5 or 200ms (default 1 s)\n"
           "  --offset=, --size=  use this part of the export only\n"
           "  --structured        negotiate structured replies (default: simple replies)\n"
           "  --fill              write the --verify pattern to the whole part first\n"
           "  --verify            check every byte read; with --fill, read everything again at the end\n"
           "  --stall=TIME        fail when the server is silent for so long (default 10 s)\n"
           "  --limit=TIME        fail when --fill or the final check take longer (default 120 s)\n"
           "  --socket-buffer=N   SO_SNDBUF and SO_RCVBUF (default: the kernel's)\n"
           "  --seed=N            start of the random offsets (default 1)\n"
           "  --json              print one line of JSON\n"
           "\n"
           "Exit status: 0 done, 1 the server failed or answered wrongly, 2 wrong usage.\n";
}

}  // namespace gantry::bench
