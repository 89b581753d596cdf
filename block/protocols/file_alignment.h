// What O_DIRECT wants: alignment of offsets, lengths and memory.

#pragma once

#include <cstdint>

#include "block/protocols/file_open.h"

namespace gantry::block {

struct DirectAlignment {
    uint32_t request = 4096;
    uint32_t memory = 4096;
};

/// Asks statx(2), then the block device, then finds out by reading. `fd` is open with O_DIRECT. Blocks; any thread.
DirectAlignment direct_alignment(int fd, FileKind kind);

/// The smallest request alignment (1, 512 ... 4096) with which `read` answers anything but EINVAL; 4096 when 1 is said
/// to work (the file is then empty or served from a cache, which proves nothing) or none does. `read(offset, length,
/// memory_offset)` gives bytes or -errno. For files whose file system says nothing.
template <class Read>
DirectAlignment probe_alignment(Read read) {
    constexpr uint32_t kTry[] = {1, 512, 1024, 2048, 4096};
    DirectAlignment out;
    for (const uint32_t a : kTry) {
        if (read(0, a, 0) == -22 /* EINVAL */) continue;
        out.request = a == 1 ? 4096 : a;
        break;
    }
    for (const uint32_t a : kTry) {
        if (read(0, out.request, a) == -22) continue;
        out.memory = a == 1 ? 4096 : a;
        break;
    }
    return out;
}

/// Of a block device; 512 when it does not say.
uint32_t logical_block_size(int fd);

}  // namespace gantry::block
