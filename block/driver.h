// Driver: how a node type is opened. The table of drivers is in cli/registry.cc and passed to the Graph.

#pragma once

#include <functional>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "block/node.h"
#include "schema/options.h"

namespace gantry::block {

class Graph;
struct Creator;

/// What a driver's open function gets. Main loop; the graph lock is held. When open fails, everything it opened is
/// closed again.
class OpenContext {
  public:
    OpenContext(const OpenContext&) = delete;
    ~OpenContext();
    Graph& graph() const { return *graph_; }
    /// Validated driver options (without children's effects).
    schema::Options options() const { return schema::Options(*options_); }
    const std::string& node_name() const { return node_name_; }
    /// After inheritance; a driver that cannot write returns kReadOnly from open unless read_only or auto_read_only is
    /// set.
    const NodeFlags& flags() const { return flags_; }

    /// Resolves the option `name`: a node name or an inline definition, inheriting flags; attaches it when the node is
    /// built. kNotFound etc. with the reference's texts. `role` decides permissions. The returned node may be read with
    /// Request::internal() at once (it is open for consistent-read).
    Task<Result<Node*>> open_child(std::string_view name, ChildRole role);
    /// The same for a file named by an image (backing file, data file): `definition` is options made by the driver; the
    /// child is inline, and read-only for kBacking. Refused by the policy for names from images unless allowed
    /// (Graph::image_references()).
    Task<Result<Node*>> open_implicit(std::string_view name, ChildRole role, json::object definition);
    /// While open waits for somebody else (a server): what makes it end early with an error. Empty: nothing does.
    /// Called by the deletion of the node that is being opened and by the end of the process (Graph::cancel_opening()).
    void on_cancel(std::function<void()> cancel) { cancel_ = std::move(cancel); }
    /// True when the option is present (and, for "backing", not null or empty).
    bool child_given(std::string_view name) const;
    /// "backing": null or "" -> explicitly none.
    bool child_refused(std::string_view name) const;

  private:
    friend class Graph;
    friend class Reopen;
    OpenContext(Graph& graph, const json::object& options, std::string node_name, NodeFlags flags, int depth);
    const json::value* option(std::string_view name) const;
    Task<Result<Node*>> adopt(std::string name, ChildRole role, std::shared_ptr<Node> node, bool is_inline);
    void hand_over(Node& node);

    Graph* graph_ = nullptr;
    const json::object* options_ = nullptr;
    std::string node_name_;
    NodeFlags flags_;
    int depth_ = 0;
    std::function<void()> cancel_;
    struct Pending {
        std::unique_ptr<Child> child;
        std::list<PermissionUser>::iterator user;  // holds the edge's permissions until the node exists
    };
    std::vector<Pending> children_;  // handed to the node when open succeeds
};

/// One row of the table.
struct Driver {
    std::string_view name;
    Task<Result<std::shared_ptr<Node>>> (*open)(OpenContext& ctx);
    /// Options that blockdev-reopen may change; all others are refused by the default prepare_reopen.
    std::span<const std::string_view> reopen_options = {};
    /// 0..100: how sure the driver is that the first `size` bytes are of its format (0: no format, or never probed).
    int (*probe)(const uint8_t* head, size_t size, std::string_view filename) = nullptr;
    bool is_protocol = false;  // leaf; opened from a filename
    /// How images of this kind are made (block/create.h); null: they are not.
    const Creator* creator = nullptr;
};

}  // namespace gantry::block
