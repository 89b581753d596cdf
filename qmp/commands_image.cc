// Internal snapshots, change-backing-file, x-blockdev-amend.

#include <algorithm>
#include <chrono>

#include "block/image_control.h"
#include "block/jobs/amend_job.h"
#include "qmp/block_info.h"
#include "qmp/command.h"

namespace gantry::qmp {

namespace {

using block::Node;

/// The time of a new snapshot. There is no machine whose clock could be told, so that is the same.
block::SnapshotSpec spec_now(std::string name) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const auto ns = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
    return {.name = std::move(name),
            .date_sec = static_cast<uint32_t>(ns / 1000000000),
            .date_nsec = static_cast<uint32_t>(ns % 1000000000),
            .vm_clock_ns = ns};
}

Result<> check_writable(const Node& node) {
    if (!node.read_only()) return {};
    return fail(ErrorKind::kReadOnly, "Device '{}' is read only", node.name());
}

/// Snapshots are of a whole disk: of the top of a chain, with no node above it.
Result<> check_is_root(const Node& node) {
    if (node.parents().empty()) return {};
    return fail(ErrorKind::kInvalid, "Need a root block node; node '{}' is used by node '{}'", node.name(),
                node.parents().front()->parent->name());
}

Task<Result<json::value>> snapshot_internal(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    const std::string device = options.str("device"), name = options.str("name");
    CO_TRY(Node * found, services.graph.lookup(device, device));
    const std::shared_ptr<Node> node = found->shared_from_this();
    CO_CHECK(check_is_root(*node));
    CO_CHECK(check_writable(*node));
    if (!node->image_operations()) {
        co_return fail(ErrorKind::kUnsupported,
                       "Block format '{}' used by device '{}' does not support internal snapshots", node->driver(),
                       device);
    }
    if (name.empty()) co_return fail(ErrorKind::kInvalid, "Name is empty");
    CO_TRY(const block::ImageInfo info, co_await node->image_info());
    for (const block::SnapshotInfo& s : info.snapshots) {
        if (s.name != name) continue;
        co_return fail(ErrorKind::kExists, "Snapshot with name '{}' already exists on device '{}'", name, device);
    }
    Result<> made = co_await block::create_snapshot(services.graph, *node, spec_now(name));
    if (!made) {
        co_return std::unexpected(std::move(made).error().context(
            fmt::format("Failed to create snapshot '{}' on device '{}'", name, device)));
    }
    co_return done({});
}

/// The first snapshot that the id and the name given (nullptr: any) both fit.
const block::SnapshotInfo* find_snapshot(const block::ImageInfo& info, const std::string* id, const std::string* name) {
    const auto fits = [&](const block::SnapshotInfo& s) { return (!id || s.id == *id) && (!name || s.name == *name); };
    const auto found = std::ranges::find_if(info.snapshots, fits);
    return found == info.snapshots.end() ? nullptr : &*found;
}

Task<Result<json::value>> snapshot_delete_internal(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    const std::string device = options.str("device"), id = options.str("id"), name = options.str("name");
    const bool by_id = options.has("id"), by_name = options.has("name");
    CO_TRY(Node * found, services.graph.lookup(device, device));
    const std::shared_ptr<Node> node = found->shared_from_this();
    CO_CHECK(check_is_root(*node));
    if (!by_id && !by_name) co_return fail(ErrorKind::kInvalid, "Name or id must be provided");
    if (!node->image_operations()) {
        co_return fail(ErrorKind::kUnsupported,
                       "Failed to get a snapshot list: Operation not supported; format '{}' of node '{}' has none",
                       node->driver(), node->name());
    }
    CO_TRY(const block::ImageInfo info, co_await node->image_info());
    const block::SnapshotInfo* snapshot = find_snapshot(info, by_id ? &id : nullptr, by_name ? &name : nullptr);
    if (!snapshot) {
        co_return fail(ErrorKind::kNotFound, "Snapshot with id '{}' and name '{}' does not exist on device '{}'",
                       by_id ? id : "null", by_name ? name : "null", device);
    }
    CO_CHECK(check_writable(*node));
    CO_CHECK(co_await block::delete_snapshot(services.graph, *node, snapshot->id, snapshot->name));
    co_return json::value(snapshot_json(*snapshot));
}

/// `image` or one of those below it is `wanted`.
bool in_chain(const Node* image, const Node& wanted) {
    while (image) {
        if (image == &wanted) return true;
        const block::Child* below = image->child("backing");
        if (!below) below = image->child("file");
        image = below ? below->node.get() : nullptr;
    }
    return false;
}

Task<Result<json::value>> change_backing_file(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    const std::string device = options.str("device"), image_name = options.str("image-node-name");
    const std::string backing_file = options.str("backing-file");
    CO_TRY(Node * top, services.graph.lookup(device, device));
    CO_TRY(Node * image, services.graph.lookup("", image_name));
    const block::Child* backing = image->child("backing");
    if (!backing) {
        co_return fail(ErrorKind::kInvalid, "not allowing backing file change on an image without a backing file");
    }
    if (!in_chain(top, *image)) {
        co_return fail(ErrorKind::kInvalid, "'{}' and image file are not in the same chain", device);
    }
    std::string format(backing_file.empty() ? std::string_view() : backing->node->driver());
    const std::shared_ptr<Node> node = image->shared_from_this();
    co_return done(
        co_await block::change_backing_file(services.graph, *node, std::move(backing_file), std::move(format)));
}

Task<Result<json::value>> blockdev_amend(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    CO_TRY(Node * node, services.graph.lookup("", options.str("node-name")));
    json::object change = options.object("options");
    if (change.at("driver").as_string() != node->driver()) {
        co_return fail(ErrorKind::kInvalid, "x-blockdev-amend doesn't support changing the block driver");
    }
    if (!node->image_operations()) {
        co_return fail(ErrorKind::kUnsupported, "Driver does not support x-blockdev-amend");
    }
    auto job = std::make_unique<block::AmendJob>(services.graph, options.str("job-id"), *node, std::move(change),
                                                 options.flag("force"));
    CO_TRY([[maybe_unused]] block::Job * started, services.graph.jobs().start(std::move(job)));
    co_return done({});
}

constexpr HandlerRow kHandlers[] = {
    {"blockdev-snapshot-internal-sync", snapshot_internal},
    {"blockdev-snapshot-delete-internal-sync", snapshot_delete_internal},
    {"change-backing-file", change_backing_file},
    {"x-blockdev-amend", blockdev_amend},
};

}  // namespace

std::span<const HandlerRow> image_handlers() { return kHandlers; }

}  // namespace gantry::qmp
