// gantry qmp COMMAND [key=value]...: any QMP command from the shell.

#include <cstdio>

#include "cli/commands.h"
#include "cli/connect.h"
#include "cli/options.h"
#include "cli/readable.h"
#include "schema/help.h"
#include "schema/keyval.h"
#include "schema/schema.h"

namespace gantry::cli {

namespace {

constexpr OptionSpec kOptions[] = {
    {"qmp", 0, true, "SOCKET", "control socket (default: the only daemon running)"},
    {"json", 0, false, "", "print the reply as JSON"},
    {"help", 'h', false, "", "show this; with COMMAND: its arguments"},
};

void print_help(const std::string& command) {
    if (const schema::Command* c = schema::find_command(command)) {
        std::fputs(schema::help_for(*c).c_str(), stdout);
        return;
    }
    std::printf("Usage: gantry qmp [OPTION]... COMMAND [KEY=VALUE]...\n\n%s\nCommands:\n",
                options_help(kOptions).c_str());
    for (const schema::Command* c : schema::commands()) std::printf("  %s\n", std::string(c->name).c_str());
}

/// key=value words are one list; their types come from the schema where this build knows the command, else they stay
/// strings.
Result<json::object> parse_arguments(const std::string& command, const std::vector<std::string>& words) {
    if (words.size() == 1 && words[0].starts_with('{')) {
        TRY(json::value value, schema::parse_json(words[0]));
        if (!value.is_object()) return fail(ErrorKind::kInvalid, "The arguments of '{}' are no JSON object", command);
        return std::move(value.get_object());
    }
    std::string joined;
    for (const std::string& word : words) joined += (joined.empty() ? "" : ",") + word;
    const schema::Command* known = schema::find_command(command);
    if (known && known->arguments) return schema::parse_option(*known->arguments, joined, "");
    TRY(schema::OptionValue value, schema::parse_keyval(joined, ""));
    return std::move(value.object);
}

Result<json::value> run(const std::string& socket, const std::string& command, const std::vector<std::string>& words) {
    TRY(json::object arguments, parse_arguments(command, words));
    TRY(QmpClient client, connect_to_daemon(socket));
    return client.execute(command, std::move(arguments));
}

}  // namespace

int qmp_command(std::span<const char* const> arguments) {
    std::vector<const char*> options;
    std::vector<std::string> words;
    for (size_t i = 0; i < arguments.size(); i++) {
        std::string_view word = arguments[i];
        if (!word.starts_with("-")) {
            words.emplace_back(word);
            continue;
        }
        options.push_back(arguments[i]);
        if (word == "--qmp" && i + 1 < arguments.size()) options.push_back(arguments[++i]);
    }
    auto parsed = parse_options(kOptions, options);
    if (!parsed) {
        std::fprintf(stderr, "gantry qmp: %s\n", parsed.error().message().c_str());
        return 2;
    }
    std::string socket;
    bool as_json = false;
    for (const OptionUse& option : *parsed) {
        if (option.name == "help") {
            print_help(words.empty() ? std::string() : words[0]);
            return 0;
        }
        if (option.name == "qmp") socket = option.value;
        if (option.name == "json") as_json = true;
    }
    if (words.empty()) {
        std::fputs("gantry qmp: name a command; 'gantry qmp --help' lists them\n", stderr);
        return 2;
    }
    std::string command = words.front();
    words.erase(words.begin());
    auto reply = run(socket, command, words);
    if (!reply) {
        std::fprintf(stderr, "gantry qmp: %s: %s\n", command.c_str(), reply.error().message().c_str());
        return 1;
    }
    std::string text = as_json ? schema::to_json(*reply, schema::JsonLayout::kPretty) + "\n" : readable(*reply);
    std::fputs(text.c_str(), stdout);
    return 0;
}

}  // namespace gantry::cli
