#include "cli/options.h"

#include <boost/program_options/options_description.hpp>
#include <boost/program_options/parsers.hpp>
#include <boost/program_options/positional_options.hpp>
#include <boost/program_options/value_semantic.hpp>

namespace gantry::cli {

namespace po = boost::program_options;

namespace {

constexpr const char* kStray = "stray word";

/// The arguments up to and including the first --help/--version: those act as soon as they are met.
std::vector<std::string> until_help(std::span<const OptionSpec> specs, std::span<const char* const> arguments) {
    std::vector<std::string> out;
    bool value_follows = false;
    for (const char* raw : arguments) {
        std::string_view word = raw;
        out.emplace_back(word);
        if (std::exchange(value_follows, false)) continue;
        if (word == "--help" || word == "-h" || word == "--version" || word == "-V") break;
        for (const OptionSpec& spec : specs) {
            bool is_long = word.starts_with("--") && word.substr(2) == spec.name;
            bool is_short = spec.short_name && word.size() == 2 && word[0] == '-' && word[1] == spec.short_name;
            if (spec.takes_value && (is_long || is_short)) value_follows = true;
        }
    }
    return out;
}

}  // namespace

Result<std::vector<OptionUse>> parse_options(std::span<const OptionSpec> specs,
                                             std::span<const char* const> arguments) {
    po::options_description described;
    for (const OptionSpec& spec : specs) {
        std::string name(spec.name);
        if (spec.short_name) name += fmt::format(",{}", spec.short_name);
        if (spec.takes_value) {
            described.add_options()(name.c_str(), po::value<std::vector<std::string>>(), "");
        } else {
            described.add_options()(name.c_str(), "");
        }
    }
    described.add_options()(kStray, po::value<std::vector<std::string>>(), "");
    po::positional_options_description positional;
    positional.add(kStray, -1);

    std::vector<OptionUse> out;
    try {
        namespace style = po::command_line_style;
        int allowed = style::allow_long | style::long_allow_adjacent | style::long_allow_next | style::allow_short |
                      style::short_allow_next | style::short_allow_adjacent | style::allow_dash_for_short;
        po::parsed_options parsed = po::command_line_parser(until_help(specs, arguments))
                                        .options(described)
                                        .positional(positional)
                                        .style(allowed)
                                        .run();
        for (const po::option& option : parsed.options) {
            if (option.string_key == kStray)
                return fail(ErrorKind::kInvalid, "{}: Unexpected argument", option.value.front());
            out.push_back({option.string_key, option.value.empty() ? std::string() : option.value.front()});
        }
    } catch (const po::unknown_option& e) {
        return fail(ErrorKind::kInvalid, "unrecognized option '{}'", e.get_option_name());
    } catch (const po::invalid_command_line_syntax& e) {
        if (e.kind() == po::invalid_syntax::missing_parameter ||
            e.kind() == po::invalid_syntax::empty_adjacent_parameter) {
            return fail(ErrorKind::kInvalid, "option '{}' requires an argument", e.get_option_name());
        }
        if (e.kind() == po::invalid_syntax::extra_parameter) {
            return fail(ErrorKind::kInvalid, "option '{}' doesn't allow an argument", e.get_option_name());
        }
        return fail(ErrorKind::kInvalid, "{}", e.what());
    } catch (const po::error& e) {
        return fail(ErrorKind::kInvalid, "{}", e.what());
    }
    return out;
}

std::string options_help(std::span<const OptionSpec> specs) {
    std::string out;
    for (const OptionSpec& spec : specs) {
        std::string left = fmt::format("  --{}", spec.name);
        if (spec.short_name) left += fmt::format(", -{}", spec.short_name);
        if (spec.takes_value) left += fmt::format(" {}", spec.value_name);
        out += left.size() < 32 ? fmt::format("{:<32}{}\n", left, spec.doc)
                                : fmt::format("{}\n{:<32}{}\n", left, "", spec.doc);
    }
    return out;
}

}  // namespace gantry::cli
