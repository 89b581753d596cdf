#include "block/image_operations.h"

namespace gantry::block {

namespace {

std::unexpected<Error> unsupported(const char* what) {
    return fail(ErrorKind::kUnsupported, "This image format does not support {}", what);
}

}  // namespace

Task<Result<ImageCheck>> ImageOperations::check(CheckRepair, Progress) { co_return unsupported("checks"); }
Task<Result<>> ImageOperations::resize(uint64_t, Preallocation, bool, Progress) {
    co_return unsupported("being resized");
}
Task<Result<>> ImageOperations::snapshot_create(SnapshotSpec) { co_return unsupported("internal snapshots"); }
Task<Result<>> ImageOperations::snapshot_apply(std::string) { co_return unsupported("internal snapshots"); }
Task<Result<>> ImageOperations::snapshot_delete(std::string, std::string) {
    co_return unsupported("internal snapshots");
}
Task<Result<>> ImageOperations::amend(json::object, bool, Progress) { co_return unsupported("option amendment"); }
Task<Result<>> ImageOperations::change_backing(std::string, std::string) { co_return unsupported("backing files"); }
Task<Result<>> ImageOperations::make_empty() { co_return unsupported("being emptied"); }
Task<Result<>> ImageOperations::compact(Progress) { co_return unsupported("being compacted"); }
Result<> ImageOperations::can_store_bitmap(const std::string&, uint32_t) { return unsupported("persistent bitmaps"); }
Task<Result<>> ImageOperations::remove_stored_bitmap(const std::string&) {
    co_return unsupported("persistent bitmaps");
}

}  // namespace gantry::block
