// What is declared and not built yet: each function refuses. Building one takes it away from here.

#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

namespace {
std::unexpected<Error> pending(const Node& node) {
    return fail(ErrorKind::kUnsupported, "node '{}': not in this build", node.name());
}
}  // namespace


// Other operations
Task<Result<ImageCheck>> Qcow2Node::check(CheckRepair, Progress) { co_return pending(*this); }

}  // namespace gantry::block::qcow2
