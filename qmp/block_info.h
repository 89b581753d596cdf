// Nodes as the query commands show them: BlockDeviceInfo, ImageInfo, BlockStats.

#pragma once

#include "block/node.h"
#include "block/root.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::qmp {

/// BlockDeviceInfo. `flat`: without image.backing-image and with depth 0. An image whose size cannot be read still
/// shows.
Task<json::object> block_device_info(block::Node& node, bool flat);
/// SnapshotInfo.
json::object snapshot_json(const block::SnapshotInfo& s);
/// ImageInfo. `with_backing`: with backing-image.
Task<json::object> image_info_json(block::Node& node, bool with_backing);
/// BlockStats of a node: the sums over its users; "parent" is its file child.
Task<json::object> node_stats(block::Node& node);

}  // namespace gantry::qmp
