#include "bench/vhost/options.h"

#include <getopt.h>

#include <algorithm>
#include <array>
#include <bit>
#include <string_view>
#include <utility>

#include "bench/loadgen/numbers.h"

namespace gantry::bench::vhost {

namespace {

constexpr uint32_t kMaxRing = 32768;
constexpr uint32_t kMaxQueues = 256;
constexpr uint64_t kMaxMemory = uint64_t{1} << 30;

constexpr std::array<std::pair<std::string_view, Mode>, 4> kModes = {{
    {"randread", Mode::kRandRead},
    {"randwrite", Mode::kRandWrite},
    {"read", Mode::kRead},
    {"write", Mode::kWrite},
}};

Outcome<> parse_mode(std::string_view text, Options& options) {
    const auto* found = std::ranges::find(kModes, text, &std::pair<std::string_view, Mode>::first);
    if (found == kModes.end()) {
        return failure("--rw=" + std::string(text) + ": expected randread, randwrite, read or write");
    }
    options.mode = found->second;
    options.mode_name = text;
    return {};
}

constexpr option kLongOptions[] = {
    {"socket", required_argument, nullptr, 'u'},
    {"rw", required_argument, nullptr, 'w'},
    {"bs", required_argument, nullptr, 'b'},
    {"qd", required_argument, nullptr, 'q'},
    {"queues", required_argument, nullptr, 'Q'},
    {"threads", required_argument, nullptr, 'T'},
    {"ring-size", required_argument, nullptr, 'n'},
    {"segments", required_argument, nullptr, 'g'},
    {"runtime", required_argument, nullptr, 'r'},
    {"stall", required_argument, nullptr, 's'},
    {"offset", required_argument, nullptr, 'o'},
    {"size", required_argument, nullptr, 'z'},
    {"seed", required_argument, nullptr, 'S'},
    {"packed", no_argument, nullptr, 'P'},
    {"event-idx", no_argument, nullptr, 'E'},
    {"indirect", no_argument, nullptr, 'I'},
    {"spin", no_argument, nullptr, 'y'},
    {"json", no_argument, nullptr, 'j'},
    {"help", no_argument, nullptr, 'h'},
    {nullptr, 0, nullptr, 0},
};

Outcome<> apply(int key, const char* text, Options& options) {
    switch (key) {
        case 'u':
            options.socket_path = text;
            return {};
        case 'w':
            return parse_mode(text, options);
        case 'b':
            return assign(parse_size("bs", text, 512, 32u << 20), options.block_bytes);
        case 'q':
            return assign(parse_size("qd", text, 1, kMaxRing), options.depth);
        case 'Q':
            return assign(parse_size("queues", text, 1, kMaxQueues), options.queues);
        case 'T':
            return assign(parse_size("threads", text, 1, kMaxQueues), options.threads);
        case 'n':
            return assign(parse_size("ring-size", text, 2, kMaxRing), options.ring_size);
        case 'g':
            return assign(parse_size("segments", text, 1, 1022), options.segments);
        case 'r':
            return assign_time(parse_time("runtime", text), options.runtime_ns);
        case 's':
            return assign_time(parse_time("stall", text), options.stall_ns);
        case 'o':
            return assign(parse_size("offset", text, 0, INT64_MAX), options.region_offset);
        case 'z':
            return assign(parse_size("size", text, 512, INT64_MAX), options.region_bytes);
        case 'S':
            return assign(parse_size("seed", text, 0, UINT64_MAX), options.seed);
        case 'P':
            options.packed = true;
            return {};
        case 'E':
            options.event_idx = true;
            return {};
        case 'I':
            options.indirect = true;
            return {};
        case 'y':
            options.spin = true;
            return {};
        case 'j':
            options.json = true;
            return {};
        case 'h':
            options.help = true;
            return {};
        default:
            return failure("unknown option or missing value; --help lists what there is");
    }
}

Outcome<> check(Options& options) {
    if (options.socket_path.empty()) return failure("say where the server is: --socket=PATH");
    if (options.block_bytes % 512 != 0) return failure("--bs must be a multiple of 512");
    if (options.region_offset % options.block_bytes != 0) return failure("--offset must be a multiple of --bs");
    if (options.block_bytes / 512 % options.segments != 0) {
        return failure("--segments must divide --bs into pieces of whole sectors");
    }
    const uint32_t needed = options.depth * (options.indirect ? 1 : options.chain_length());
    if (options.ring_size == 0) options.ring_size = std::max(256u, std::bit_ceil(needed));
    if (options.ring_size < needed || options.ring_size > kMaxRing) {
        return failure("--ring-size=" + std::to_string(options.ring_size) + ": --qd=" + std::to_string(options.depth) +
                       " needs " + std::to_string(needed) + " descriptors of at most " + std::to_string(kMaxRing));
    }
    if (!options.packed && !std::has_single_bit(options.ring_size)) {
        return failure("--ring-size must be a power of two for a split ring");
    }
    if (options.threads == 0 || options.threads > options.queues) options.threads = options.queues;
    if (uint64_t{options.queues} * options.depth * options.block_bytes > kMaxMemory) {
        return failure("queues * qd * bs must be at most 1 GiB of memory");
    }
    return {};
}

}  // namespace

Outcome<Options> parse_options(int argc, char** argv) {
    Options options;
    opterr = 0;
    int key;
    while ((key = getopt_long(argc, argv, "h", kLongOptions, nullptr)) != -1) {
        BENCH_CHECK(apply(key, optarg, options));
    }
    if (options.help) return options;
    if (optind < argc) return failure(std::string("unexpected argument '") + argv[optind] + "'");
    BENCH_CHECK(check(options));
    return options;
}

const char* usage() {
    return "usage: gantry-bench-vhost --socket=PATH [options]\n"
           "\n"
           "Loads one vhost-user-blk export, as the front end and the driver in one, and reports what the server "
           "gave.\n"
           "\n"
           "  --rw=MODE           randread (default), randwrite, read, write\n"
           "  --bs=BYTES          size of a request (default 4k)\n"
           "  --qd=N              requests outstanding on each queue (default 1)\n"
           "  --queues=N          virtqueues (default 1)\n"
           "  --threads=N         threads that serve them (default: one each)\n"
           "  --ring-size=N       descriptors of each ring (default 256, or what the depth needs)\n"
           "  --segments=N        descriptors that the data of a request is spread over (default 1)\n"
           "  --packed            packed rings (default: split)\n"
           "  --event-idx         negotiate VIRTIO_F_EVENT_IDX\n"
           "  --indirect          each request in an indirect table\n"
           "  --spin              look for completions all the time, never sleep, ask for no calls\n"
           "  --runtime=TIME      1.5 or 200ms (default 1 s)\n"
           "  --offset=, --size=  use this part of the disk only\n"
           "  --stall=TIME        fail when the server is silent for so long (default 10 s)\n"
           "  --seed=N            start of the random offsets (default 1)\n"
           "  --json              print one line of JSON\n"
           "\n"
           "Exit status: 0 done, 1 the server failed or answered wrongly, 2 wrong usage.\n";
}

}  // namespace gantry::bench::vhost
