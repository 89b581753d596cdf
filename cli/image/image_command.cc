// gantry image: the subcommands by name.

#include <cstdio>
#include <cstring>

#include "cli/commands.h"
#include "cli/image/image_tool.h"

namespace gantry::cli {

namespace {

struct ImageCommand {
    const char* name;
    int (*run)(std::span<const char* const>);
    const char* doc;
};

constexpr ImageCommand kCommands[] = {
    {"create", image::create_command, "make an image"},
    {"info", image::info_command, "show what an image is"},
    {"check", image::check_command, "check an image's structure, or mend it"},
    {"map", image::map_command, "list where the bytes of the disk are"},
    {"resize", image::resize_command, "change the size of the disk"},
    {"snapshot", image::snapshot_command, "list, create, apply or delete internal snapshots"},
    {"amend", image::amend_command, "change properties of an image"},
    {"measure", image::measure_command, "compute how large an image would be"},
    {"compact", image::compact_command, "return unused space of an image to the host"},
    {"commit", image::commit_command, "write an image into its backing file"},
    {"rebase", image::rebase_command, "change the name of the backing file"},
};

void print_help(FILE* out) {
    std::fputs("Usage: gantry image COMMAND [ARGUMENT]...\n\n", out);
    for (const ImageCommand& c : kCommands) std::fprintf(out, "  %-10s%s\n", c.name, c.doc);
    std::fputs("\n'gantry image COMMAND --help' explains each.\n", out);
}

}  // namespace

int image_command(std::span<const char* const> arguments) {
    if (arguments.empty()) {
        print_help(stderr);
        return image::kFailed;
    }
    const char* name = arguments[0];
    if (!std::strcmp(name, "--help") || !std::strcmp(name, "-h") || !std::strcmp(name, "help")) {
        print_help(stdout);
        return image::kOk;
    }
    for (const ImageCommand& c : kCommands) {
        if (!std::strcmp(name, c.name)) return c.run(arguments.subspan(1));
    }
    std::fprintf(stderr, "gantry image: there is no command '%s'; 'gantry image --help' lists them\n", name);
    return image::kFailed;
}

}  // namespace gantry::cli
