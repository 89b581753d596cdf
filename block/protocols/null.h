// null-co and null-aio: a disk of any size that holds nothing. Writes are accepted and forgotten, reads give zeroes.

#pragma once

#include "block/driver.h"

namespace gantry::block {

extern const Driver kNullCoDriver;
extern const Driver kNullAioDriver;

}  // namespace gantry::block
