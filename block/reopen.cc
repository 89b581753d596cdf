#include "block/reopen.h"

#include <algorithm>

#include "block/node_flags.h"
#include "runtime/log.h"

namespace gantry::block {

namespace {

bool is_none(const json::value& value) { return value.is_null() || (value.is_string() && value.get_string().empty()); }

std::unexpected<Error> cannot_change(std::string_view option) {
    return fail(ErrorKind::kInvalid, "Cannot change the option '{}'", option);
}

}  // namespace

bool Reopen::planned(const Node& node) const {
    return std::ranges::any_of(items_, [&](const Item& item) { return item.node.get() == &node; });
}

Task<Result<>> Reopen::run(std::vector<json::object> options) {
    std::vector<std::shared_ptr<Node>> named;
    for (const json::object& one : options) {
        const json::value* name = one.if_contains("node-name");
        if (!name || !name->is_string()) co_return fail(ErrorKind::kInvalid, "node-name not specified");
        Node* node = graph_.find(std::string_view(name->get_string()));
        if (!node)
            co_return fail(ErrorKind::kNotFound, "Failed to find node with node-name='{}'",
                           std::string_view(name->get_string()));
        const bool twice = std::ranges::any_of(named, [&](const auto& other) { return other.get() == node; });
        if (twice) co_return fail(ErrorKind::kInvalid, "node '{}' is given twice", node->name());
        named.push_back(node->shared_from_this());
    }
    // What is named counts as said there, also when a parent would pull it in.
    for (size_t i = 0; i < named.size(); ++i) {
        NodeFlags inherited;
        if (!named[i]->monitor_owned()) inherited = named[i]->inherited_;
        items_.push_back({.node = named[i], .options = {}, .flags = {}, .inherited = inherited});
    }
    for (size_t i = 0; i < named.size(); ++i) {
        const NodeFlags inherited = items_[i].inherited;
        CO_CHECK(co_await plan(named[i], std::move(options[i]), inherited));
    }
    Result<> done = co_await open_new_children();
    if (done) done = co_await tx_.begin(touched());
    if (done) {
        done = apply_edges();
        tx_.on_undo([this] { abort(); });
        tx_.before_end([this](bool committed) { return settle(committed); });
        if (done) done = co_await prepare();
        if (done) {
            for (const Item& item : items_) tx_.set_flags(*item.node, item.flags);
            tx_.on_commit([this] { commit(); });
            done = co_await tx_.commit();
            if (done) co_return std::move(settled_);
        } else {
            co_await tx_.rollback();
        }
    }
    for (const Edge& edge : edges_) {
        if (edge.opened) --edge.to->pins_;
    }
    co_await graph_.close_unused();
    co_return done;
}

// ---- Planning: nothing changes ----

Task<Result<>> Reopen::plan(std::shared_ptr<Node> node, json::object options, NodeFlags inherited) {
    const json::value* driver = options.if_contains("driver");
    if (driver && *driver != json::value(json::string(node->driver()))) co_return cannot_change("driver");
    const json::value* name = options.if_contains("node-name");
    if (name && *name != json::value(json::string(node->name()))) co_return cannot_change("node-name");
    CO_TRY(const NodeFlags flags, flags_from_options(options, inherited));
    auto item = std::ranges::find_if(items_, [&](const Item& i) { return i.node == node; });
    if (item == items_.end())
        item = items_.insert(items_.end(), Item{.node = node, .options = {}, .flags = {}, .inherited = {}});
    item->options = options;
    item->flags = flags;
    item->inherited = inherited;

    for (const auto& edge : node->children())
        CO_CHECK(co_await plan_child(*node, flags, *edge, options.if_contains(edge->name)));
    if (!node->child("backing")) CO_CHECK(co_await plan_missing_backing(*node, flags, options));
    co_return Result<>();
}

Task<Result<>> Reopen::plan_kept(const NodeFlags& parent_flags, const Child& edge) {
    Node& child = *edge.node;
    if (planned(child)) co_return Result<>();
    if (edge.is_inline)
        co_return co_await plan(child.shared_from_this(), child.options(), inherited_flags(parent_flags, edge.role));
    // A child that only we use goes read-only with us; the way back has to be asked for.
    const bool sole_user = child.parents().size() == 1 && child.roots().empty();
    if (!parent_flags.read_only || child.flags().read_only || !sole_user || edge.parent->flags().read_only)
        co_return Result<>();
    json::object options = child.options();
    options["read-only"] = true;
    co_return co_await plan(child.shared_from_this(), std::move(options), NodeFlags());
}

Task<Result<>> Reopen::plan_child(Node& parent, const NodeFlags& parent_flags, const Child& edge,
                                  const json::value* value) {
    const bool replaceable = edge.name == "file" || edge.name == "backing";
    if (!value) {
        if (edge.name == "backing") co_return fail(ErrorKind::kInvalid, "backing is missing for '{}'", parent.name());
        co_return co_await plan_kept(parent_flags, edge);
    }
    if (is_none(*value)) {
        if (edge.name != "backing") co_return cannot_change(edge.name);
        edges_.push_back(
            {.parent = parent.shared_from_this(), .name = edge.name, .to = {}, .definition = {}, .inherited = {}});
        co_return Result<>();
    }
    if (value->is_string()) {
        const std::string reference(value->get_string());
        if (reference == edge.node->name()) co_return co_await plan_kept(parent_flags, edge);
        if (!replaceable) co_return cannot_change(edge.name);
        CO_TRY(Node * to, graph_.lookup("", reference));
        edges_.push_back({.parent = parent.shared_from_this(),
                          .name = edge.name,
                          .to = to->shared_from_this(),
                          .definition = {},
                          .inherited = {}});
        co_return Result<>();
    }
    if (!value->is_object())
        co_return fail(ErrorKind::kInvalid, "Invalid parameter type for '{}', expected: BlockdevRef", edge.name);
    const NodeFlags inherited = inherited_flags(parent_flags, edge.role);
    if (edge.is_inline) {
        if (planned(*edge.node)) co_return Result<>();
        co_return co_await plan(edge.node, value->get_object(), inherited);
    }
    if (!replaceable) co_return cannot_change(edge.name);
    edges_.push_back({.parent = parent.shared_from_this(),
                      .name = edge.name,
                      .to = {},
                      .definition = value->get_object(),
                      .inherited = inherited});
    co_return Result<>();
}

Task<Result<>> Reopen::plan_missing_backing(Node& parent, const NodeFlags& parent_flags, const json::object& options) {
    const json::value* value = options.if_contains("backing");
    if (!value) {
        Result<ImageInfo> info = co_await parent.image_info();
        if (info && !info->backing_filename.empty())
            co_return fail(ErrorKind::kInvalid, "backing is missing for '{}'", parent.name());
        co_return Result<>();
    }
    if (is_none(*value)) co_return Result<>();
    Edge edge{.parent = parent.shared_from_this(), .name = "backing", .to = {}, .definition = {}, .inherited = {}};
    if (value->is_string()) {
        CO_TRY(Node * to, graph_.lookup("", std::string_view(value->get_string())));
        edge.to = to->shared_from_this();
    } else {
        edge.definition = value->as_object();
        edge.inherited = inherited_flags(parent_flags, ChildRole::kBacking);
    }
    edges_.push_back(std::move(edge));
    co_return Result<>();
}

// ---- Doing ----

Task<Result<>> Reopen::open_new_children() {
    for (Edge& edge : edges_) {
        if (!edge.definition) continue;
        CO_TRY(edge.to, co_await graph_.open_node(std::move(*edge.definition), edge.inherited, 1));
        ++edge.to->pins_;
        edge.opened = true;
    }
    co_return Result<>();
}

std::vector<Node*> Reopen::touched() const {
    std::vector<Node*> nodes;
    for (const Item& item : items_) nodes.push_back(item.node.get());
    for (const Edge& edge : edges_) {
        if (edge.to) nodes.push_back(edge.to.get());
    }
    return nodes;
}

Result<> Reopen::apply_edges() {
    for (const Edge& edge : edges_) {
        Child* child = edge.parent->child(edge.name);
        if (!edge.to) {
            tx_.detach_child(*edge.parent, edge.name);
        } else if (child) {
            CHECK_OK(tx_.replace_child(*child, edge.to, edge.opened));
        } else {
            CHECK_OK(tx_.attach_child(*edge.parent, edge.name, ChildRole::kBacking, edge.to, edge.opened));
        }
    }
    return {};
}

Task<Result<>> Reopen::prepare() {
    for (const Item& item : items_) {
        if (!item.flags.read_only || item.node->read_only()) continue;
        Request rq = Request::internal();
        CO_CHECK(co_await item.node->flush(rq));
    }
    // Children first: a format may look at the file it will stand on.
    for (auto item = items_.rbegin(); item != items_.rend(); ++item) {
        CO_CHECK(co_await item->node->prepare_reopen(item->options, item->flags));
        item->prepared = item->was_prepared = true;
    }
    co_return Result<>();
}

void Reopen::commit() {
    for (auto item = items_.rbegin(); item != items_.rend(); ++item) {
        item->node->options_ = std::move(item->options);
        item->node->inherited_ = item->inherited;
        item->node->commit_reopen();
        item->node->update_fast_paths();
    }
    for (const Edge& edge : edges_) {
        if (edge.opened) --edge.to->pins_;
    }
}

Task<void> Reopen::settle(bool committed) {
    // Children first, as in prepare().
    for (auto item = items_.rbegin(); item != items_.rend(); ++item) {
        if (!item->was_prepared) continue;
        Node& node = *item->node;
        Result<> settled = co_await node.reopened(committed);
        if (settled) continue;
        log::error("node '{}': after a reopen: {}", node.name(), settled.error().message());
        if (committed && node.read_only()) {
            node.flags_.read_only = true;
            node.options_["read-only"] = true;
        }
        if (settled_) settled_ = std::move(settled);
    }
}

void Reopen::abort() {
    for (Item& item : items_) {
        if (item.prepared) item.node->abort_reopen();
        item.prepared = false;
    }
}

Task<Result<>> Graph::reopen(std::vector<json::object> options) {
    auto guard = co_await mutex_.lock();
    Reopen reopen(*this);
    co_return co_await reopen.run(std::move(options));
}

}  // namespace gantry::block
