// gantry-bench-load: loads one NBD export and reports what the server gave. See bench/README.md.

#include <cstdio>

#include "bench/loadgen/options.h"
#include "bench/loadgen/program.h"
#include "bench/loadgen/run.h"

namespace gantry::bench {
namespace {

void print(const Options& options, const Report& report) {
    const auto requests = static_cast<double>(report.requests);
    const auto per_second = [&](double amount) { return report.seconds > 0 ? amount / report.seconds : 0; };
    const Histogram& latency = report.latency;
    const char* format =
        options.json
            ? "{\"rw\": \"%s\", \"bs\": %u, \"qd\": %u, \"connections\": %u, \"threads\": %u, \"structured\": %s, "
              "\"export_size\": %llu, \"ios\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"iops\": %.1f, \"mbps\": "
              "%.2f, "
              "\"lat_mean_us\": %.2f, \"lat_p50_us\": %.2f, \"lat_p99_us\": %.2f, \"lat_max_us\": %.2f, "
              "\"client_cpu_s\": %.4f, \"replies_per_recv\": %.2f, \"verified_bytes\": %llu}\n"
            : "%s bs=%u qd=%u connections=%u threads=%u structured=%s, export of %llu bytes\n"
              "%llu requests, %llu bytes in %.3f s: %.0f per second, %.1f MB/s\n"
              "latency us: mean %.1f, median %.1f, 99%% %.1f, max %.1f\n"
              "client CPU %.3f s, %.1f replies in each recv, %llu bytes verified\n";
    std::printf(format, options.mode_name.c_str(), options.block_bytes, options.depth, options.connections,
                options.threads, options.structured ? "true" : "false",
                static_cast<unsigned long long>(report.export_bytes), static_cast<unsigned long long>(report.requests),
                static_cast<unsigned long long>(report.bytes), report.seconds, per_second(requests),
                per_second(static_cast<double>(report.bytes)) / 1e6, latency.mean() / 1e3, latency.quantile(0.5) / 1e3,
                latency.quantile(0.99) / 1e3, latency.max() / 1e3, report.cpu_seconds,
                report.receives ? requests / static_cast<double>(report.receives) : 0.0,
                static_cast<unsigned long long>(report.verified_bytes));
}

}  // namespace
}  // namespace gantry::bench

int main(int argc, char** argv) {
    using namespace gantry::bench;
    return gantry::bench::program("gantry-bench-load", argc, argv, parse_options, usage(), run, print);
}
