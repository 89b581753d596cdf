// gantry: what a person types.

#include <cstdio>
#include <cstring>

#include "cli/commands.h"

namespace {

struct Subcommand {
    const char* name;
    int (*run)(std::span<const char* const>);
    const char* doc;
};

constexpr Subcommand kSubcommands[] = {
    {"serve", gantry::cli::serve_command, "serve an image over NBD until interrupted"},
    {"mount", gantry::cli::mount_command, "show an image as a raw file"},
    {"umount", gantry::cli::umount_command, "end that"},
    {"image", gantry::cli::image_command, "make, check and change images"},
    {"status", gantry::cli::status_command, "show what the running daemons export"},
    {"tls", gantry::cli::tls_command, "make certificates or keys for TLS"},
    {"qmp", gantry::cli::qmp_command, "send a QMP command to a running daemon"},
};

void print_help(FILE* out) {
    std::fputs("Usage: gantry COMMAND [ARGUMENT]...\n\n", out);
    for (const Subcommand& s : kSubcommands) std::fprintf(out, "  %-10s%s\n", s.name, s.doc);
    std::fputs("\n'gantry COMMAND --help' explains each. The daemon with every option is gantryd.\n", out);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        print_help(stderr);
        return 2;
    }
    if (!std::strcmp(argv[1], "--help") || !std::strcmp(argv[1], "-h") || !std::strcmp(argv[1], "help")) {
        print_help(stdout);
        return 0;
    }
    if (!std::strcmp(argv[1], "--version") || !std::strcmp(argv[1], "-V")) {
        std::printf("gantry %s\n", GANTRY_VERSION);
        return 0;
    }
    for (const Subcommand& s : kSubcommands) {
        if (!std::strcmp(argv[1], s.name))
            return s.run(std::span<const char* const>(argv + 2, static_cast<size_t>(argc - 2)));
    }
    std::fprintf(stderr, "gantry: there is no command '%s'; 'gantry --help' lists them\n", argv[1]);
    return 2;
}
