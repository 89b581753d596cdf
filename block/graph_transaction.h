// GraphTransaction: steps on the graph that happen together or not at all.

#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "block/graph.h"
#include "block/size_watch.h"

namespace gantry::block {

/// Main loop; the owner holds Graph::mutex() from before begin() until commit() or rollback() has returned.
///
///     GraphTransaction tx(graph);
///     CO_CHECK(co_await tx.begin({&node}));
///     if (auto done = tx.replace_child(edge, other); !done) { co_await tx.rollback(); co_return done; }
///     co_return co_await tx.commit();
///
/// Steps take effect in memory at once (what they touch is drained); permissions are computed on the final graph in
/// commit(), prepared and committed there. Nodes without users close at the end.
class GraphTransaction {
  public:
    explicit GraphTransaction(Graph& graph) : graph_(graph) {}
    ~GraphTransaction() { CHECK(state_ != State::kBegun, "a graph transaction is committed or rolled back"); }
    GraphTransaction(const GraphTransaction&) = delete;

    /// Drains `nodes` and everything above them. kBusy when an exporter there holds a plain descriptor; then nothing
    /// has begun.
    Task<Result<>> begin(std::vector<Node*> nodes);

    // ---- Steps. A refused step has changed nothing; the transaction is still to be rolled back. ----

    /// `Making 'x' a backing child of 'y' would create a cycle` (kInvalid).
    Result<> attach_child(Node& parent, std::string_view name, ChildRole role, std::shared_ptr<Node> node,
                          bool is_inline);
    void detach_child(Node& parent, std::string_view name);
    Result<> replace_child(Child& edge, std::shared_ptr<Node> to, bool is_inline = false);
    void replace_root(Root& root, std::shared_ptr<Node> to);
    /// Every parent of `from` except `keep`, roots included, points to `to`.
    Result<> replace_node(Node& from, Node& to, const Node* keep);
    void set_flags(Node& node, const NodeFlags& flags);
    void set_monitor_owned(Node& node, bool owned);
    /// Anything else: runs when the transaction is undone, latest first / when it is committed, in order.
    void on_undo(std::function<void()> undo) { undo_.push_back(std::move(undo)); }
    void on_commit(std::function<void()> commit) { commit_.push_back(std::move(commit)); }

    /// The last thing before what was drained goes on; told whether the transaction was committed.
    void before_end(std::function<Task<void>(bool committed)> fn) { before_end_ = std::move(fn); }

    // ---- End: undrains, closes what nobody uses, tells the roots ----

    /// On failure everything is undone.
    Task<Result<>> commit();
    Task<void> rollback();

  private:
    enum class State : uint8_t { kIdle, kBegun, kEnded };
    void undo();
    Task<void> end(bool committed);

    Graph& graph_;
    State state_ = State::kIdle;
    Graph::DrainSection section_;
    SizeWatch watch_;
    std::vector<std::function<void()>> undo_;
    std::vector<std::function<void()>> commit_;
    std::function<Task<void>(bool)> before_end_;
};

/// True when `node` is `ancestor` or lies below it.
bool reaches(const Node& ancestor, const Node& node);

}  // namespace gantry::block
