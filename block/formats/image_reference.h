// Names that images store for other files (backing file, data file): what they mean, relative to which place. Pure; no
// I/O.

#pragma once

#include <string>
#include <string_view>

#include "runtime/error.h"
#include "schema/value.h"

namespace gantry::block {

class Node;

/// The name by which an image's own file is known, below any filters.
std::string own_file_name(const Node& file);

/// "json:", "nbd:", "http:" ... : something up to a colon before the first slash.
bool has_protocol_prefix(std::string_view name);

/// `name` as stored in the image whose own file is called `image_filename`: absolute, protocol and json: names stay,
/// others get the directory of the image. kInvalid when the image has no directory (its name is a json: description).
Result<std::string> resolve_image_name(std::string_view image_filename, std::string_view name);

/// The same for a name that is the path of a local file whatever it looks like ("json:x" is a file of that name).
/// kInvalid when the image itself is not known by a local path.
Result<std::string> resolve_local_name(std::string_view image_filename, std::string_view name);

/// Options of the protocol node behind a name: {driver: file, filename}, {driver: nbd, server, export}, {driver: http,
/// url} ... Not for json: names. kUnsupported "Unknown protocol 'X'"; kInvalid for addresses that make no sense.
Result<json::object> protocol_options(std::string_view name);

/// The object of a "json:{...}" name, dotted keys turned into nested objects, "node-name" left out. An image may
/// describe nodes but not take hold of nodes that exist: references by name are refused (kPermission). kInvalid: not
/// such an object.
Result<json::object> json_name_options(std::string_view name);

}  // namespace gantry::block
