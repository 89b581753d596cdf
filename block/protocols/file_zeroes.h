// Zeroing and discarding ranges of a file or block device without writing data.

#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "block/protocols/file_open.h"

namespace gantry::block {

/// What the file system or device has refused once is not asked for again. Any thread.
struct FileAbilities {
    std::atomic<bool> punch_hole{true};
    std::atomic<bool> zero_range{true};
    std::atomic<bool> allocate{true};
    std::atomic<bool> allocate_works{false};
    std::atomic<bool> discard{true};
    bool fast_device_zeroes = false;  // the device zeroes by itself, without data going over the wire
};

struct ZeroRequest {
    uint64_t offset = 0, length = 0;
    bool may_unmap = false;    // a hole is welcome; otherwise the range stays allocated
    bool no_fallback = false;  // only what is fast
};

// All block. 0, -ENOTSUP (nothing was changed, write data instead), or -errno.

/// The range of the regular file reads as zeroes afterwards; a range beyond the end makes the file longer, never
/// shorter. `block`: alignment in which an O_DIRECT descriptor can be written, 1 otherwise.
int zero_file_range(int fd, FileAbilities& can, const ZeroRequest& rq, uint32_t block);
/// The same for a block device, inside its size, aligned to its logical block.
int zero_device_range(int fd, FileAbilities& can, const ZeroRequest& rq);
/// The bytes are not needed any more.
int discard_file_range(int fd, FileAbilities& can, uint64_t offset, uint64_t length);
int discard_device_range(int fd, FileAbilities& can, uint64_t offset, uint64_t length);

/// A number from the request queue of the block device behind `fd` (sysfs), e.g. "discard_granularity"; 0 when unknown.
uint64_t device_queue_value(int fd, const char* name);

}  // namespace gantry::block
