// JSON values for people.

#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "schema/value.h"

namespace gantry::cli {

/// Indented "name: value" lines; lists as "- " items. Ends with a line end unless empty.
std::string readable(const json::value& value);

/// Columns padded to their widest cell; the first row is the heading.
std::string table(const std::vector<std::vector<std::string>>& rows);

/// "1.5 GiB (1610612736 bytes)".
std::string readable_size(uint64_t bytes);

}  // namespace gantry::cli
