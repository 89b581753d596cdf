#include "block/bitmap_control.h"

#include <algorithm>

#include "block/image_operations.h"

namespace gantry::block {

namespace {

constexpr uint32_t kMinDefaultGranularity = 4096;
constexpr uint32_t kMaxDefaultGranularity = 65536;
constexpr size_t kMaxNameBytes = 1023;

Result<Node*> find_node(const Graph& graph, const std::string& name) {
    if (Node* node = graph.find(name)) return node;
    return fail(ErrorKind::kNotFound, "Node '{}' not found", name);
}

Result<std::shared_ptr<DirtyBitmap>> usable_bitmap(const Graph& graph, const BitmapRef& ref, BitmapUse use) {
    TRY(std::shared_ptr<DirtyBitmap> bitmap, lookup_bitmap(graph, ref));
    CHECK_OK(check_bitmap(*bitmap, use));
    return bitmap;
}

Result<> check_storable(Node& node, const std::string& name, uint32_t granularity) {
    ImageOperations* image = node.image_operations();
    Result<> storable = image ? image->can_store_bitmap(name, granularity)
                              : fail(ErrorKind::kUnsupported, "driver '{}' stores no bitmaps", node.driver());
    if (storable || storable.error().kind() != ErrorKind::kUnsupported) return storable;
    return fail(ErrorKind::kUnsupported, "Can't store persistent bitmaps to {}: Operation not supported; {}",
                node.name(), storable.error().message());
}

/// A new bitmap for `node`, not added yet.
Result<std::shared_ptr<DirtyBitmap>> make_bitmap(Graph& graph, Node& node, const BitmapSpec& spec) {
    if (find_bitmap(node, spec.name)) return fail(ErrorKind::kExists, "Bitmap already exists: {}", spec.name);
    const uint32_t granularity = spec.granularity.value_or(default_bitmap_granularity(node));
    CHECK_OK(DirtyBitmap::check_granularity(granularity));
    if (spec.persistent) {
        CHECK_OK(check_storable(node, spec.name, granularity));
        if (node.read_only()) {
            return fail(ErrorKind::kReadOnly,
                        "Can't make bitmap '{}' persistent in '{}': Image is read-only; it could never be stored",
                        spec.name, node.name());
        }
    }
    if (spec.name.size() > kMaxNameBytes) return fail(ErrorKind::kInvalid, "Bitmap name too long: {}", spec.name);
    CHECK_OK(graph.check_not_leased(node));
    TRY(std::shared_ptr<DirtyBitmap> bitmap, DirtyBitmap::create(spec.name, node.size(), granularity));
    bitmap->persistent = spec.persistent;
    bitmap->set_recording(!spec.disabled);
    return bitmap;
}

Result<Node*> node_for_add(const Graph& graph, const BitmapSpec& spec) {
    if (spec.name.empty()) return fail(ErrorKind::kInvalid, "Bitmap name cannot be empty");
    return graph.lookup(spec.node, spec.node);
}

/// The target and its sources, everything checked.
struct Merge {
    std::shared_ptr<DirtyBitmap> target;
    std::vector<std::shared_ptr<DirtyBitmap>> sources;

    void run() const {
        for (const auto& source : sources) CHECK(target->merge(*source).has_value(), "sizes have been compared");
    }
};

Result<Merge> check_merge(const Graph& graph, const BitmapRef& target, const std::vector<BitmapRef>& sources) {
    Merge merge;
    TRY(merge.target, usable_bitmap(graph, target, BitmapUse::kChange));
    for (const BitmapRef& ref : sources) {
        TRY(std::shared_ptr<DirtyBitmap> source, usable_bitmap(graph, ref, BitmapUse::kRead));
        CHECK_OK(merge.target->check_merge(*source));
        merge.sources.push_back(std::move(source));
    }
    return merge;
}

/// One node drained under the graph lock.
class Drained {
  public:
    Drained(Graph& graph, Node& node) : graph_(graph), node_(node.shared_from_this()), nodes_{node_.get()} {}
    Task<void> begin() { co_await graph_.drain(nodes_); }
    Task<void> end() { co_await graph_.undrain(nodes_); }

  private:
    Graph& graph_;
    std::shared_ptr<Node> node_;
    std::vector<Node*> nodes_;
};

Task<Result<>> remove_drained(Graph& graph, BitmapRef ref) {
    CO_TRY(BitmapChange change, BitmapChanges::prepare_remove(graph, ref));
    Result<> removed = co_await change.commit();
    if (!removed) change.abort();
    co_return removed;
}

}  // namespace

std::shared_ptr<DirtyBitmap> find_bitmap(const Node& node, std::string_view name) {
    const auto& all = node.bitmaps();
    const auto it = std::ranges::find_if(all, [&](const auto& bitmap) { return bitmap->name() == name; });
    return it == all.end() ? nullptr : *it;
}

Result<std::shared_ptr<DirtyBitmap>> lookup_bitmap(const Graph& graph, const BitmapRef& ref) {
    TRY(Node * node, find_node(graph, ref.node));
    std::shared_ptr<DirtyBitmap> bitmap = find_bitmap(*node, ref.name);
    if (!bitmap) return fail(ErrorKind::kNotFound, "Dirty bitmap '{}' not found", ref.name);
    return bitmap;
}

Result<> check_bitmap(const DirtyBitmap& bitmap, BitmapUse use) {
    const std::string& name = bitmap.name();
    if (bitmap.busy) {
        return fail(ErrorKind::kBusy, "Bitmap '{}' is currently in use by another operation and cannot be used", name);
    }
    if (bitmap.read_only() && use != BitmapUse::kRead) {
        return fail(ErrorKind::kReadOnly,
                    "Bitmap '{}' is readonly and cannot be modified; its image is not open for writing", name);
    }
    if (bitmap.inconsistent && use != BitmapUse::kRemove) {
        return fail(ErrorKind::kCorrupt,
                    "Bitmap '{}' is inconsistent and cannot be used; its image was not closed properly: remove it with "
                    "block-dirty-bitmap-remove",
                    name);
    }
    return {};
}

uint32_t default_bitmap_granularity(const Node& node) {
    const uint32_t cluster = node.cluster_size();
    return cluster ? std::clamp(cluster, kMinDefaultGranularity, kMaxDefaultGranularity) : kMaxDefaultGranularity;
}

Task<Result<>> BitmapChange::commit() {
    if (kind_ == Kind::kRemove && bitmap_->persistent) {
        co_return co_await node_->image_operations()->remove_stored_bitmap(bitmap_->name());
    }
    co_return Result<>();
}

void BitmapChange::abort() {
    switch (kind_) {
        case Kind::kAdd:
            node_->remove_bitmap(*bitmap_);
            break;
        case Kind::kRemove:
            node_->add_bitmap(bitmap_);
            break;
        case Kind::kBits:
            if (before_->size() == bitmap_->size()) {
                bitmap_->assign(*before_);
            } else {
                bitmap_->set_range(0, bitmap_->size());  // cannot tell any more: everything may have been written
            }
            break;
        case Kind::kRecording:
            bitmap_->set_recording(was_enabled_);
            break;
    }
}

Result<BitmapChange> BitmapChanges::prepare_add(Graph& graph, const BitmapSpec& spec) {
    TRY(Node * node, node_for_add(graph, spec));
    TRY(std::shared_ptr<DirtyBitmap> bitmap, make_bitmap(graph, *node, spec));
    node->add_bitmap(bitmap);
    return BitmapChange(BitmapChange::Kind::kAdd, node->shared_from_this(), std::move(bitmap));
}

Result<BitmapChange> BitmapChanges::prepare_remove(Graph& graph, const BitmapRef& ref) {
    TRY(std::shared_ptr<DirtyBitmap> bitmap, usable_bitmap(graph, ref, BitmapUse::kRemove));
    Node* node = graph.find(ref.node);
    node->remove_bitmap(*bitmap);
    return BitmapChange(BitmapChange::Kind::kRemove, node->shared_from_this(), std::move(bitmap));
}

Result<BitmapChange> BitmapChanges::prepare_clear(Graph& graph, const BitmapRef& ref) {
    TRY(std::shared_ptr<DirtyBitmap> bitmap, usable_bitmap(graph, ref, BitmapUse::kChange));
    BitmapChange change(BitmapChange::Kind::kBits, graph.find(ref.node)->shared_from_this(), bitmap);
    change.before_ = bitmap->snapshot(bitmap->name());
    bitmap->clear_all();
    return change;
}

Result<BitmapChange> BitmapChanges::prepare_recording(Graph& graph, const BitmapRef& ref, bool on) {
    TRY(std::shared_ptr<DirtyBitmap> bitmap, usable_bitmap(graph, ref, BitmapUse::kRead));
    BitmapChange change(BitmapChange::Kind::kRecording, graph.find(ref.node)->shared_from_this(), bitmap);
    change.was_enabled_ = bitmap->enabled();
    bitmap->set_recording(on);
    return change;
}

Result<BitmapChange> BitmapChanges::prepare_merge(Graph& graph, const BitmapRef& target,
                                                  const std::vector<BitmapRef>& sources) {
    TRY(const Merge merge, check_merge(graph, target, sources));
    BitmapChange change(BitmapChange::Kind::kBits, graph.find(target.node)->shared_from_this(), merge.target);
    change.before_ = merge.target->snapshot(merge.target->name());
    merge.run();
    return change;
}

Task<Result<>> add_bitmap(Graph& graph, BitmapSpec spec) {
    auto guard = co_await graph.mutex().lock();
    CO_TRY(Node * node, node_for_add(graph, spec));
    // Refused before anybody is stopped; looked at again when everybody is.
    CO_CHECK(make_bitmap(graph, *node, spec));
    Drained drained(graph, *node);
    co_await drained.begin();
    Result<BitmapChange> change = BitmapChanges::prepare_add(graph, spec);
    co_await drained.end();
    if (!change) co_return std::unexpected(std::move(change).error());
    co_return Result<>();
}

Task<Result<>> remove_bitmap(Graph& graph, BitmapRef ref) {
    auto guard = co_await graph.mutex().lock();
    CO_CHECK(usable_bitmap(graph, ref, BitmapUse::kRemove));
    Drained drained(graph, *graph.find(ref.node));
    co_await drained.begin();
    Result<> removed = co_await remove_drained(graph, std::move(ref));
    co_await drained.end();
    co_return removed;
}

Result<> clear_bitmap(Graph& graph, const BitmapRef& ref) {
    TRY(std::shared_ptr<DirtyBitmap> bitmap, usable_bitmap(graph, ref, BitmapUse::kChange));
    bitmap->clear_all();
    return {};
}

Result<> set_bitmap_recording(Graph& graph, const BitmapRef& ref, bool on) {
    TRY(std::shared_ptr<DirtyBitmap> bitmap, usable_bitmap(graph, ref, BitmapUse::kRead));
    bitmap->set_recording(on);
    return {};
}

Result<> merge_bitmaps(Graph& graph, const BitmapRef& target, const std::vector<BitmapRef>& sources) {
    TRY(const Merge merge, check_merge(graph, target, sources));
    merge.run();
    return {};
}

}  // namespace gantry::block
