// Option values of the command line: JSON or key=value,...

#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "schema/types.h"
#include "schema/validate.h"
#include "schema/value.h"

namespace gantry::schema {

/// kDotted: keys are dotted paths, a word without '=' is an error. kFlat: the older syntax of --chardev, where keys are
/// plain and a word alone means word=on, or with "no" before it word=off.
enum class KeyvalStyle : uint8_t { kDotted, kFlat };

struct OptionValue {
    json::object object;  // scalars are strings when mode is kKeyval
    InputMode mode = InputMode::kKeyval;
    bool help = false;                  // the word "help" (or "?") stood among the pairs
    std::vector<std::string> warnings;  // for stderr: old forms that still work
};

/// key=value text to an object of strings, objects and arrays. `implied_key` (may be empty) names the first word.
/// ",," is a comma in a value; a later duplicate wins. Errors (kInvalid): `Expected '=' after parameter 'x'`,
/// `Invalid parameter 'x'`, `Parameter 'a.1' missing`, ...
Result<OptionValue> parse_keyval(std::string_view text, std::string_view implied_key,
                                 KeyvalStyle style = KeyvalStyle::kDotted);

/// The value of an option: JSON when it starts with '{', else parse_keyval.
Result<OptionValue> parse_option_value(std::string_view text, std::string_view implied_key,
                                       KeyvalStyle style = KeyvalStyle::kDotted);

/// parse_option_value, then validate against `type`. "help" is an error here; ask parse_option_value first where it is
/// not.
Result<json::object> parse_option(const Type& type, std::string_view text, std::string_view implied_key,
                                  KeyvalStyle style = KeyvalStyle::kDotted);

/// --chardev: ChardevOptions in the older syntax (or JSON), with the sentences that belong to it: `chardev: no id
/// specified`, `'x' is not a valid char driver name`, `Invalid parameter 'x'`. Adds to `warnings`.
Result<json::object> parse_chardev(std::string_view text, std::vector<std::string>& warnings);

}  // namespace gantry::schema
