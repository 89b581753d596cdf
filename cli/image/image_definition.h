// Images described by options instead of a path: --image-opts and json: names.

#pragma once

#include <string>

#include "runtime/error.h"
#include "schema/validate.h"
#include "schema/value.h"

namespace gantry::cli::image {

/// Options of a node, not validated yet: `mode` says whether scalars are text. Drivers may be missing.
struct ImageDefinition {
    json::object options;
    schema::InputMode mode = schema::InputMode::kJson;
};

/// "file" or "host_device", as the path is.
std::string_view file_driver(const std::string& path);

/// `text`: what follows --image-opts, or a json: name. Nodes with a filename and no driver become files; a file that is
/// not said to be one becomes the "file" of an image whose driver is not known.
Result<ImageDefinition> parse_definition(const std::string& text, bool image_opts);

}  // namespace gantry::cli::image
