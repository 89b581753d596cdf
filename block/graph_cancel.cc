// Giving up on what waits for others: openings, and requests to servers that are gone.

#include <algorithm>

#include "block/driver.h"
#include "block/graph.h"

namespace gantry::block {

bool Graph::cancel_opening(std::string_view node_name) {
    // One opening at a time, with those inside it: any of the names means the whole of it.
    const auto named = [&](const OpenContext* context) { return context->node_name() == node_name; };
    if (openings_.empty() || (!node_name.empty() && std::ranges::none_of(openings_, named))) return false;
    for (const OpenContext* context : openings_) {
        if (context->cancel_) context->cancel_();
    }
    return true;
}

void Graph::cancel_in_flight(Node& node) {
    node.cancel_in_flight();
    for (const auto& child : node.children()) cancel_in_flight(*child->node);
}

}  // namespace gantry::block
