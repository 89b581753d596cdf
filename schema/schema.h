// The entry to the tables: what this build serves, by name.

#pragma once

#include <span>
#include <string_view>

#include "schema/types.h"

namespace gantry::schema {

/// Null when the command is not served (schema/unserved.h may know why). Names are matched exactly.
const Command* find_command(std::string_view name);
/// Every command served, in a stable order.
std::span<const Command* const> commands();

/// Null when the event does not exist here.
const Event* find_event(std::string_view name);
/// Every event that can be sent.
std::span<const Event* const> events();

/// A named type, e.g. "BlockdevOptions", "BlockExportOptions", "ObjectOptions", "NbdServerOptions", "MonitorOptions",
/// "ChardevOptions". Naming one that does not exist is a broken invariant: it aborts.
const Type& type(std::string_view name);
/// The same, null when there is none.
const Type* find_type(std::string_view name);

/// Whether `value` is one of an enum's served values.
bool has_value(const Type& enum_type, std::string_view value);

}  // namespace gantry::schema
