// What the introspection commands answer, generated from the tables.

#pragma once

#include "schema/value.h"

namespace gantry::schema {

/// query-qmp-schema: an array of SchemaInfo. Types other than builtins are named by decimal numbers.
json::array introspect();
/// query-commands: [{"name": ...}].
json::array command_list();
/// query-events (legacy): [{"name": ...}].
json::array event_list();

}  // namespace gantry::schema
