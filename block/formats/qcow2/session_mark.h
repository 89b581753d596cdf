// The session extension in the first cluster: put there without moving anything else. Pure; no I/O.

#pragma once

#include <cstdint>
#include <span>

#include "block/formats/qcow2/header.h"

namespace gantry::block::qcow2 {

/// Writes the extension kExtensionSession into `cluster`, the first cluster of an image with this header: over the one
/// that is there, behind the last extension, or where the last row of a feature name table was that ends the list.
/// False, with nothing changed: there is no room, or the extensions make no sense.
///
/// Sectors with what was changed may be written one by one, from the last to the first, with a flush after each: in
/// between the list of extensions is that of before, or of afterwards.
bool put_session(std::span<uint8_t> cluster, const Header& header, const SessionExtension& session);

}  // namespace gantry::block::qcow2
