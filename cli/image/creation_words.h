// Creation options as they stand on a command line.

#pragma once

#include "block/create.h"
#include "cli/image/image_tool.h"

namespace gantry::cli::image {

/// From every -o, and -b and -F as backing_file and backing_fmt; nested keys (encrypt.format) in dots.
Result<block::CreationWords> creation_words(const Words& words);

/// What "-o help" shows.
void print_options(std::span<const block::CreationOption> options);

}  // namespace gantry::cli::image
