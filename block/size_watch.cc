#include "block/size_watch.h"

#include "block/bitmap.h"
#include "block/graph.h"
#include "runtime/log.h"

namespace gantry::block {

void SizeWatch::start(std::vector<Node*> nodes) {
    for (Root* root : Graph::roots_above(nodes)) roots_[root] = {root->node().size(), &root->node()};
    for (Node* node : nodes) key_.push_back(node->shared_from_this());
}

void SizeWatch::settle() {
    std::vector<Node*> key;
    for (const auto& node : key_) key.push_back(node.get());
    std::vector<Node*> order = Graph::nodes_above(key);
    for (auto it = order.rbegin(); it != order.rend(); ++it) {
        Node& node = **it;
        if (node.closed()) continue;
        if (!node.children().empty()) node.children_changed();
        // Also those that were left behind by writes that made the node grow.
        for (const auto& bitmap : node.bitmaps()) {
            if (bitmap->size() == node.size() || bitmap->inconsistent) continue;
            Result<> resized = bitmap->resize(node.size());
            if (resized) continue;
            log::error("node '{}': bitmap '{}' cannot follow the new size: {}", node.name(), bitmap->name(),
                       resized.error().message());
            bitmap->set_inconsistent();
        }
    }
}

void SizeWatch::notify() {
    for (const auto& [root, before] : roots_) {
        Node& node = root->node();
        if (&node != before.node && root->options().on_node_changed) root->options().on_node_changed(node);
        if (node.size() != before.size && root->options().on_resize) root->options().on_resize(node.size());
    }
}

}  // namespace gantry::block
