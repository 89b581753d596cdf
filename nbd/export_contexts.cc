#include "nbd/export_contexts.h"

#include <algorithm>

#include "block/bitmap_control.h"
#include "nbd/protocol.h"
#include "runtime/check.h"

namespace gantry::nbd {

namespace {

// base:allocation is 1.
constexpr uint32_t kDepthId = 2;
constexpr uint32_t kFirstBitmapId = 3;

/// What a node without bytes of its own shows: the child of a filter, or its backing file. A raw node may show a part
/// of its file only, whose bitmaps then say nothing about it.
block::Node* next_below(const block::Node& node) {
    for (const auto& child : node.children()) {
        if (child->role == block::ChildRole::kBacking) return child->node.get();
        if (child->role == block::ChildRole::kFiltered && node.driver() != "raw") return child->node.get();
    }
    return nullptr;
}

}  // namespace

struct ExportContexts::Named {
    std::shared_ptr<block::Node> node;
    std::shared_ptr<block::DirtyBitmap> bitmap;
};

ExportContexts::~ExportContexts() { CHECK(holds_.empty() && busy_.empty(), "an export gives its bitmaps back"); }

Result<std::vector<ExportContexts::Named>> ExportContexts::find_all(block::Root& root, const json::object& options,
                                                                    bool writable) {
    std::vector<Named> all;
    const json::value* bitmaps = schema::Options(options).find("bitmaps");
    if (!bitmaps) return all;
    if (bitmaps->get_array().size() > kMaxContexts - kFirstBitmapId) {
        return fail(ErrorKind::kInvalid, "{} bitmaps are too many for one export; at most {}",
                    bitmaps->get_array().size(), kMaxContexts - kFirstBitmapId);
    }
    for (const json::value& entry : bitmaps->get_array()) {
        Named found;
        if (entry.is_string()) {
            const std::string name(entry.get_string());
            block::Node* node = &root.node();
            while (node && !(found.bitmap = block::find_bitmap(*node, name))) node = next_below(*node);
            if (!found.bitmap) {
                return fail(ErrorKind::kNotFound,
                            "Bitmap '{}' is not found; neither node '{}' nor what lies below it has one of this name",
                            name, root.node().name());
            }
            if (!writable && !node->read_only() && found.bitmap->recording()) {
                return fail(ErrorKind::kInvalid,
                            "Enabled bitmap '{}' incompatible with readonly export; disable it first, or make the "
                            "export writable",
                            name);
            }
            found.node = node->shared_from_this();
        } else {
            const schema::Options external(entry.get_object());
            const block::BitmapRef ref{.node = external.str("node"), .name = external.str("name")};
            TRY(found.bitmap, block::lookup_bitmap(root.graph(), ref));
            found.node = root.graph().find(ref.node)->shared_from_this();
        }
        CHECK_OK(block::check_bitmap(*found.bitmap, block::BitmapUse::kRead));
        const auto same_name = [&](const Named& other) { return other.bitmap->name() == found.bitmap->name(); };
        if (const auto twin = std::ranges::find_if(all, same_name); twin != all.end()) {
            if (twin->bitmap == found.bitmap) continue;
            return fail(ErrorKind::kInvalid,
                        "Bitmap '{}' is named for node '{}' and for node '{}'; clients could not tell them apart",
                        found.bitmap->name(), twin->node->name(), found.node->name());
        }
        all.push_back(std::move(found));
    }
    return all;
}

Task<Result<>> ExportContexts::acquire(block::Root& root, json::object options, bool writable, std::string user) {
    graph_ = &root.graph();
    CO_TRY(std::vector<Named> wanted, find_all(root, options, writable));
    // The nodes are held first, which waits for others; then the bitmaps are looked at again and taken in one go.
    for (const Named& named : wanted) {
        block::RootOptions hold;
        hold.perms = {block::Perm::kNone, block::Perm::kAll & ~block::Perm::kResize};
        hold.user = user;
        auto held = co_await graph_->attach(*named.node, std::move(hold));
        if (!held) {
            co_await release();
            co_return std::unexpected(std::move(held).error());
        }
        holds_.push_back(std::move(*held));
    }
    Result<std::vector<Named>> taken = find_all(root, options, writable);
    if (taken && !std::ranges::equal(*taken, wanted, {}, &Named::bitmap, &Named::bitmap)) {
        taken = fail(ErrorKind::kBusy, "the bitmaps of {} were changed meanwhile; try again", user);
    }
    if (!taken) {
        co_await release();
        co_return std::unexpected(std::move(taken).error());
    }
    ContextList list = *base_contexts();
    if (schema::Options(options).flag("allocation-depth")) {
        list.push_back({ContextKind::kAllocationDepth, "qemu:allocation-depth", kDepthId});
    }
    for (size_t i = 0; i < taken->size(); ++i) {
        const auto& bitmap = (*taken)[i].bitmap;
        bitmap->busy = true;
        busy_.push_back(bitmap);
        list.push_back({ContextKind::kDirtyBitmap, "qemu:dirty-bitmap:" + bitmap->name(),
                        kFirstBitmapId + static_cast<uint32_t>(i), bitmap});
    }
    list_ = std::make_shared<const ContextList>(std::move(list));
    co_return Result<>();
}

Task<void> ExportContexts::release() {
    list_ = base_contexts();
    for (const auto& bitmap : busy_) bitmap->busy = false;
    busy_.clear();
    while (!holds_.empty()) {
        auto hold = std::move(holds_.back());
        holds_.pop_back();
        co_await graph_->detach(std::move(hold));
    }
}

}  // namespace gantry::nbd
