// Opening an image file or block device, and asking the kernel about it. Everything here blocks: any thread, never a
// loop's.

#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::block {

enum class FileKind : uint8_t { kRegular, kBlockDevice };

/// What is known about an open descriptor.
struct OpenedFile {
    UniqueFd fd;
    std::shared_ptr<const void> fd_set_use;  // of a descriptor out of /dev/fdset/N
    bool writable = false;                   // opened O_RDWR
    bool direct = false;                     // opened O_DIRECT
    bool never_writable =
        false;          // asked for with `read_only_if_must` or `probe_write`: the file cannot be opened for writing
    uint64_t size = 0;  // bytes
    uint32_t request_alignment = 1;  // of O_DIRECT offsets and lengths
    uint32_t memory_alignment = 1;
    uint32_t block_size = 1;  // allocation unit of the file system, logical block of a device
};

struct OpenRequest {
    std::string driver;    // for texts
    std::string filename;  // for texts, and what is opened unless `again` is set
    FileKind kind = FileKind::kRegular;
    bool write = false;
    bool direct = false;
    bool read_only_if_must = false;  // with `write`: EACCES, EPERM and EROFS give a read-only descriptor
    bool probe_write = false;        // without `write`: find out whether opening for writing could work
    int again = -1;                  // reopen the file behind this descriptor (another open file description)
};

/// Errors: "Could not open 'F': ..." with a hint, and the refusals of things that are not of `kind`. Never hangs on a
/// FIFO, never creates or changes anything. "/dev/fdset/N" is a descriptor that was passed over the monitor
/// (runtime/fd_sets.h), never a file.
Result<OpenedFile> open_file(const OpenRequest& request);

/// Could the file behind `fd` be opened for writing? Asked without doing it: closing a device that was open for writing
/// makes udev look at it again.
bool file_could_be_written(int fd, const std::string& filename, FileKind kind);

/// Size in bytes, now. -errno in the error.
Result<uint64_t> file_size(int fd, FileKind kind);

}  // namespace gantry::block
