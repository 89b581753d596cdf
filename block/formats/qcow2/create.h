// Making a qcow2 image.

#pragma once

#include <optional>
#include <string>

#include "block/create.h"
#include "block/formats/qcow2/create_options.h"

namespace gantry::block {

extern const Creator kQcow2Creator;

namespace qcow2 {

/// What an image is made of.
struct NewImage {
    CreateOptions options;
    json::value file;            // name of a node, or a definition
    json::value data_file;       // the same; with options.data_file
    std::string data_file_name;  // as the image stores it; empty: the data file node's own path
};

/// Empties the nodes, then writes from front to back, the first cluster last: until then, and after a crash, there is
/// no image. A raw data file keeps what it holds: that is the disk's contents. Main loop. Errors: kTooLarge (the header
/// does not fit; nothing was touched), those of the nodes.
Task<Result<>> make_image(Graph& graph, NewImage what, Progress progress);

}  // namespace qcow2
}  // namespace gantry::block
