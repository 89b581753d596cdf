// Checking input against a type, with the reference's sentences for what is wrong.

#pragma once

#include <string_view>

#include "runtime/error.h"
#include "schema/types.h"
#include "schema/value.h"

namespace gantry::schema {

/// Where the input came from. kKeyval: every scalar is a string still ("on", "64k") and is converted.
enum class InputMode : uint8_t { kJson, kKeyval };

/// Checks `input` against an object type and returns it normalised: old spellings renamed, old nested shapes flattened,
/// key=value scalars converted, integers as int64 (uint64 only above 2^63 - 1). Absent optional members stay absent.
/// Nothing has happened when it fails; one error (kInvalid) is reported, its path in the reference's notation.
Result<json::object> validate(const Type& type, json::object input, InputMode mode = InputMode::kJson);

/// The same for a value of any type; `path` is the name it has in messages ("null" when empty).
Result<json::value> validate_value(const Type& type, json::value input, std::string_view path = {},
                                   InputMode mode = InputMode::kJson);

/// A command's arguments; without arguments type only the empty object passes.
Result<json::object> validate_arguments(const Command& command, json::object arguments);

}  // namespace gantry::schema
