// The qcow2 driver (versions 2 and 3).

#pragma once

#include "block/driver.h"

namespace gantry::block {

/// Reads everything a version 2 or 3 image can hold, encrypted payload excepted. Cannot write yet: opening for writing
/// is refused unless read-only or auto-read-only is set.
extern const Driver kQcow2Driver;

}  // namespace gantry::block
