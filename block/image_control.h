// Operations on images as commands and tools ask for them: looks the format up, locks the graph, drains, acts.

#pragma once

#include <string>

#include "block/graph.h"
#include "block/image_operations.h"

namespace gantry::block {

/// A node that a user outside keeps alive while it is worked on; Graph::mutex() held and `node` drained from begin() to
/// end(). Main loop. end() must be awaited once begin() succeeded.
class DrainedNode {
  public:
    DrainedNode(Graph& graph, Node& node);
    ~DrainedNode();
    DrainedNode(const DrainedNode&) = delete;
    /// kBusy when an exporter holds a plain descriptor of it.
    Task<Result<>> begin();
    Task<void> end();

  private:
    Graph& graph_;
    std::shared_ptr<Node> node_;
    AsyncMutex::Guard guard_;
    bool drained_ = false;
};

/// Each: kUnsupported when the format has no operations ("Block format 'raw' used by node 'x' does not support ...").
Task<Result<ImageCheck>> check_image(Graph& graph, Node& node, CheckRepair repair, Progress progress = {});
Task<Result<>> resize_image(Graph& graph, Node& node, uint64_t new_size, Preallocation preallocation, bool allow_shrink,
                            Progress progress = {});
Task<Result<>> create_snapshot(Graph& graph, Node& node, SnapshotSpec spec);
Task<Result<>> apply_snapshot(Graph& graph, Node& node, std::string id_or_name);
Task<Result<>> delete_snapshot(Graph& graph, Node& node, std::string id, std::string name);
Task<Result<>> amend_image(Graph& graph, Node& node, json::object options, bool force, Progress progress = {});
Task<Result<>> change_backing_file(Graph& graph, Node& node, std::string file, std::string format);
Task<Result<>> compact_image(Graph& graph, Node& node, Progress progress = {});
/// Copies every range that `top` allocates into its backing node, flushes that, then, with `empty_top`, empties `top`.
/// Offline: nobody else uses either. Errors leave `top` as it was.
Task<Result<>> commit_image(Graph& graph, Node& top, bool empty_top, Progress progress = {});

/// ImageCheck of the QMP schema.
json::object to_json(const ImageCheck& check, std::string filename, std::string format);

}  // namespace gantry::block
