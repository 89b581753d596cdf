// Faults in memory that somebody else has cut short: zeroes come in the place of what is gone.

#pragma once

#include <cstddef>

namespace gantry::virtio::sigbus {

/// From now on a SIGBUS inside [base, base + length) maps zeroes from the page of the fault (of `page` bytes) to the
/// end of the range, and the access goes on. Others take the way they took before. The answer is for the next two. Any
/// thread.
size_t watch(void* base, size_t length, size_t page);
/// Before the range is unmapped.
void forget(size_t slot);
/// Whether it has happened.
bool hit(size_t slot);

}  // namespace gantry::virtio::sigbus
