// Draining: requests from outside stop, then the nodes' own activity (README.md, "Drain").

#include <algorithm>
#include <unordered_set>

#include "block/graph.h"
#include "block/jobs/job.h"
#include "runtime/task_scope.h"

namespace gantry::block {

namespace {

void visit_above(Node* node, std::unordered_set<Node*>& seen, std::vector<Node*>& order) {
    if (!seen.insert(node).second) return;
    for (const Child* edge : node->parents()) visit_above(edge->parent, seen, order);
    order.push_back(node);
}

}  // namespace

std::vector<Node*> Graph::nodes_above(std::span<Node* const> nodes) {
    std::unordered_set<Node*> seen;
    std::vector<Node*> order;
    for (Node* node : nodes) visit_above(node, seen, order);
    return order;
}

std::vector<Root*> Graph::roots_above(std::span<Node* const> nodes) {
    std::vector<Root*> roots;
    for (const Node* node : nodes_above(nodes)) roots.insert(roots.end(), node->roots_.begin(), node->roots_.end());
    return roots;
}

Task<void> Graph::begin_drain(DrainSection& section, std::vector<Node*> nodes) {
    section.active = true;
    for (Node* node : nodes_above(nodes)) section.nodes.push_back(node->shared_from_this());
    section.roots = roots_above(nodes);
    section.key = std::move(nodes);

    co_await jobs_->pause_all();
    for (const auto& node : section.nodes) {
        if (node->quiesce_count_++ == 0) node->drain_started();
    }
    TaskScope scope;
    for (Root* root : section.roots) scope.spawn(root->drain_begin());
    co_await scope.join();
    for (const auto& node : section.nodes) {
        if (node->quiesce_count_ == 1) co_await node->quiesce();
    }
}

Task<void> Graph::end_drain(DrainSection& section) {
    section.active = false;
    for (auto it = section.nodes.rbegin(); it != section.nodes.rend(); ++it) {
        Node& node = **it;
        if (--node.quiesce_count_ != 0 || node.closed_) continue;
        node.unquiesce();
        node.drain_ended();
    }
    TaskScope scope;
    for (Root* root : section.roots) scope.spawn(root->drain_end());
    co_await scope.join();
    jobs_->resume_all();
    section.roots.clear();
    section.nodes.clear();
}

Task<void> Graph::drain(std::span<Node* const> nodes) {
    DrainSection& section = drains_.emplace_back();
    co_await begin_drain(section, std::vector<Node*>(nodes.begin(), nodes.end()));
}

Task<void> Graph::undrain(std::span<Node* const> nodes) {
    auto it = std::find_if(drains_.rbegin(), drains_.rend(),
                           [&](const DrainSection& s) { return std::ranges::equal(s.key, nodes); });
    CHECK(it != drains_.rend(), "undrain() names the nodes of an earlier drain()");
    auto section = std::prev(it.base());
    co_await end_drain(*section);
    drains_.erase(section);
}

}  // namespace gantry::block
