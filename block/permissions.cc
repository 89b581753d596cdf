#include "block/permissions.h"

#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "block/graph.h"
#include "block/node.h"
#include "block/root.h"

namespace gantry::block {

std::string perm_names(Perm set) {
    static constexpr std::pair<Perm, const char*> kNames[] = {
        {Perm::kConsistentRead, "consistent read"},
        {Perm::kWrite, "write"},
        {Perm::kWriteUnchanged, "write unchanged"},
        {Perm::kResize, "resize"},
    };
    std::string text;
    for (const auto& [perm, name] : kNames) {
        if (!any(set & perm)) continue;
        if (!text.empty()) text += ", ";
        text += name;
    }
    return text;
}

EdgePerms default_child_perms(ChildRole role, bool read_only, EdgePerms from) {
    constexpr Perm kChanging = Perm::kWrite | Perm::kResize;
    switch (role) {
        case ChildRole::kFiltered:
            return from;
        case ChildRole::kFile:
        case ChildRole::kData:
            // A format writes its metadata also when nobody writes through it.
            from.need |= Perm::kConsistentRead;
            if (!read_only) from.need |= kChanging;
            from.share &= ~kChanging;
            return from;
        case ChildRole::kBacking: {
            // Who can live with changing data above can live with a changing backing file.
            EdgePerms perms{from.need & Perm::kConsistentRead, Perm::kConsistentRead | Perm::kWriteUnchanged};
            if (any(from.share & Perm::kWrite)) perms.share |= kChanging;
            return perms;
        }
    }
    return from;
}

namespace {

/// How a user is called in a refusal; `hint` gets what the reference's words leave out.
struct Holder {
    std::string who, as, hint;
};

bool reference_speaks_so(std::string_view user) {
    return user.starts_with("node '") || user.starts_with("block device '") || user.starts_with("block job ");
}

Holder root_holder(const Root& root) {
    const std::string& user = root.user();
    if (reference_speaks_so(user)) return {user, "root", ""};
    return {"an unnamed block device", "root", user};
}

}  // namespace

PermissionPass::Entry& PermissionPass::entry_of(const Node* node) {
    auto it = std::ranges::find(entries_, node, &Entry::node);
    CHECK(it != entries_.end(), "every node of an edge is open");
    return *it;
}

void PermissionPass::sort() {
    // Kahn: a node follows once all its parents have.
    std::unordered_map<const Node*, size_t> waiting;
    std::vector<Node*> ready;
    for (const auto& node : graph_.all_) {
        waiting[node.get()] = node->parents_.size();
        if (node->parents_.empty()) ready.push_back(node.get());
    }
    entries_.clear();
    edges_.clear();
    while (!ready.empty()) {
        Node* node = ready.back();
        ready.pop_back();
        entries_.push_back({.node = node, .users = {}, .total = {}});
        for (const auto& child : node->children_) {
            if (--waiting[child->node.get()] == 0) ready.push_back(child->node.get());
        }
    }
    CHECK(entries_.size() == graph_.all_.size(), "the graph has no cycle and no edge to a closed node");
}

Result<> PermissionPass::compute() {
    sort();
    std::unordered_map<const Node*, Entry*> by_node;
    for (Entry& entry : entries_) {
        by_node[entry.node] = &entry;
        for (const Root* root : entry.node->roots_) entry.users.push_back({root->options_.perms, nullptr, root});
    }
    for (const PermissionUser& user : graph_.permission_users_) {
        auto it = by_node.find(user.node);
        CHECK(it != by_node.end(), "a permission user's node is open");
        it->second->users.push_back({user.perms, nullptr, nullptr, &user});
    }
    for (Entry& entry : entries_) {
        for (const Use& use : entry.users) {
            entry.total.need |= use.perms.need;
            entry.total.share &= use.perms.share;
        }
        CHECK_OK(check(entry));
        entry.differs = !entry.node->perms_known_ || entry.total != entry.node->perms_;
        for (const auto& child : entry.node->children_) {
            EdgePerms perms = entry.node->child_perms(*child, entry.total);
            if (child->node->flags_.force_share) perms.share = Perm::kAll;
            edges_.emplace_back(child.get(), perms);
            by_node[child->node.get()]->users.push_back({perms, child.get()});
        }
    }
    return {};
}

Result<> PermissionPass::check(Entry& entry) const {
    auto holder = [](const Use& use) -> Holder {
        if (use.edge) return {fmt::format("node '{}'", use.edge->parent->name()), use.edge->name, ""};
        if (use.root) return root_holder(*use.root);
        return {use.other->who, use.other->as, ""};
    };
    constexpr Perm kWrites = Perm::kWrite | Perm::kWriteUnchanged;
    if (entry.node->read_only()) {
        for (const Use& use : entry.users) {
            if (!any(use.perms.need & kWrites)) continue;
            const Holder h = holder(use);
            const std::string& who = h.hint.empty() ? h.who : h.hint;
            // The reference has one sentence for users and one for nodes above.
            if (use.root)
                return fail(ErrorKind::kReadOnly,
                            "Image is read-only; {} wants to write to node '{}', which is open read-only", who,
                            entry.node->name());
            return fail(
                ErrorKind::kReadOnly,
                "Block node is read-only; {} wants to write to node '{}': open that read-write, or the upper one with "
                "read-only=on",
                who, entry.node->name());
        }
    }
    for (const Use& taker : entry.users) {
        for (const Use& refuser : entry.users) {
            if (&taker == &refuser) continue;
            const Perm conflict = taker.perms.need & ~refuser.perms.share;
            if (!any(conflict)) continue;
            const Holder u = holder(taker);
            const Holder v = holder(refuser);
            std::string hint;
            if (!u.hint.empty()) hint += "; required by " + u.hint;
            if (!v.hint.empty()) hint += "; unshared by " + v.hint;
            const std::string& name = entry.node->name();
            return fail(ErrorKind::kPermission,
                        "Permission conflict on node '{}': permissions '{}' are both required by {} (uses node '{}' as "
                        "'{}' child) "
                        "and unshared by {} (uses node '{}' as '{}' child).{}",
                        name, perm_names(conflict), u.who, name, u.as, v.who, name, v.as, hint);
        }
    }
    return {};
}

std::vector<Node*> PermissionPass::changed() const {
    std::vector<Node*> nodes;
    for (const Entry& entry : entries_) {
        if (entry.differs) nodes.push_back(entry.node);
    }
    return nodes;
}

void PermissionPass::skip(const Node& node) { entry_of(&node).differs = false; }

Task<Result<>> PermissionPass::prepare() {
    for (Entry& entry : entries_) {
        if (!entry.differs) continue;
        Result<> ready = co_await entry.node->prepare_perms(entry.total);
        if (!ready) {
            abort();
            co_return ready;
        }
        entry.prepared = true;
    }
    co_return Result<>();
}

void PermissionPass::commit() {
    for (auto& [child, perms] : edges_) child->perms = perms;
    for (Entry& entry : entries_) {
        if (!entry.differs) continue;
        entry.node->commit_perms(entry.total);
        entry.node->perms_ = entry.total;
        entry.node->perms_known_ = true;
    }
}

void PermissionPass::abort() {
    for (Entry& entry : entries_) {
        if (entry.prepared) entry.node->abort_perms();
        entry.prepared = false;
    }
}

}  // namespace gantry::block
