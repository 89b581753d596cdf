// The command line of gantryd as a list in the order it was given.

#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"

namespace gantry::cli {

struct OptionUse {
    std::string name;   // without dashes: "blockdev"
    std::string value;  // empty for switches
};

/// One option the program takes.
struct OptionSpec {
    std::string_view name;
    char short_name;  // 0: none
    bool takes_value;
    std::string_view value_name;
    std::string_view doc;
};

/// `--opt VALUE`, `--opt=VALUE`, `-o VALUE`. Errors: `unrecognized option '--x'`, `option '--x' requires an argument`,
/// `x: Unexpected argument`. --help and --version end the parsing: what follows them is not looked at.
Result<std::vector<OptionUse>> parse_options(std::span<const OptionSpec> specs, std::span<const char* const> arguments);

/// "  --name VALUE   doc" lines.
std::string options_help(std::span<const OptionSpec> specs);

}  // namespace gantry::cli
