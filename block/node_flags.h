// The options of every node: reading them, and what children inherit (spec/qmp.md section 9.1).

#pragma once

#include "block/node.h"

namespace gantry::block {

/// What `options` say, `inherited` where they are silent. Errors: combinations that make no sense.
Result<NodeFlags> flags_from_options(const json::object& options, const NodeFlags& inherited);

/// What an inline child of that role gets where its definition is silent.
NodeFlags inherited_flags(const NodeFlags& parent, ChildRole role);

}  // namespace gantry::block
