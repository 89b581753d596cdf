#include "block/last_requests.h"

#include <algorithm>
#include <chrono>

#include "block/repeated_cancel.h"

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

LastRequests::LastRequests(std::shared_ptr<Node> node) : node_(std::move(node)) { scope_.spawn(limit()); }

Task<void> LastRequests::limit() {
    // What is under way takes its time: much may have to be made stable.
    for (std::chrono::seconds time(60); !over_; time = kCancelAgain) {
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
