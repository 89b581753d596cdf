// The qcow2 driver (versions 2 and 3).

#pragma once

#include "block/driver.h"

namespace gantry::block {

/// Reads and writes everything a version 2 or 3 image can hold.
extern const Driver kQcow2Driver;

}  // namespace gantry::block
