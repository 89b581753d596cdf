// The rule of names that users choose: nodes, exports, objects, character devices.

#pragma once

#include <algorithm>
#include <string_view>

namespace gantry::schema {

/// Letters, digits, '-', '.', '_' after a first letter. Node names are also limited in length, see Graph.
inline bool is_identifier(std::string_view name) {
    const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
    const auto any = [&](char c) { return letter(c) || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_'; };
    return !name.empty() && letter(name.front()) && std::ranges::all_of(name, any);
}

}  // namespace gantry::schema
