#include "block/last_requests.h"

#include <algorithm>
#include <chrono>

namespace gantry::block {

bool LastRequests::concern(const Node& node) {
    if (node.closed()) return true;
    if (node.monitor_owned() || !node.roots().empty() || node.parents().empty()) return false;
    return std::ranges::all_of(node.parents(), [](const Child* edge) { return concern(*edge->parent); });
}

namespace {

void cancel(Node& node) {
    node.cancel_in_flight();
    for (const auto& child : node.children()) {
        const Node& below = *child->node;
        const bool ours = std::ranges::all_of(below.parents(),
                                              [](const Child* edge) { return LastRequests::concern(*edge->parent); });
        if (ours && below.roots().empty()) cancel(*child->node);
    }
}

}  // namespace

// What is under way takes its time: much may have to be made stable.
LastRequests::LastRequests(std::shared_ptr<Node> node)
    : cancel_([node = std::move(node)] { cancel(*node); }, std::chrono::seconds(60)) {}

}  // namespace gantry::block
