// What the reference knows and this build has not, each with its reason.

#pragma once

#include <optional>
#include <string_view>

namespace gantry::schema {

/// The reason why a known driver, command, event, export type or object type is absent; empty for unknown names and
/// for those that are served.
std::optional<std::string_view> unserved_driver(std::string_view name);
std::optional<std::string_view> unserved_command(std::string_view name);
std::optional<std::string_view> unserved_event(std::string_view name);
std::optional<std::string_view> unserved_export(std::string_view name);
std::optional<std::string_view> unserved_object(std::string_view name);

}  // namespace gantry::schema
