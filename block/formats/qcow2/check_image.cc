// Checking an image that is open as a node.

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

Task<Result<ImageCheck>> Qcow2Node::check(CheckRepair repair, Progress progress) {
    if (!metadata_) {
        if (repair != CheckRepair::kNone && read_only()) {
            co_return fail(ErrorKind::kReadOnly, "Image is read-only; node '{}' must be writable to be repaired",
                           name());
        }
        co_return co_await check_metadata(image_file_, image_, repair, std::move(progress));
    }
    if (repair != CheckRepair::kNone) CO_CHECK(check_writable());
    // What waits in memory and what is reserved would show as leaks. A broken node has stopped writing: it is looked at
    // as it is.
    if (!broken_.load(std::memory_order_relaxed)) {
        CO_CHECK(co_await metadata_->flush());
        CO_CHECK(co_await metadata_->settle());
    }
    auto guard = co_await metadata_->mutex().lock();
    Result<ImageCheck> checked = co_await check_metadata(image_file_, image_, repair, std::move(progress));
    if (repair == CheckRepair::kNone) co_return checked;
    // Also after a failure: part of the repair may have been done.
    Result<> reloaded = co_await metadata_->refcounts().reload();
    if (reloaded) reloaded = co_await metadata_->reload_mapping();
    if (!reloaded && checked) co_return std::unexpected(std::move(reloaded).error());
    co_return checked;
}

}  // namespace gantry::block::qcow2
