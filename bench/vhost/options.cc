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

constexpr ModeName kModes[] = {
    {"randread", Mode::kRandRead},
    {"randwrite", Mode::kRandWrite},
    {"read", Mode::kRead},
    {"write", Mode::kWrite},
};

constexpr CommonLimits kLimits = {kModes, 32u << 20, kMaxRing, kMaxQueues};

constexpr option kOwnOptions[] = {
    {"socket", required_argument, nullptr, 'u'},    {"queues", required_argument, nullptr, 'Q'},
    {"ring-size", required_argument, nullptr, 'n'}, {"segments", required_argument, nullptr, 'g'},
    {"packed", no_argument, nullptr, 'P'},          {"event-idx", no_argument, nullptr, 'E'},
    {"indirect", no_argument, nullptr, 'I'},        {"spin", no_argument, nullptr, 'y'},
};

Outcome<> apply(int key, const char* text, Options& options) {
    switch (key) {
        case 'u':
            options.socket_path = text;
            return {};
        case 'Q':
            return assign(parse_size("queues", text, 1, kMaxQueues), options.queues);
        case 'n':
            return assign(parse_size("ring-size", text, 2, kMaxRing), options.ring_size);
        case 'g':
            return assign(parse_size("segments", text, 1, 1022), options.segments);
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
        default:
            return apply_common(key, text, kLimits, options);
    }
}

Outcome<> check(Options& options) {
    if (options.socket_path.empty()) return failure("say where the server is: --socket=PATH");
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
    return parse_words<Options>(argc, argv, kOwnOptions, apply, check);
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
