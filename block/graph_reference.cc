// Users that name a node or define one of their own.

#include <algorithm>

#include "block/graph.h"

namespace gantry::block {

Task<Result<std::unique_ptr<Root>>> Graph::attach_reference(json::value reference, RootOptions options) {
    auto guard = co_await mutex_.lock();
    std::shared_ptr<Node> node;
    if (reference.is_string()) {
        const std::string name(reference.get_string());
        CO_TRY(Node * found, lookup(name, name));
        node = found->shared_from_this();
    } else {
        Result<std::shared_ptr<Node>> opened = co_await open_node(std::move(reference.as_object()), NodeFlags(), 0);
        if (!opened) {
            co_await close_unused();
            co_return std::unexpected(std::move(opened).error());
        }
        node = std::move(*opened);
    }
    std::unique_ptr<Root> root(new Root(*this, node, std::move(options)));
    node->roots_.push_back(root.get());
    Result<> permitted = co_await update_permissions(PermMode::kMust);
    if (!permitted) {
        std::erase(node->roots_, root.get());
        root.reset();
        node.reset();
        co_await close_unused();
        co_return std::unexpected(std::move(permitted).error());
    }
    root->attached_ = true;
    co_return root;
}

}  // namespace gantry::block
