// Memory of coroutine frames: per-thread free lists by size class. Under a sanitizer: plain malloc.

#pragma once

#include <cstddef>

namespace gantry {

/// Any thread. A frame may be freed on another thread than it came from; each list keeps a bounded number.
void* frame_alloc(size_t size);
void frame_free(void* frame, size_t size) noexcept;

}  // namespace gantry
