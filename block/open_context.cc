// OpenContext: how a driver's open function gets its children.

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "block/driver.h"
#include "block/graph.h"
#include "block/node_flags.h"
#include "runtime/blocking_pool.h"
#include "runtime/own_mounts.h"

namespace gantry::block {

OpenContext::OpenContext(Graph& graph, const json::object& options, std::string node_name, NodeFlags flags, int depth)
    : graph_(&graph), options_(&options), node_name_(std::move(node_name)), flags_(flags), depth_(depth) {}

OpenContext::~OpenContext() {
    // Open failed: who was only opened for us is closed by Graph::close_unused().
    for (Pending& pending : children_) {
        --pending.child->node->pins_;
        graph_->permission_users_.erase(pending.user);
    }
}

const json::value* OpenContext::option(std::string_view name) const {
    if (const json::value* value = options_->if_contains(name)) return value;
    // "children.2": an element of a list.
    const size_t dot = name.rfind('.');
    if (dot == std::string_view::npos) return nullptr;
    const json::value* list = options_->if_contains(name.substr(0, dot));
    size_t index = 0;
    const std::string_view digits = name.substr(dot + 1);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (!list || !list->is_array() || error != std::errc() || end != digits.data() + digits.size()) return nullptr;
    return index < list->get_array().size() ? &list->get_array()[index] : nullptr;
}

bool OpenContext::child_refused(std::string_view name) const {
    const json::value* value = option(name);
    return value && (value->is_null() || (value->is_string() && value->get_string().empty()));
}

bool OpenContext::child_given(std::string_view name) const { return option(name) && !child_refused(name); }

Task<Result<Node*>> OpenContext::open_child(std::string_view name, ChildRole role) {
    const std::string child_name(name);
    const json::value* value = option(child_name);
    if (!value) co_return fail(ErrorKind::kInvalid, "Parameter '{}' is missing", child_name);
    if (value->is_string()) {
        const std::string reference(value->get_string());
        CO_TRY(Node * node, graph_->lookup(reference, reference));
        co_return co_await adopt(child_name, role, node->shared_from_this(), false);
    }
    if (!value->is_object())
        co_return fail(ErrorKind::kInvalid, "Invalid parameter type for '{}', expected: BlockdevRef", child_name);
    CO_TRY(std::shared_ptr<Node> node,
           co_await graph_->open_node(value->get_object(), inherited_flags(flags_, role), depth_ + 1));
    co_return co_await adopt(child_name, role, std::move(node), true);
}

Task<Result<Node*>> OpenContext::adopt(std::string name, ChildRole role, std::shared_ptr<Node> node, bool is_inline) {
    // Locks are taken before the driver reads the first byte: the edge counts as if its parent were open, and used by
    // nobody.
    const bool reads_only = flags_.read_only || (flags_.auto_read_only && node->read_only());
    const bool reads_at_once = is_inline && (role == ChildRole::kFiltered || role == ChildRole::kBacking);
    const EdgePerms unused{reads_at_once ? Perm::kConsistentRead : Perm::kNone, Perm::kAll};
    EdgePerms perms = default_child_perms(role, reads_only, unused);
    if (node->flags().force_share) perms.share = Perm::kAll;

    auto child = std::make_unique<Child>();
    child->name = name;
    child->role = role;
    child->node = node;
    child->is_inline = is_inline;
    ++node->pins_;
    auto& users = graph_->permission_users_;
    auto user = users.insert(users.end(), {node.get(), perms, fmt::format("node '{}'", node_name_), std::move(name)});
    children_.push_back({std::move(child), user});
    Result<> permitted = co_await graph_->update_permissions(Graph::PermMode::kMust);
    if (!permitted) {
        --node->pins_;
        users.erase(user);
        children_.pop_back();
        co_return std::unexpected(std::move(permitted).error());
    }
    co_return node.get();
}

void OpenContext::hand_over(Node& node) {
    for (Pending& pending : children_) {
        pending.child->parent = &node;
        --pending.child->node->pins_;
        pending.child->node->parents_.push_back(pending.child.get());
        graph_->permission_users_.erase(pending.user);
        node.children_.push_back(std::move(pending.child));
    }
    children_.clear();
}

namespace {

/// Adds the files that a definition names, one for each node in it that has none below; false when one of these is no
/// local file. Children may stand under any name and in lists: all of them count.
using Paths = std::vector<std::string>;
bool collect_paths(const json::value& value, Paths& paths, int depth);

bool collect_paths(const json::object& object, Paths& paths, int depth) {
    constexpr int kMaxDepth = 64;
    if (depth > kMaxDepth) return false;
    const size_t before = paths.size();
    for (const auto& member : object) {
        if (!collect_paths(member.value(), paths, depth + 1)) return false;
    }
    const json::value* driver = object.if_contains("driver");
    if (!driver) return true;
    const json::value* filename = object.if_contains("filename");
    const bool local = *driver == "file" || *driver == "host_device";
    if (local && filename && filename->is_string()) {
        paths.emplace_back(filename->get_string());
        return true;
    }
    return !local && paths.size() > before;
}

bool collect_paths(const json::value& value, Paths& paths, int depth) {
    if (value.is_object()) return collect_paths(value.get_object(), paths, depth);
    if (!value.is_array()) return true;
    return std::ranges::all_of(value.get_array(),
                               [&](const json::value& element) { return collect_paths(element, paths, depth + 1); });
}

/// Whether `path` lies, symbolic links resolved, in one of the directories. Blocking.
bool lies_inside(const std::string& path, const std::vector<std::string>& directories) {
    std::error_code error;
    // One of our own exports cannot be asked what it is; it is there, so its name can be found without.
    const std::filesystem::path real = OwnMounts::process().check_path(path)
                                           ? std::filesystem::weakly_canonical(path, error)
                                           : std::filesystem::path(real_path_of_place(path));
    if (error || real.empty()) return false;
    for (const std::string& directory : directories) {
        const std::filesystem::path base = std::filesystem::weakly_canonical(directory, error);
        if (error) continue;
        const auto [end, unused] = std::mismatch(base.begin(), base.end(), real.begin(), real.end());
        if (end == base.end()) return true;
    }
    return false;
}

}  // namespace

Task<Result<Node*>> OpenContext::open_implicit(std::string_view name, ChildRole role, json::object definition) {
    const std::string child_name(name);
    const ImageReferencePolicy& policy = graph_->image_references();
    if (!policy.allow_all) {
        Paths paths;
        const bool local = collect_paths(definition, paths, 0) && !paths.empty();
        const std::vector<std::string> directories = policy.allowed_directories;
        const auto outside = [&] {
            return std::ranges::find_if_not(paths, [&](const auto& path) { return lies_inside(path, directories); });
        };
        const bool inside = local && co_await run_blocking([&] { return outside() == paths.end(); });
        if (!inside) {
            co_return fail(ErrorKind::kPermission,
                           "node '{}': the image names '{}' as its {} file, which it may not; give '{}' explicitly",
                           node_name_, local && paths.size() == 1 ? paths.front() : json::serialize(definition),
                           child_name, child_name);
        }
    }
    const NodeFlags flags = inherited_flags(flags_, role);
    if (!definition.contains("driver")) {
        const json::value* file = definition.if_contains("file");
        CHECK(file && file->is_object(), "a definition without a driver has its file inline");
        CO_TRY(std::string format, co_await graph_->probe_definition(file->get_object(), flags, depth_ + 1));
        definition["driver"] = format;
    }
    CO_TRY(std::shared_ptr<Node> node, co_await graph_->open_node(std::move(definition), flags, depth_ + 1));
    co_return co_await adopt(child_name, role, std::move(node), true);
}

Task<Result<std::string>> Graph::probe_definition(json::object file, NodeFlags flags, int depth) {
    flags.read_only = true;
    CO_TRY(std::shared_ptr<Node> node, co_await open_node(std::move(file), flags, depth));
    Result<std::string> format = co_await probe(*node);
    co_await close_node(std::move(node));
    co_return format;
}

}  // namespace gantry::block
