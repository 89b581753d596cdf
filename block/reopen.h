// Reopen: blockdev-reopen of several nodes, all or nothing (spec/qmp.md section 12.9).

#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "block/graph.h"
#include "block/graph_transaction.h"

namespace gantry::block {

/// One run; main loop, the caller holds Graph::mutex().
class Reopen {
  public:
    explicit Reopen(Graph& graph) : graph_(graph), tx_(graph) {}

    Task<Result<>> run(std::vector<json::object> options);

  private:
    /// A node that gets a new set of options.
    struct Item {
        std::shared_ptr<Node> node;
        json::object options;
        NodeFlags flags, inherited;
        bool prepared = false, was_prepared = false;
    };
    /// An edge that changes.
    struct Edge {
        std::shared_ptr<Node> parent;
        std::string name;
        std::shared_ptr<Node> to;                // null without a definition: detach
        std::optional<json::object> definition;  // of a new inline child, opened before the drain
        NodeFlags inherited;
        bool opened = false;
    };

    Task<Result<>> plan(std::shared_ptr<Node> node, json::object options, NodeFlags inherited);
    Task<Result<>> plan_child(Node& parent, const NodeFlags& parent_flags, const Child& edge, const json::value* value);
    Task<Result<>> plan_missing_backing(Node& parent, const NodeFlags& parent_flags, const json::object& options);
    /// What the definition of a kept child was, with what it inherits now.
    Task<Result<>> plan_kept(const NodeFlags& parent_flags, const Child& edge);
    bool planned(const Node& node) const;
    Task<Result<>> open_new_children();
    std::vector<Node*> touched() const;
    Result<> apply_edges();
    Task<Result<>> prepare();
    void commit();
    void abort();
    /// Node::reopened() of everything that was prepared, still drained.
    Task<void> settle(bool committed);

    Graph& graph_;
    GraphTransaction tx_;
    std::vector<Item> items_;  // parents before the children they pull in
    std::vector<Edge> edges_;
    Result<> settled_;  // the first failure of settle()
};

}  // namespace gantry::block
