// Text for people from the tables: --help, TYPE,help and the manual.

#pragma once

#include <string>
#include <string_view>

#include "schema/types.h"

namespace gantry::schema {

/// Members of an object type, one per line with type, default and explanation; of a union also its cases.
/// An enum lists its values. Ends with a line end.
std::string help_for(const Type& type);
/// Only what one case of a union adds to the common members, e.g. ("ObjectOptions", "iothread").
std::string help_for_variant(const Type& union_type, std::string_view value);
/// The values of a union's tag or of an enum, one per line, indented.
std::string help_values(const Type& type);
/// A command with its arguments and result.
std::string help_for(const Command& command);
/// How messages and help name a type: "str", "int", "[str]", "on|off|auto", "BlockdevRef".
std::string type_label(const Type& type);

}  // namespace gantry::schema
