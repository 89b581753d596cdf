// What is declared and not built yet: each function refuses. Building one takes it away from here.

#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

namespace {
std::unexpected<Error> pending(const Node& node) {
    return fail(ErrorKind::kUnsupported, "node '{}': not in this build", node.name());
}
}  // namespace

// Encryption
Task<Result<>> Qcow2Node::decode_in_place(Request&, uint64_t, uint64_t, IoVec) { co_return pending(*this); }
Task<Result<>> Qcow2Node::encode_in_place(Request&, uint64_t, uint64_t, IoVec) { co_return pending(*this); }

// Writing
uint32_t Qcow2Node::write_unit(uint64_t) { return cluster_size(); }
Task<Result<WritePlan>> Qcow2Node::plan_write(Request&, uint64_t, uint64_t, WriteFlags) { co_return pending(*this); }
Task<Result<>> Qcow2Node::commit_write(Request&, WritePlan&) { co_return pending(*this); }
Task<void> Qcow2Node::abort_write(Request&, WritePlan&) { co_return; }
Task<Result<>> Qcow2Node::zero_mapped(Request&, uint64_t, uint64_t, WriteFlags) { co_return pending(*this); }
Task<Result<>> Qcow2Node::discard_mapped(Request&, uint64_t, uint64_t) { co_return pending(*this); }
Task<Result<>> Qcow2Node::write_compressed(Request&, uint64_t, IoVec) { co_return pending(*this); }
Task<Result<>> Qcow2Node::do_flush(Request& rq) { return FormatNode::do_flush(rq); }
Task<Error> Qcow2Node::corrupt_on_write(std::string message, uint64_t offset, uint64_t bytes) {
    co_return corrupt(std::move(message), offset, bytes);
}
Node* Qcow2Node::data_file() { return geometry().external_data ? &data() : nullptr; }
Result<> Qcow2Node::check_writable() const { return pending(*this); }
Task<Result<>> Qcow2Node::make_writable() { co_return pending(*this); }
Task<Result<>> Qcow2Node::make_read_only() { co_return Result<>(); }
Task<void> Qcow2Node::quiesce() { co_return; }
void Qcow2Node::unquiesce() {}
void Qcow2Node::commit_reopen() {}
void Qcow2Node::abort_reopen() {}

// Resize
Task<Result<>> Qcow2Node::do_resize(uint64_t) { co_return pending(*this); }
Task<Result<>> Qcow2Node::resize(uint64_t, Preallocation, bool, Progress) { co_return pending(*this); }

// Snapshots
Task<Result<>> Qcow2Node::snapshot_create(SnapshotSpec) { co_return pending(*this); }
Task<Result<>> Qcow2Node::snapshot_apply(std::string) { co_return pending(*this); }
Task<Result<>> Qcow2Node::snapshot_delete(std::string, std::string) { co_return pending(*this); }

// Other operations
Task<Result<ImageCheck>> Qcow2Node::check(CheckRepair, Progress) { co_return pending(*this); }
Task<Result<>> Qcow2Node::amend(json::object, bool, Progress) { co_return pending(*this); }
Task<Result<>> Qcow2Node::change_backing(std::string, std::string) { co_return pending(*this); }
Task<Result<>> Qcow2Node::make_empty() { co_return pending(*this); }
Task<Result<>> Qcow2Node::compact(Progress) { co_return pending(*this); }

// Bitmaps
Result<> Qcow2Node::can_store_bitmap(const std::string&, uint32_t) { return pending(*this); }
Task<Result<>> Qcow2Node::remove_stored_bitmap(const std::string&) { co_return pending(*this); }
Task<Result<>> Qcow2Node::load_bitmaps(bool) { co_return Result<>(); }
Task<Result<>> Qcow2Node::store_bitmaps() { co_return Result<>(); }

}  // namespace gantry::block::qcow2
