#include "qmp/block_info.h"

#include <ranges>

#include "block/bitmap.h"

namespace gantry::qmp {

json::object snapshot_json(const block::SnapshotInfo& s) {
    json::object out{{"id", s.id},
                     {"name", s.name},
                     {"vm-state-size", s.vm_state_size},
                     {"date-sec", s.date_sec},
                     {"date-nsec", s.date_nsec},
                     {"vm-clock-sec", s.vm_clock_ns / 1000000000},
                     {"vm-clock-nsec", s.vm_clock_ns % 1000000000}};
    if (s.icount) out["icount"] = *s.icount;
    return out;
}

namespace {

using block::ImageInfo;
using block::Node;

std::string_view detect_zeroes_name(block::DetectZeroes mode) {
    switch (mode) {
        case block::DetectZeroes::kOff:
            return "off";
        case block::DetectZeroes::kOn:
            return "on";
        case block::DetectZeroes::kUnmap:
            return "unmap";
    }
    return "off";
}

json::object image_json(const Node& node, const ImageInfo& info) {
    json::object out{{"filename", node.filename()}, {"format", node.driver()}, {"virtual-size", info.virtual_size}};
    if (info.actual_size) out["actual-size"] = *info.actual_size;
    if (info.dirty) out["dirty-flag"] = *info.dirty;
    if (info.cluster_size) out["cluster-size"] = *info.cluster_size;
    if (info.encrypted) out["encrypted"] = *info.encrypted;
    if (info.compressed) out["compressed"] = *info.compressed;
    if (!info.backing_filename.empty()) out["backing-filename"] = info.backing_filename;
    if (!info.full_backing_filename.empty()) out["full-backing-filename"] = info.full_backing_filename;
    if (!info.backing_format.empty()) out["backing-filename-format"] = info.backing_format;
    if (!info.snapshots.empty()) {
        json::array list;
        for (const auto& s : info.snapshots) list.push_back(snapshot_json(s));
        out["snapshots"] = std::move(list);
    }
    if (!info.format_specific.empty()) out["format-specific"] = info.format_specific;
    return out;
}

Node* backing_of(const Node& node) {
    block::Child* child = node.child("backing");
    return child ? child->node.get() : nullptr;
}

Task<json::object> image_tree(Node& node, bool with_backing) {
    // Kept alive: describing it may wait for I/O, and the graph may change meanwhile.
    auto hold = node.shared_from_this();
    auto info = co_await node.image_info();
    if (!info) {
        co_return json::object{{"filename", node.filename()}, {"format", node.driver()}, {"virtual-size", node.size()}};
    }
    json::object out = image_json(node, *info);
    if (Node* backing = backing_of(node); backing && with_backing) {
        json::object below = co_await image_tree(*backing, true);
        out["backing-image"] = std::move(below);
    }
    co_return out;
}

json::object bitmap_json(const block::DirtyBitmap& b) {
    // Of an image that is not open for writing: what the user wants, as the reference tells it.
    const bool recording = b.enabled() && !b.inconsistent;
    json::object out{{"name", b.name()},       {"count", b.dirty_bytes()}, {"granularity", b.granularity()},
                     {"recording", recording}, {"busy", b.busy},           {"persistent", b.persistent}};
    if (b.inconsistent) out["inconsistent"] = true;
    return out;
}

void put_op(json::object& out, std::string_view prefix, const block::ChannelStats::Op& op, bool has_bytes) {
    auto key = [&](std::string_view tail) { return fmt::format("{}_{}", prefix, tail); };
    if (has_bytes) out[key("bytes")] = op.bytes;
    out[key("operations")] = op.operations;
    out[key("total_time_ns")] = op.total_time_ns;
    if (has_bytes) out[key("merged")] = 0;
    out[fmt::format("failed_{}_operations", prefix)] = op.failed;
    out[fmt::format("invalid_{}_operations", prefix)] = op.invalid;
}

}  // namespace

Task<json::object> block_device_info(Node& node, bool flat) {
    auto hold = node.shared_from_this();
    json::object image = co_await image_tree(node, !flat);
    json::object out{
        {"file", node.filename()}, {"node-name", node.name()}, {"ro", node.read_only()}, {"drv", node.driver()}};
    int depth = 0;
    if (Node* backing = backing_of(node)) {
        out["backing_file"] = backing->filename();
        for (Node* n = backing; n && !flat; n = backing_of(*n)) depth++;
    }
    out["backing_file_depth"] = depth;
    const json::value* encrypted = image.if_contains("encrypted");
    out["encrypted"] = encrypted ? *encrypted : json::value(false);
    out["detect_zeroes"] = detect_zeroes_name(node.flags().detect_zeroes);
    for (std::string_view limit : {"bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"}) out[limit] = 0;
    out["image"] = std::move(image);
    out["cache"] = {
        {"writeback", true}, {"direct", node.flags().cache_direct}, {"no-flush", node.flags().cache_no_flush}};
    out["write_threshold"] = 0;
    if (!node.bitmaps().empty()) {
        json::array list;
        // Newest first.
        for (const auto& bitmap : node.bitmaps() | std::views::reverse) list.push_back(bitmap_json(*bitmap));
        out["dirty-bitmaps"] = std::move(list);
    }
    co_return out;
}

Task<json::object> image_info_json(Node& node, bool with_backing) { return image_tree(node, with_backing); }

Task<json::object> node_stats(Node& node) {
    auto hold = node.shared_from_this();
    block::ChannelStats sum;
    std::vector<block::Root*> roots = node.roots();
    for (block::Root* root : roots) {
        // The list may have changed while we waited for the previous one.
        bool still_there = false;
        for (block::Root* r : node.roots()) still_there |= r == root;
        if (!still_there) continue;
        block::ChannelStats one = co_await root->stats();
        sum.add(one);
    }
    json::object stats;
    put_op(stats, "rd", sum.ops[static_cast<size_t>(block::OpKind::kRead)], true);
    put_op(stats, "wr", sum.ops[static_cast<size_t>(block::OpKind::kWrite)], true);
    put_op(stats, "unmap", sum.ops[static_cast<size_t>(block::OpKind::kUnmap)], true);
    put_op(stats, "flush", sum.ops[static_cast<size_t>(block::OpKind::kFlush)], false);
    stats["wr_highest_offset"] = node.wr_highest_offset();
    stats["account_invalid"] = true;
    stats["account_failed"] = true;
    stats["timed_stats"] = json::array();

    json::object out{{"node-name", node.name()}, {"stats", std::move(stats)}};
    json::object specific = node.driver_stats();
    if (!specific.empty()) out["driver-specific"] = std::move(specific);
    if (block::Child* file = node.child("file")) {
        json::object below = co_await node_stats(*file->node);
        out["parent"] = std::move(below);
    }
    co_return out;
}

}  // namespace gantry::qmp
