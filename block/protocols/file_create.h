// Making plain files.

#pragma once

#include <cstdint>
#include <string>

#include "block/create.h"

namespace gantry::block {

extern const Creator kFileCreator;
/// Raw images: a plain file, or a device that is large enough. blockdev-create makes them with driver file.
extern const Creator kRawCreator;

struct FileCreation {
    std::string filename;
    uint64_t size = 0;
    Preallocation preallocation = Preallocation::kOff;
    bool nocow = false;
    uint64_t extent_size_hint = uint64_t{1} << 20;
    bool hint_given = false;  // a hint that cannot be set is then an error
};

/// What create_file() found; decides what undo_file() takes away.
struct FileCreated {
    bool existed = false;
    bool is_device = false;  // a block device: nothing was made, its size suffices
};

/// Makes the file, or empties the one that is there, which nobody else may use. Main loop. "Could not create 'F': ...",
/// kPermission when a lock says that somebody uses it (nothing has changed then), "Unsupported preallocation mode".
Task<Result<FileCreated>> create_plain_file(FileCreation what, Progress progress);
/// After a later failure: deletes the file if it was not there before.
Task<void> undo_plain_file(std::string filename, FileCreated created);

/// size (when `size` is among the words), preallocation, nocow, extent_size_hint.
Result<FileCreation> file_creation_from(std::string filename, const CreationWords& words);
/// BlockdevOptions to open what was made.
json::object file_definition(const std::string& filename, FileCreated created);

}  // namespace gantry::block
