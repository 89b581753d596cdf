// Changes of the graph above open nodes: replace, insert_above, resize.

#include <algorithm>

#include "block/bitmap.h"
#include "block/graph.h"
#include "block/graph_transaction.h"
#include "runtime/log.h"

namespace gantry::block {

Task<Result<>> Graph::replace(Node& from_node, Node& to_node, const Node* keep) {
    std::shared_ptr<Node> from_alive = from_node.shared_from_this();
    std::shared_ptr<Node> to_alive = to_node.shared_from_this();
    auto guard = co_await mutex_.lock();
    CO_TRY(std::shared_ptr<Node> from, still_open(std::move(from_alive)));
    CO_TRY(std::shared_ptr<Node> to, still_open(std::move(to_alive)));
    GraphTransaction tx(*this);
    std::vector<Node*> nodes{from.get(), to.get()};
    CO_CHECK(co_await tx.begin(std::move(nodes)));
    Result<> done = tx.replace_node(*from, *to, keep);
    if (!done) {
        co_await tx.rollback();
        co_return done;
    }
    co_return co_await tx.commit();
}

Task<Result<>> Graph::insert_above(Node& node, Node& filter) {
    CHECK(!filter.children().empty() && filter.children().front()->node.get() == &node,
          "the filter stands on the node");
    return replace(node, filter, &filter);
}

namespace {

/// The node and what it keeps its bytes in: a resize reaches down to there.
void visit_storage(Node& node, std::vector<Node*>& nodes) {
    if (std::ranges::find(nodes, &node) != nodes.end()) return;
    nodes.push_back(&node);
    for (const auto& edge : node.children()) {
        if (edge->role != ChildRole::kBacking) visit_storage(*edge->node, nodes);
    }
}

/// Growth first where it may fail; bits beyond a new end go last.
Task<Result<>> resize_with_bitmaps(Node& node, uint64_t new_size) {
    const uint64_t old_size = node.size();
    if (new_size > old_size) {
        for (const auto& bitmap : node.bitmaps()) {
            Result<> grown = bitmap->resize(new_size);
            if (grown) continue;
            for (const auto& other : node.bitmaps()) (void)other->resize(old_size);
            co_return std::unexpected(std::move(grown).error());
        }
    }
    Result<> resized = co_await node.do_resize(new_size);
    // The driver may have rounded the size, or stopped half-way.
    for (const auto& bitmap : node.bitmaps()) {
        if (bitmap->size() == node.size()) continue;
        Result<> followed = bitmap->resize(node.size());
        if (!followed && resized) resized = std::move(followed);
    }
    co_return resized;
}

}  // namespace

Task<Result<>> Graph::resize(Node& node, int64_t new_size, bool grow_only) {
    if (new_size < 0) co_return fail(ErrorKind::kInvalid, "Parameter 'size' expects a >0 size");
    std::shared_ptr<Node> wanted = node.shared_from_this();
    auto guard = co_await mutex_.lock();
    CO_TRY(std::shared_ptr<Node> alive, still_open(std::move(wanted)));
    if (grow_only && alive->size() >= static_cast<uint64_t>(new_size)) co_return Result<>();
    if (alive->read_only())
        co_return fail(ErrorKind::kReadOnly, "Image is read-only; node '{}' was opened read-only", alive->name());
    std::vector<Node*> storage;
    visit_storage(*alive, storage);
    for (const Node* part : storage) CO_CHECK(check_not_leased(*part));

    const auto user = permission_users_.insert(
        permission_users_.end(), {alive.get(), {Perm::kResize, Perm::kAll}, "an unnamed block device", "root"});
    Result<> resized = co_await update_permissions(PermMode::kMust);
    SizeWatch watch;
    if (resized) {
        DrainSection section;
        watch.start(storage);
        co_await begin_drain(section, storage);
        resized = co_await resize_with_bitmaps(*alive, static_cast<uint64_t>(new_size));
        watch.settle();
        co_await end_drain(section);
    }
    permission_users_.erase(user);
    Result<> relaxed = co_await update_permissions(PermMode::kRelax);
    if (!relaxed) log::error("after resizing node '{}': {}", alive->name(), relaxed.error().message());
    watch.notify();
    co_return resized;
}

}  // namespace gantry::block
