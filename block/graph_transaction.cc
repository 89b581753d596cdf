#include "block/graph_transaction.h"

#include <algorithm>

#include "runtime/log.h"

namespace gantry::block {

bool reaches(const Node& ancestor, const Node& node) {
    if (&ancestor == &node) return true;
    return std::ranges::any_of(ancestor.children(), [&](const auto& edge) { return reaches(*edge->node, node); });
}

Task<Result<>> GraphTransaction::begin(std::vector<Node*> nodes) {
    CHECK(state_ == State::kIdle, "a transaction begins once");
    for (const Node* node : nodes) CO_CHECK(graph_.check_not_leased(*node));
    state_ = State::kBegun;
    watch_.start(nodes);
    co_await graph_.begin_drain(section_, std::move(nodes));
    co_return Result<>();
}

namespace {

Result<> refuse_cycle(const Node& parent, std::string_view edge, const Node& child) {
    if (!reaches(child, parent)) return {};
    return fail(ErrorKind::kInvalid, "Making '{}' a {} child of '{}' would create a cycle", child.name(), edge,
                parent.name());
}

}  // namespace

Result<> GraphTransaction::attach_child(Node& parent, std::string_view name, ChildRole role, std::shared_ptr<Node> node,
                                        bool is_inline) {
    CHECK(!parent.child(name), "a child's name is free");
    CHECK_OK(refuse_cycle(parent, name, *node));
    auto edge = std::make_unique<Child>();
    edge->parent = &parent;
    edge->name = name;
    edge->role = role;
    edge->node = std::move(node);
    edge->is_inline = is_inline;
    Child* raw = edge.get();
    raw->node->parents_.push_back(raw);
    parent.children_.push_back(std::move(edge));
    parent.children_changed();
    on_undo([&parent, raw] {
        std::erase(raw->node->parents_, raw);
        std::erase_if(parent.children_, [raw](const auto& c) { return c.get() == raw; });
        parent.children_changed();
    });
    return {};
}

void GraphTransaction::detach_child(Node& parent, std::string_view name) {
    auto it = std::ranges::find_if(parent.children_, [&](const auto& c) { return c->name == name; });
    CHECK(it != parent.children_.end(), "a detached child exists");
    const auto index = it - parent.children_.begin();
    // The edge itself is kept for an undo: the node below stays in the graph until the end of the transaction.
    auto edge = std::make_shared<std::unique_ptr<Child>>(std::move(*it));
    parent.children_.erase(it);
    std::erase((*edge)->node->parents_, edge->get());
    ++(*edge)->node->pins_;
    parent.children_changed();
    on_commit([edge] { --(*edge)->node->pins_; });
    on_undo([&parent, edge, index] {
        --(*edge)->node->pins_;
        (*edge)->node->parents_.push_back(edge->get());
        parent.children_.insert(parent.children_.begin() + index, std::move(*edge));
        parent.children_changed();
    });
}

Result<> GraphTransaction::replace_child(Child& edge, std::shared_ptr<Node> to, bool is_inline) {
    CHECK_OK(refuse_cycle(*edge.parent, edge.name, *to));
    auto point = [](Child& child, std::shared_ptr<Node> node, bool inline_now) {
        std::erase(child.node->parents_, &child);
        child.node = std::move(node);
        child.is_inline = inline_now;
        child.node->parents_.push_back(&child);
        child.parent->children_changed();
    };
    std::shared_ptr<Node> from = edge.node;
    on_undo([point, from, was_inline = edge.is_inline, &edge] { point(edge, from, was_inline); });
    point(edge, std::move(to), is_inline);
    return {};
}

void GraphTransaction::replace_root(Root& root, std::shared_ptr<Node> to) {
    auto point = [](Root& r, std::shared_ptr<Node> node) {
        std::erase(r.node_->roots_, &r);
        r.node_ = std::move(node);
        r.node_->roots_.push_back(&r);
    };
    std::shared_ptr<Node> from = root.node_;
    on_undo([point, from, &root] { point(root, from); });
    point(root, std::move(to));
}

Result<> GraphTransaction::replace_node(Node& from, Node& to, const Node* keep) {
    const std::vector<Child*> edges = from.parents_;
    const std::vector<Root*> roots = from.roots_;
    for (Child* edge : edges) {
        if (edge->parent != keep) CHECK_OK(replace_child(*edge, to.shared_from_this()));
    }
    for (Root* root : roots) replace_root(*root, to.shared_from_this());
    return {};
}

void GraphTransaction::set_flags(Node& node, const NodeFlags& flags) {
    auto apply = [](Node& n, const NodeFlags& f, bool read_only) {
        n.flags_ = f;
        n.read_only_.store(read_only, std::memory_order_relaxed);
        n.update_fast_paths();
    };
    on_undo([apply, &node, old = node.flags_, read_only = node.read_only()] { apply(node, old, read_only); });
    // What the driver made of auto-read-only stays as it is unless the option itself changes.
    apply(node, flags, flags.read_only == node.flags_.read_only ? node.read_only() : flags.read_only);
}

void GraphTransaction::set_monitor_owned(Node& node, bool owned) {
    on_undo([&node, old = node.monitor_owned_] { node.monitor_owned_ = old; });
    node.monitor_owned_ = owned;
}

void GraphTransaction::undo() {
    while (!undo_.empty()) {
        auto step = std::move(undo_.back());
        undo_.pop_back();
        step();
    }
    commit_.clear();
}

Task<void> GraphTransaction::end(bool committed) {
    state_ = State::kEnded;
    if (before_end_) co_await before_end_(committed);
    watch_.settle();
    co_await graph_.end_drain(section_);
    co_await graph_.close_unused();
    watch_.notify();
}

Task<Result<>> GraphTransaction::commit() {
    CHECK(state_ == State::kBegun, "a transaction ends once");
    Result<> permitted = co_await graph_.update_permissions(Graph::PermMode::kMust, [this] {
        for (const auto& step : commit_) step();
        commit_.clear();
    });
    if (permitted) {
        undo_.clear();
    } else {
        undo();
    }
    co_await end(permitted.has_value());
    co_return permitted;
}

Task<void> GraphTransaction::rollback() {
    CHECK(state_ == State::kBegun, "a transaction ends once");
    undo();
    co_await end(false);
}

}  // namespace gantry::block
