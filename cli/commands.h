// The subcommands of the gantry tool. Each gets the words after its name and returns the exit status.

#pragma once

#include <span>

namespace gantry::cli {

int image_command(std::span<const char* const> arguments);
int mount_command(std::span<const char* const> arguments);
int serve_command(std::span<const char* const> arguments);
int status_command(std::span<const char* const> arguments);
int tls_command(std::span<const char* const> arguments);
int umount_command(std::span<const char* const> arguments);
int qmp_command(std::span<const char* const> arguments);

}  // namespace gantry::cli
