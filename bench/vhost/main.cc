// gantry-bench-vhost: loads one vhost-user-blk export and reports what the server gave. See bench/README.md.

#include <cstdio>

#include "bench/loadgen/program.h"
#include "bench/vhost/options.h"
#include "bench/vhost/run.h"

namespace gantry::bench::vhost {
namespace {

void print(const Options& options, const Report& report) {
    const auto per_second = [&](uint64_t amount) {
        return report.seconds > 0 ? static_cast<double>(amount) / report.seconds : 0;
    };
    const auto truth = [](bool value) { return value ? "true" : "false"; };
    const Histogram& latency = report.latency;
    const char* format =
        options.json
            ? "{\"rw\": \"%s\", \"bs\": %u, \"qd\": %u, \"queues\": %u, \"threads\": %u, \"ring_size\": %u, "
              "\"segments\": %u, \"packed\": %s, \"event_idx\": %s, \"indirect\": %s, \"spin\": %s, "
              "\"capacity\": %llu, \"features\": %llu, \"ios\": %llu, \"bytes\": %llu, \"seconds\": %.6f, "
              "\"iops\": %.1f, \"mbps\": %.2f, \"lat_mean_us\": %.2f, \"lat_p50_us\": %.2f, \"lat_p99_us\": %.2f, "
              "\"lat_max_us\": %.2f, \"client_cpu_s\": %.4f, \"kicks\": %llu, \"signals\": %llu, \"sleeps\": %llu}\n"
            : "%s bs=%u qd=%u queues=%u threads=%u ring-size=%u segments=%u packed=%s event-idx=%s indirect=%s "
              "spin=%s\n"
              "disk of %llu bytes, features %#llx\n"
              "%llu requests, %llu bytes in %.3f s: %.0f per second, %.1f MB/s\n"
              "latency us: mean %.1f, median %.1f, 99%% %.1f, max %.1f\n"
              "client CPU %.3f s, %llu kicks, %llu signals, %llu sleeps\n";
    const auto wide = [](uint64_t value) { return static_cast<unsigned long long>(value); };
    std::printf(format, options.mode_name.c_str(), options.block_bytes, options.depth, options.queues, options.threads,
                options.ring_size, options.segments, truth(options.packed), truth(options.event_idx),
                truth(options.indirect), truth(options.spin), wide(report.disk.bytes), wide(report.disk.features),
                wide(report.requests), wide(report.bytes), report.seconds, per_second(report.requests),
                per_second(report.bytes) / 1e6, latency.mean() / 1e3, latency.quantile(0.5) / 1e3,
                latency.quantile(0.99) / 1e3, latency.max() / 1e3, report.cpu_seconds, wide(report.kicks),
                wide(report.signals), wide(report.sleeps));
}

}  // namespace
}  // namespace gantry::bench::vhost

int main(int argc, char** argv) {
    using namespace gantry::bench::vhost;
    return gantry::bench::program("gantry-bench-vhost", argc, argv, parse_options, usage(), run, print);
}
