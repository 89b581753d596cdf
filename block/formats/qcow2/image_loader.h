// Reading an image's metadata from its file at open.

#pragma once

#include <string>
#include <string_view>

#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

/// Header, extensions, names, snapshot table and bitmap directory of `file`, validated; then the L1 table of the disk,
/// or of the internal snapshot `snapshot` (id or name; empty: the disk). Nothing larger than the file is read or kept.
/// Errors: what the parsers refuse, kNotFound (snapshot), kUnsupported (features), kIo. Encryption is opened apart
/// (encryption.h).
Task<Result<Image>> load_image(Node& file, std::string node, std::string snapshot);

}  // namespace gantry::block::qcow2
