#include "block/image_control.h"

#include <algorithm>

#include "block/size_watch.h"
#include "runtime/buffer.h"
#include "runtime/log.h"

namespace gantry::block {

DrainedNode::DrainedNode(Graph& graph, Node& node) : graph_(graph), node_(node.shared_from_this()) {}

DrainedNode::~DrainedNode() { CHECK(!drained_, "end() is awaited after a successful begin()"); }

Task<Result<>> DrainedNode::begin() {
    guard_ = co_await graph_.mutex().lock();
    Result<> usable = graph_.check_not_leased(*node_);
    if (node_->closed()) usable = fail(ErrorKind::kNotFound, "node '{}' has been removed", node_->name());
    if (!usable) {
        guard_.unlock();
        co_return usable;
    }
    Node* const nodes[] = {node_.get()};
    co_await graph_.drain(nodes);
    drained_ = true;
    co_return Result<>();
}

Task<void> DrainedNode::end() {
    Node* const nodes[] = {node_.get()};
    co_await graph_.undrain(nodes);
    drained_ = false;
    guard_.unlock();
}

namespace {

std::unexpected<Error> unsupported(const Node& node, std::string_view what) {
    return fail(ErrorKind::kUnsupported, "Block format '{}' used by node '{}' does not support {}", node.driver(),
                node.name(), what);
}

/// A user that takes `need` for the length of an operation and shares everything.
Task<Result<std::unique_ptr<Root>>> take(Graph& graph, Node& node, Perm need, Perm share = Perm::kAll) {
    RootOptions options;
    options.perms = {need, share};
    options.user = "an unnamed block device";
    co_return co_await graph.attach(node, std::move(options));
}

/// Drains the node, acts, lets sizes move up through the graph. `need`: what others must share meanwhile.
template <class T>
Task<Result<T>> operate(Graph& graph, Node& given, Perm need, const char* what,
                        std::function<Task<Result<T>>(ImageOperations&)> act) {
    const std::shared_ptr<Node> node = given.shared_from_this();
    ImageOperations* operations = node->image_operations();
    if (!operations) co_return unsupported(*node, what);
    std::unique_ptr<Root> user;
    if (any(need)) {
        CO_TRY(user, co_await take(graph, *node, need));
    }
    DrainedNode drained(graph, *node);
    Result<> began = co_await drained.begin();
    SizeWatch watch;
    Result<T> done = std::unexpected(Error(ErrorKind::kCancelled, "not begun"));
    if (began) {
        watch.start({node.get()});
        done = co_await act(*operations);
        watch.settle();
        co_await drained.end();
        watch.notify();
    } else {
        done = std::unexpected(std::move(began).error());
    }
    if (user) co_await graph.detach(std::move(user));
    co_return done;
}

}  // namespace

Task<Result<ImageCheck>> check_image(Graph& graph, Node& node, CheckRepair repair, Progress progress) {
    co_return co_await operate<ImageCheck>(graph, node, Perm::kNone, "checks", [&](ImageOperations& operations) {
        return operations.check(repair, std::move(progress));
    });
}

Task<Result<>> resize_image(Graph& graph, Node& node, uint64_t new_size, Preallocation preallocation, bool allow_shrink,
                            Progress progress) {
    if (new_size > INT64_MAX) co_return fail(ErrorKind::kTooLarge, "Image size must be below 2^63 bytes");
    if (node.read_only()) {
        co_return fail(ErrorKind::kReadOnly, "Image is read-only; node '{}' was opened read-only", node.name());
    }
    if (!node.image_operations()) {
        if (preallocation != Preallocation::kOff) co_return unsupported(node, "preallocation in a resize");
        if (new_size < node.size() && !allow_shrink) {
            co_return fail(ErrorKind::kInvalid,
                           "Node '{}' has {} bytes; shrinking it to {} deletes data and must be allowed explicitly",
                           node.name(), node.size(), new_size);
        }
        co_return co_await graph.resize(node, static_cast<int64_t>(new_size));
    }
    co_return co_await operate<void>(graph, node, Perm::kResize, "being resized", [&](ImageOperations& operations) {
        return operations.resize(new_size, preallocation, allow_shrink, std::move(progress));
    });
}

Task<Result<>> create_snapshot(Graph& graph, Node& node, SnapshotSpec spec) {
    co_return co_await operate<void>(graph, node, Perm::kNone, "internal snapshots", [&](ImageOperations& operations) {
        return operations.snapshot_create(std::move(spec));
    });
}

Task<Result<>> apply_snapshot(Graph& graph, Node& node, std::string id_or_name) {
    // The disk becomes another one under its users.
    co_return co_await operate<void>(
        graph, node, Perm::kWrite | Perm::kResize, "internal snapshots",
        [&](ImageOperations& operations) { return operations.snapshot_apply(std::move(id_or_name)); });
}

Task<Result<>> delete_snapshot(Graph& graph, Node& node, std::string id, std::string name) {
    co_return co_await operate<void>(graph, node, Perm::kNone, "internal snapshots", [&](ImageOperations& operations) {
        return operations.snapshot_delete(std::move(id), std::move(name));
    });
}

Task<Result<>> amend_image(Graph& graph, Node& node, json::object options, bool force, Progress progress) {
    const Perm need = options.contains("size") ? Perm::kResize : Perm::kNone;
    co_return co_await operate<void>(graph, node, need, "option amendment", [&](ImageOperations& operations) {
        return operations.amend(std::move(options), force, std::move(progress));
    });
}

Task<Result<>> change_backing_file(Graph& graph, Node& node, std::string file, std::string format) {
    co_return co_await operate<void>(graph, node, Perm::kNone, "backing files", [&](ImageOperations& operations) {
        return operations.change_backing(std::move(file), std::move(format));
    });
}

Task<Result<>> compact_image(Graph& graph, Node& node, Progress progress) {
    co_return co_await operate<void>(graph, node, Perm::kNone, "being compacted", [&](ImageOperations& operations) {
        return operations.compact(std::move(progress));
    });
}

json::object to_json(const ImageCheck& check, std::string filename, std::string format) {
    json::object o{
        {"filename", std::move(filename)}, {"format", std::move(format)}, {"check-errors", check.check_errors}};
    const auto put = [&o](const char* name, std::optional<uint64_t> value) {
        // Members that are not there mean zero.
        if (value && *value != 0) o[name] = *value;
    };
    put("image-end-offset", check.image_end_offset);
    put("corruptions", check.corruptions);
    put("leaks", check.leaks);
    put("corruptions-fixed", check.corruptions_fixed);
    put("leaks-fixed", check.leaks_fixed);
    put("total-clusters", check.total_clusters);
    put("allocated-clusters", check.allocated_clusters);
    put("fragmented-clusters", check.fragmented_clusters);
    put("compressed-clusters", check.compressed_clusters);
    return o;
}

}  // namespace gantry::block
