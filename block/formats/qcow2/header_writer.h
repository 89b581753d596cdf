// The first cluster of an image: header, extensions and backing file name as bytes (spec/qcow2.md sections 1 and 2).
// Pure; no I/O.

#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "block/formats/qcow2/image.h"
#include "runtime/error.h"

namespace gantry::block::qcow2 {

/// The whole first cluster from image.header, image.extensions and image.backing_name: header of the image's version
/// with the bytes behind the fields known here, extensions, unknown ones byte for byte, backing file name. Where names
/// and lengths go (backing_file_offset, backing_file_size, header_length) is decided here, not taken from the header.
/// The feature name table (version 3) and then the session extension are left out when there is no room for them.
/// Errors: kTooLarge (the rest does not fit; a name is too long).
Result<std::vector<uint8_t>> encode_header_cluster(const Image& image);

/// Header, extensions and backing name of `image` become what `cluster` says, so that memory and file agree after
/// encode_header_cluster() was written: places of names, extensions that were left out. `cluster` comes from
/// encode_header_cluster(); anything else is kCorrupt.
Result<> take_header_cluster(Image& image, std::span<const uint8_t> cluster, std::string_view node);

/// The rows that a new feature name table has.
std::span<const FeatureName> known_features();

}  // namespace gantry::block::qcow2
