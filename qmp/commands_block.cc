// blockdev-add/del/reopen, block_resize and the block queries.

#include "qmp/block_info.h"
#include "qmp/command.h"

namespace gantry::qmp {

namespace {

Task<Result<json::value>> blockdev_add(Services& services, json::object arguments) {
    if (!arguments.contains("node-name")) {
        co_return fail(ErrorKind::kInvalid, "'node-name' must be specified for the root node");
    }
    Result<block::Node*> node = co_await services.graph.add(std::move(arguments));
    if (!node) co_return std::unexpected(std::move(node).error());
    co_return json::value(json::object());
}

Task<Result<json::value>> blockdev_del(Services& services, json::object arguments) {
    std::string name = schema::Options(arguments).str("node-name");
    co_return done(co_await services.graph.remove(name));
}

Task<Result<json::value>> blockdev_reopen(Services& services, json::object arguments) {
    std::vector<json::object> list;
    for (json::value& item : arguments.at("options").get_array()) list.push_back(std::move(item.get_object()));
    co_return done(co_await services.graph.reopen(std::move(list)));
}

Task<Result<json::value>> block_resize(Services& services, json::object arguments) {
    schema::Options options(arguments);
    CO_TRY(block::Node * node, services.graph.lookup(options.str("device"), options.str("node-name")));
    co_return done(co_await services.graph.resize(*node, options.integer("size")));
}

Task<Result<json::value>> query_named_block_nodes(Services& services, json::object arguments) {
    bool flat = schema::Options(arguments).flag("flat");
    std::vector<std::shared_ptr<block::Node>> nodes;
    for (block::Node* node : services.graph.nodes()) nodes.push_back(node->shared_from_this());
    json::array list;
    for (const auto& node : nodes) {
        json::object info = co_await block_device_info(*node, flat);
        list.push_back(std::move(info));
    }
    co_return json::value(std::move(list));
}

// Backends with a device name exist only through the legacy `id`, which no node has here.
Task<Result<json::value>> query_block(Services&, json::object) { co_return json::value(json::array()); }

Task<Result<json::value>> query_blockstats(Services& services, json::object arguments) {
    json::array list;
    if (schema::Options(arguments).flag("query-nodes")) {
        std::vector<std::shared_ptr<block::Node>> nodes;
        for (block::Node* node : services.graph.nodes()) nodes.push_back(node->shared_from_this());
        for (const auto& node : nodes) {
            json::object stats = co_await node_stats(*node);
            list.push_back(std::move(stats));
        }
    }
    co_return json::value(std::move(list));
}

constexpr HandlerRow kHandlers[] = {
    {"blockdev-add", blockdev_add},
    {"blockdev-del", blockdev_del},
    {"blockdev-reopen", blockdev_reopen},
    {"block_resize", block_resize},
    {"query-named-block-nodes", query_named_block_nodes},
    {"query-block", query_block},
    {"query-blockstats", query_blockstats},
};

}  // namespace

std::span<const HandlerRow> block_handlers() { return kHandlers; }

}  // namespace gantry::qmp
