// main() of a load generator.

#pragma once

#include <cstdio>

namespace gantry::bench {

/// Exit status 0: done; 1: the server failed or answered wrongly; 2: wrong usage.
template <class Parse, class Run, class Print>
int program(const char* name, int argc, char** argv, Parse parse, const char* usage, Run run, Print print) {
    const auto options = parse(argc, argv);
    if (!options) {
        std::fprintf(stderr, "%s: %s\n", name, options.error().c_str());
        return 2;
    }
    if (options->help) {
        std::fputs(usage, stdout);
        return 0;
    }
    const auto report = run(*options);
    if (!report) {
        std::fprintf(stderr, "%s: %s\n", name, report.error().c_str());
        return 1;
    }
    print(*options, *report);
    return 0;
}

}  // namespace gantry::bench
