// raw: the bytes of the file below, or of a window of it.

#pragma once

#include "block/driver.h"

namespace gantry::block {

extern const Driver kRawDriver;

}  // namespace gantry::block
