// The options that every load generator has.

#pragma once

#include <getopt.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/loadgen/numbers.h"
#include "bench/loadgen/outcome.h"

namespace gantry::bench {

enum class Mode { kRandRead, kRandWrite, kRandRw, kRead, kWrite, kConnect };

struct CommonOptions {
    Mode mode = Mode::kRandRead;
    std::string mode_name = "randread";
    uint32_t block_bytes = 4096;
    uint32_t depth = 1;    // requests in flight on each connection or queue
    uint32_t threads = 0;  // 0: one for each connection or queue
    int64_t runtime_ns = 1'000'000'000;
    int64_t stall_ns = 10'000'000'000;  // a server silent for so long has failed
    uint64_t region_offset = 0;
    uint64_t region_bytes = 0;  // 0: to the end
    uint64_t seed = 1;
    bool json = false;
    bool help = false;
};

using ModeName = std::pair<std::string_view, Mode>;

struct CommonLimits {
    std::span<const ModeName> modes;
    uint64_t block_bytes, depth, threads;
};

inline constexpr option kCommonOptions[] = {
    {"rw", required_argument, nullptr, 'w'},      {"bs", required_argument, nullptr, 'b'},
    {"qd", required_argument, nullptr, 'q'},      {"threads", required_argument, nullptr, 'T'},
    {"runtime", required_argument, nullptr, 'r'}, {"stall", required_argument, nullptr, 's'},
    {"offset", required_argument, nullptr, 'o'},  {"size", required_argument, nullptr, 'z'},
    {"seed", required_argument, nullptr, 'S'},    {"json", no_argument, nullptr, 'j'},
    {"help", no_argument, nullptr, 'h'},
};

inline Outcome<> parse_mode(std::string_view text, std::span<const ModeName> modes, CommonOptions& options) {
    const auto found = std::ranges::find(modes, text, &ModeName::first);
    if (found == modes.end()) {
        std::string all;
        for (const ModeName& mode : modes) {
            all += &mode == &modes.front() ? "" : &mode == &modes.back() ? " or " : ", ";
            all += mode.first;
        }
        return failure("--rw=" + std::string(text) + ": expected " + all);
    }
    options.mode = found->second;
    options.mode_name = text;
    return {};
}

inline Outcome<> apply_common(int key, const char* text, const CommonLimits& limits, CommonOptions& options) {
    switch (key) {
        case 'w':
            return parse_mode(text, limits.modes, options);
        case 'b':
            return assign(parse_size("bs", text, 512, limits.block_bytes), options.block_bytes);
        case 'q':
            return assign(parse_size("qd", text, 1, limits.depth), options.depth);
        case 'T':
            return assign(parse_size("threads", text, 1, limits.threads), options.threads);
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

/// The command line: options of its own (`own`, taken by `apply(key, text, options)`; keys that it does not know go to
/// apply_common()), then `check(options)`, unless help is asked for.
template <class Options, class Apply, class Check>
Outcome<Options> parse_words(int argc, char** argv, std::span<const option> own, Apply apply, Check check) {
    std::vector<option> all(own.begin(), own.end());
    all.insert(all.end(), std::begin(kCommonOptions), std::end(kCommonOptions));
    all.push_back({});
    Options options;
    opterr = 0;
    int key;
    while ((key = getopt_long(argc, argv, "h", all.data(), nullptr)) != -1) {
        BENCH_CHECK(apply(key, optarg, options));
    }
    if (options.help) return options;
    if (optind < argc) return failure(std::string("unexpected argument '") + argv[optind] + "'");
    if (options.block_bytes % 512 != 0) return failure("--bs must be a multiple of 512");
    if (options.region_offset % options.block_bytes != 0) return failure("--offset must be a multiple of --bs");
    BENCH_CHECK(check(options));
    return options;
}

}  // namespace gantry::bench
