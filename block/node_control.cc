// The parts of Node that are not I/O: life, children, names, defaults of the life-cycle virtuals.

#include <algorithm>
#include <array>

#include "block/graph.h"
#include "block/node.h"
#include "schema/json_dialect.h"

namespace gantry::block {

Node::Node(std::string_view driver, std::string name, NodeFlags flags)
    : driver_(driver), name_(std::move(name)), flags_(flags), read_only_(flags.read_only) {}

Node::~Node() { CHECK(parents_.empty() && roots_.empty(), "a node is destroyed without users"); }

Child* Node::child(std::string_view name) const {
    auto it = std::ranges::find_if(children_, [&](const auto& c) { return c->name == name; });
    return it == children_.end() ? nullptr : it->get();
}

EdgePerms Node::child_perms(const Child& child, EdgePerms from_parents) const {
    return default_child_perms(child.role, read_only(), from_parents);
}

namespace {

/// Options of every node: they say how it is used, not what it is.
constexpr std::array<std::string_view, 9> kGenericOptions = {
    "node-name", "discard", "cache", "read-only", "auto-read-only", "force-share", "detect-zeroes", "id", "active"};

bool is_generic(std::string_view key) { return std::ranges::find(kGenericOptions, key) != kGenericOptions.end(); }

}  // namespace

Task<Result<>> Node::prepare_reopen(const json::object& options, const NodeFlags& flags) {
    std::span<const std::string_view> changeable = reopen_options_;
    auto may_change = [&](std::string_view key) {
        return is_generic(key) || child(key) != nullptr || key == "backing" || key == "file" ||
               std::ranges::find(changeable, key) != changeable.end();
    };
    for (const auto& [key, value] : options) {
        const json::value* old = options_.if_contains(key);
        if (may_change(key) || (old && *old == value)) continue;
        co_return fail(ErrorKind::kInvalid, "Cannot change the option '{}'", std::string_view(key));
    }
    for (const auto& [key, value] : options_) {
        if (may_change(key) || options.contains(key)) continue;
        co_return fail(ErrorKind::kInvalid, "Cannot change the option '{}'", std::string_view(key));
    }
    co_return Result<>();
}

namespace {

/// What one would have to say to open the same thing again.
json::object essence_of(const Node& node) {
    json::object essence;
    for (const auto& [key, value] : node.options()) {
        if (!node.is_tuning(key)) essence[key] = value;
    }
    for (const auto& edge : node.children()) {
        // Elements of a list stay as they were given.
        if (!edge->name.contains('.')) essence[edge->name] = essence_of(*edge->node);
    }
    return essence;
}

}  // namespace

bool Node::is_tuning(std::string_view option) const { return is_generic(option); }

bool Node::path_suffices() const {
    return std::ranges::all_of(options_, [this](const auto& member) {
        return is_tuning(member.key()) || member.key() == "driver" || member.key() == "file";
    });
}

std::string Node::filename() const {
    static constexpr size_t kMaxBytes = 1023;
    const Child* below = child("file");
    if (below && path_suffices()) {
        std::string name = below->node->filename();
        if (!name.starts_with("json:")) return name;
    }
    std::string text = "json:" + schema::to_json(essence_of(*this));
    if (text.size() > kMaxBytes) text.replace(kMaxBytes - 3, std::string::npos, "...");
    return text;
}

Task<Result<ImageInfo>> Node::image_info() {
    ImageInfo info;
    info.virtual_size = size();
    if (const Child* below = child("file")) {
        // Kept alive: the graph may change while it looks at its file.
        const std::shared_ptr<Node> file = below->node;
        Result<ImageInfo> inner = co_await file->image_info();
        if (inner) {
            info.actual_size = inner->actual_size;
            info.dirty = inner->dirty;
        }
    }
    co_return info;
}

}  // namespace gantry::block
