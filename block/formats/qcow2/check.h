// Check and repair of an image's metadata (spec/qcow2.md section 17).

#pragma once

#include <string>

#include "block/formats/qcow2/image.h"
#include "block/formats/qcow2/image_file.h"
#include "block/image_operations.h"

namespace gantry::block::qcow2 {

/// Counts every reference in `file` and compares them with the refcounts stored there; looks at the COPIED flags and at
/// what each entry says. Works on the file alone, past every cache: nothing else writes to it meanwhile and nothing
/// waits in memory. `image` is what the header says.
///
/// With a repair the file is changed in steps that are each safe to be cut off: references that lead nowhere go first,
/// then counts rise, then they fall, then flags follow; the dirty and corrupt bits go last, and only when a second
/// check finds nothing wrong. `image` (header, L1, bitmaps) follows. kLeaks lowers counts, and only when every
/// reference could be seen. The result is that of the second check, plus what was mended.
///
/// Main loop; turns are yielded. Errors: kIo (header structures cannot be read, or a write failed), kTooLarge,
/// kCancelled. Tables that cannot be read count as check_errors.
Task<Result<ImageCheck>> check_metadata(ImageFile& file, Image& image, CheckRepair repair, Progress progress);

/// At open, when the image was not closed: what leaked then is free again; the log tells. Returns the number of
/// clusters (for each: by how much does not matter). Corruptions are logged and left alone.
Task<Result<uint64_t>> reclaim_leaks(ImageFile& file, Image& image);

/// The same for a file that is not open as an image (it may be marked corrupt, its backing file may be gone). `name`:
/// of the node, for errors. The caller sees to it that nobody else uses `file`, and with a repair that it is writable.
Task<Result<ImageCheck>> check_file(Node& file, std::string name, CheckRepair repair, Progress progress);

}  // namespace gantry::block::qcow2
