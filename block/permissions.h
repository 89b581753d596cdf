// Permissions of an edge of the graph (spec/qmp.md section 12.1).

#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/task.h"

namespace gantry::block {

/// A set over {consistent-read, write, write-unchanged, resize}. The bit numbers are those of the file lock bytes.
enum class Perm : uint8_t {
    kNone = 0,
    kConsistentRead = 1 << 0,
    kWrite = 1 << 1,
    kWriteUnchanged = 1 << 2,
    kResize = 1 << 3,
    kAll = 0xf,
};
constexpr Perm operator|(Perm a, Perm b) {
    return static_cast<Perm>(static_cast<uint8_t>(a) | static_cast<uint8_t>(b));
}
constexpr Perm operator&(Perm a, Perm b) {
    return static_cast<Perm>(static_cast<uint8_t>(a) & static_cast<uint8_t>(b));
}
constexpr Perm operator~(Perm a) { return static_cast<Perm>(~static_cast<uint8_t>(a) & 0xf); }
constexpr Perm& operator|=(Perm& a, Perm b) { return a = a | b; }
constexpr Perm& operator&=(Perm& a, Perm b) { return a = a & b; }
constexpr bool any(Perm p) { return p != Perm::kNone; }

/// What an edge takes from its child, and what it lets others take.
struct EdgePerms {
    Perm need = Perm::kNone;
    Perm share = Perm::kAll;
    bool operator==(const EdgePerms&) const = default;
};

/// "consistent read, write" in the reference's words.
std::string perm_names(Perm set);

class Graph;
class Node;
class Root;
struct Child;
enum class ChildRole : uint8_t;

/// What an edge of `role` takes and shares by default, when its parent can write or not and is itself used as in
/// `from_parents`.
EdgePerms default_child_perms(ChildRole role, bool read_only, EdgePerms from_parents);

/// Somebody who takes permissions and is neither an edge nor a root: a node that is being opened, block_resize.
struct PermissionUser {
    Node* node = nullptr;
    EdgePerms perms;
    std::string who;  // "node 'x'", "an unnamed block device"
    std::string as;   // "file", "root"
};

/// One computation of every permission on the graph as it is now. Main loop only; one at a time.
/// compute(), then prepare(), then exactly one of commit() and abort().
class PermissionPass {
  public:
    explicit PermissionPass(Graph& graph) : graph_(graph) {}

    /// Top-down over all nodes; refuses conflicts (kPermission, with both users) and writers of read-only nodes
    /// (kReadOnly).
    Result<> compute();
    /// Nodes whose cumulative permissions differ from what was committed, parents before children.
    std::vector<Node*> changed() const;
    /// Leaves this node as it is (a later pass will find it again).
    void skip(const Node& node);
    /// Node::prepare_perms on every changed node; the first failure aborts those prepared before it.
    Task<Result<>> prepare();
    void commit();
    void abort();

  private:
    struct Use {
        EdgePerms perms;
        const Child* edge = nullptr;  // one of the three
        const Root* root = nullptr;
        const PermissionUser* other = nullptr;
    };
    struct Entry {
        Node* node;
        std::vector<Use> users;
        EdgePerms total;
        bool differs = false;
        bool prepared = false;
    };
    void sort();
    Result<> check(Entry& entry) const;
    Entry& entry_of(const Node* node);

    Graph& graph_;
    std::vector<Entry> entries_;  // topological order
    std::vector<std::pair<Child*, EdgePerms>> edges_;
};

}  // namespace gantry::block
