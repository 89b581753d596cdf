// What commands do with the dirty bitmaps of nodes: add, remove, clear, enable, disable, merge.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "block/bitmap.h"
#include "block/graph.h"

namespace gantry::block {

struct BitmapSpec {
    std::string node, name;
    std::optional<uint32_t> granularity = {};
    bool persistent = false;
    bool disabled = false;
};

struct BitmapRef {
    std::string node, name;
};

/// Null when the node has none of that name.
std::shared_ptr<DirtyBitmap> find_bitmap(const Node& node, std::string_view name);
/// `Node 'X' not found`, `Dirty bitmap 'Y' not found` (kNotFound).
Result<std::shared_ptr<DirtyBitmap>> lookup_bitmap(const Graph& graph, const BitmapRef& ref);

/// What a user of a bitmap is about to do with it.
enum class BitmapUse : uint8_t {
    kRead,    // bits are looked at; also what enable and disable need
    kChange,  // bits change
    kRemove,  // an inconsistent one is fine
};
/// In this order: kBusy "... is currently in use by another operation and cannot be used", kReadOnly "... is readonly
/// and cannot be modified", kCorrupt "... is inconsistent and cannot be used".
Result<> check_bitmap(const DirtyBitmap& bitmap, BitmapUse use);

/// The cluster size of the node's image within 4 ... 64 KiB; 64 KiB when it has none.
uint32_t default_bitmap_granularity(const Node& node);

/// A change that has happened in memory and can be taken back. Move-only; commit() or abort() exactly once.
class BitmapChange {
  public:
    /// Takes a removed persistent bitmap out of its image; the others have nothing left to do. After an error the
    /// change may still be aborted.
    Task<Result<>> commit();
    void abort();

  private:
    friend struct BitmapChanges;
    enum class Kind : uint8_t { kAdd, kRemove, kBits, kRecording };
    BitmapChange(Kind kind, std::shared_ptr<Node> node, std::shared_ptr<DirtyBitmap> bitmap)
        : kind_(kind), node_(std::move(node)), bitmap_(std::move(bitmap)) {}

    Kind kind_;
    std::shared_ptr<Node> node_;
    std::shared_ptr<DirtyBitmap> bitmap_;
    std::shared_ptr<DirtyBitmap> before_;  // kBits
    bool was_enabled_ = false;             // kRecording
};

/// The steps of a transaction. Main loop; the owner holds Graph::mutex() and has drained the node named (of kAdd,
/// kRemove; the others for one point in time) from before prepare until after commit() or abort(). Each checks
/// everything, then takes effect in memory at once, so that a later step sees it; on failure nothing has changed.
struct BitmapChanges {
    static Result<BitmapChange> prepare_add(Graph& graph, const BitmapSpec& spec);
    static Result<BitmapChange> prepare_remove(Graph& graph, const BitmapRef& ref);
    static Result<BitmapChange> prepare_clear(Graph& graph, const BitmapRef& ref);
    static Result<BitmapChange> prepare_recording(Graph& graph, const BitmapRef& ref, bool on);
    static Result<BitmapChange> prepare_merge(Graph& graph, const BitmapRef& target,
                                              const std::vector<BitmapRef>& sources);
};

/// The same as operations of their own: lock, drain where needed, change.
Task<Result<>> add_bitmap(Graph& graph, BitmapSpec spec);
Task<Result<>> remove_bitmap(Graph& graph, BitmapRef ref);
Result<> clear_bitmap(Graph& graph, const BitmapRef& ref);
Result<> set_bitmap_recording(Graph& graph, const BitmapRef& ref, bool on);
/// ORs all sources in, or none.
Result<> merge_bitmaps(Graph& graph, const BitmapRef& target, const std::vector<BitmapRef>& sources);

}  // namespace gantry::block
