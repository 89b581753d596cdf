#include "block/last_requests.h"

#include <algorithm>
#include <chrono>

namespace gantry::block {

namespace {

/// Whether nobody has use for the node any more: it is closed, or will be.
bool ends(const Node& node) {
    if (node.closed()) return true;
    if (node.monitor_owned() || !node.roots().empty() || node.parents().empty()) return false;
    return std::ranges::all_of(node.parents(), [](const Child* edge) { return ends(*edge->parent); });
}

void cancel(Node& node) {
    node.cancel_in_flight();
    for (const auto& child : node.children()) {
        const Node& below = *child->node;
        const bool ours = std::ranges::all_of(below.parents(), [](const Child* edge) { return ends(*edge->parent); });
        if (ours && below.roots().empty()) cancel(*child->node);
    }
}

}  // namespace

LastRequests::LastRequests(std::shared_ptr<Node> node) : node_(std::move(node)) { scope_.spawn(limit()); }

Task<void> LastRequests::limit() {
    // What is under way takes its time: much may have to be made stable.
    for (std::chrono::seconds time(60); !over_; time = std::chrono::seconds(5)) {
        cancel(*node_);
        (void)co_await timer_.after(time);
    }
}

Task<void> LastRequests::over() {
    over_ = true;
    timer_.cancel();
    co_await scope_.join();
}

}  // namespace gantry::block
