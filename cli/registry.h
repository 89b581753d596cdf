// The tables of everything this build serves; the only place that names them all.

#pragma once

#include <span>

#include "block/driver.h"
#include "exports/export.h"

namespace gantry::cli {

std::span<const block::Driver> drivers();
std::span<const exports::ExportType> export_types();

/// Aborts unless the schema's enums and the tables name the same drivers and export types.
void check_registry();

}  // namespace gantry::cli
