// Graph: all nodes of the process, and every change of them. Main loop only.

#pragma once

#include <functional>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "block/driver.h"
#include "block/node.h"
#include "block/observer.h"
#include "block/root.h"
#include "runtime/runtime.h"
#include "runtime/sync.h"
#include "runtime/unique_fd.h"

namespace gantry::block {

namespace crypto {
class Secrets;
}
class JobManager;

/// Which files an image may name (backing file, data file).
struct ImageReferencePolicy {
    bool allow_all = true;  // what the operator's own command line and QMP imply (reference behaviour)
    std::vector<std::string> allowed_directories;  // with !allow_all
};

class Graph {
  public:
    Graph(Runtime& runtime, std::span<const Driver> drivers, Observer* observer);
    /// Every root is detached and close_all() has run.
    ~Graph();

    // ---- Nodes. Errors carry the texts of spec/qmp.md section 3.2; a failure changes nothing. ----

    /// blockdev-add with validated options; the node is owned by the monitor.
    Task<Result<Node*>> add(json::object options);
    /// blockdev-del.
    Task<Result<>> remove(std::string_view node_name);
    /// Makes openings that wait for somebody else end soon, with an error: that of the node of this name with all that
    /// is defined inside it, or (empty name) any. Whether there was one.
    bool cancel_opening(std::string_view node_name);
    /// The node and all below it: requests that wait for a lost server fail now, those that a server does not answer in
    /// a few seconds.
    static void cancel_in_flight(Node& node);
    /// blockdev-reopen: all or nothing.
    Task<Result<>> reopen(std::vector<json::object> options);
    /// block_resize: takes the resize permission for the moment of the change; drained. `grow_only`: nothing happens
    /// when the node is as large, also by a resize that came before this one.
    Task<Result<>> resize(Node& node, int64_t new_size, bool grow_only = false);
    /// Null when absent.
    Node* find(std::string_view node_name) const;
    /// "Cannot find device='X' nor node-name='X'" etc. as the commands want it.
    Result<Node*> lookup(std::string_view device, std::string_view node_name) const;
    /// Newest first.
    std::vector<Node*> nodes() const;
    /// Probes the format of an open protocol node; the best-scoring driver, "raw" when nothing fits.
    Task<Result<std::string>> probe(Node& protocol);

    // ---- Users ----

    /// Checks and commits permissions on the whole graph. Errors: kPermission with both holders' names, kReadOnly.
    Task<Result<std::unique_ptr<Root>>> attach(Node& node, RootOptions options);
    /// The same for a node by name (string), or for one defined here by validated options (object), which closes with
    /// its last user.
    Task<Result<std::unique_ptr<Root>>> attach_reference(json::value reference, RootOptions options);
    /// Waits for requests in flight, releases permissions and the node. The Root's channels must have no user any more.
    Task<void> detach(std::unique_ptr<Root> root);
    /// Changes what a root takes.
    Task<Result<>> set_perms(Root& root, EdgePerms perms);

    // ---- Changes (one at a time: under the graph lock) ----

    /// Quiesces every root above the nodes (and jobs, and the nodes' own activity), top-down. The caller holds mutex()
    /// from before drain() until after undrain() of the same nodes; such pairs nest.
    Task<void> drain(std::span<Node* const> nodes);
    Task<void> undrain(std::span<Node* const> nodes);
    /// kBusy naming the user when an exporter above `node` holds a plain descriptor and so would not see a change below
    /// it.
    Result<> check_not_leased(const Node& node) const;
    /// All parents of `from` (roots included, except `keep`) point to `to` afterwards. Drained, permissions checked,
    /// all or nothing.
    Task<Result<>> replace(Node& from, Node& to, const Node* keep = nullptr);
    /// Puts `filter` (open, its "file" child is `node`) between `node` and every parent but the filter.
    Task<Result<>> insert_above(Node& node, Node& filter);

    /// Taken by every function above except drain() and undrain().
    AsyncMutex& mutex() { return mutex_; }
    Runtime& runtime() const { return runtime_; }
    Observer* observer() const { return observer_; }
    JobManager& jobs() const { return *jobs_; }
    ImageReferencePolicy& image_references() { return image_references_; }
    /// Encrypted images open without their passphrase, and no data of them can be read: for tools that only look at
    /// what the metadata says.
    bool opens_locked = false;
    /// Images open for writing whatever state they are in, and nothing but ImageOperations::check() may write: what
    /// a damaged image needs before it can be written otherwise.
    bool opens_for_repair = false;
    /// Turns the number or the name of a descriptor (getfd) into one that is ours; empty: there are none.
    std::function<Result<UniqueFd>(std::string_view name)> descriptor_source;
    /// Passphrases by id, for encrypted images.
    crypto::Secrets& secrets() const { return *secrets_; }
    /// Where the descriptor of a node's mapping log comes from: a memory file that outlives this process. Empty, or an
    /// invalid descriptor: none.
    std::function<Result<UniqueFd>(const std::string& node_name)> mapping_log_source;
    const Driver* driver(std::string_view name) const;
    /// "#blockNNN".
    std::string make_node_name();

    /// Closes every node (flushed, bitmaps stored). All roots are gone.
    Task<void> close_all();

  private:
    friend class OpenContext;
    friend class GraphTransaction;
    friend class PermissionPass;
    friend class Reopen;
    friend class SizeWatch;

    /// What one drain stopped; ended by end_drain() even when the graph has changed meanwhile.
    struct DrainSection {
        std::vector<Node*> key;
        std::vector<Root*> roots;
        std::vector<std::shared_ptr<Node>> nodes;  // top-down
        bool active = false;
    };
    Task<void> begin_drain(DrainSection& section, std::vector<Node*> nodes);
    Task<void> end_drain(DrainSection& section);
    /// The nodes and everything above them, parents before children.
    static std::vector<Node*> nodes_above(std::span<Node* const> nodes);
    static std::vector<Root*> roots_above(std::span<Node* const> nodes);

    /// What must hold after permissions were computed: kMust refuses, kRelax (users went away) leaves alone what cannot
    /// be changed now.
    enum class PermMode : uint8_t { kMust, kRelax };
    /// Computes, drains what changes and is live, prepares, calls `before_commit`, commits.
    Task<Result<>> update_permissions(PermMode mode, std::function<void()> before_commit = {});

    Task<Result<std::shared_ptr<Node>>> open_node(json::object options, NodeFlags inherited, int depth);
    Result<> check_name(std::string_view name) const;
    Task<Result<std::string>> probe_definition(json::object file, NodeFlags flags, int depth);
    Result<std::shared_ptr<Node>> still_open(std::shared_ptr<Node> node) const;
    /// Closes every node that nobody uses, then relaxes permissions.
    Task<void> close_unused();
    Task<void> close_node(std::shared_ptr<Node> node);

    Runtime& runtime_;
    std::span<const Driver> drivers_;
    Observer* observer_;
    AsyncMutex mutex_;
    std::vector<std::shared_ptr<Node>> all_;      // every open node, oldest first
    std::vector<std::string> opening_names_;      // of definitions being opened
    std::vector<OpenContext*> openings_;          // the same, innermost last
    std::list<PermissionUser> permission_users_;  // besides edges and roots
    std::list<DrainSection> drains_;              // of drain()
    std::unique_ptr<JobManager> jobs_;
    std::unique_ptr<crypto::Secrets> secrets_;
    ImageReferencePolicy image_references_;
    uint64_t next_name_ = 0;
};

}  // namespace gantry::block
