// ExportContexts: the meta contexts of one export, and its hold on the dirty bitmaps among them.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "block/graph.h"
#include "block/root.h"
#include "nbd/meta_context.h"
#include "schema/options.h"

namespace gantry::block {
class DirtyBitmap;
}

namespace gantry::nbd {

/// While it holds bitmaps they are busy (nobody changes, removes or exports them again, their node records on) and
/// their nodes stay open at their size. Main loop only; released before it is destroyed.
class ExportContexts {
  public:
    ExportContexts() = default;
    ExportContexts(const ExportContexts&) = delete;
    ~ExportContexts();

    /// Finds what the options `bitmaps` and `allocation-depth` of an export on `root` name. A name alone is searched
    /// for from the node down through filters and backing files. Errors (kNotFound, kBusy, kCorrupt, kInvalid) leave
    /// nothing held: `Bitmap 'X' is not found`, `Enabled bitmap 'X' incompatible with readonly export`, those of
    /// check_bitmap().
    Task<Result<>> acquire(block::Root& root, json::object options, bool writable, std::string user);
    /// Gives everything back; twice is fine. Sessions that still look at a bitmap keep its memory.
    Task<void> release();

    /// Sorted by id. What sessions get is theirs: it does not change.
    std::shared_ptr<const ContextList> list() const { return list_; }

  private:
    struct Named;
    static Result<std::vector<Named>> find_all(block::Root& root, const json::object& options, bool writable);

    std::shared_ptr<const ContextList> list_ = base_contexts();
    std::vector<std::shared_ptr<block::DirtyBitmap>> busy_;
    std::vector<std::unique_ptr<block::Root>> holds_;
    block::Graph* graph_ = nullptr;
};

}  // namespace gantry::nbd
