#include "block/format_node.h"

#include <algorithm>

namespace gantry::block {
namespace {

constexpr unsigned kExtendSteps = 1024;  // maps joined to one extent

}  // namespace

WritePlan::WritePlan() = default;
WritePlan::WritePlan(WritePlan&&) noexcept = default;
WritePlan& WritePlan::operator=(WritePlan&&) noexcept = default;
WritePlan::~WritePlan() = default;

FormatNode::FormatNode(std::string_view driver, std::string name, NodeFlags flags)
    : Node(driver, std::move(name), flags) {
    limits_.partial_zeroes = true;
}

FormatNode::~FormatNode() = default;

void FormatNode::cache_children() {
    file_ = data_ = backing_ = nullptr;
    for (const auto& child : children()) {
        switch (child->role) {
            case ChildRole::kFile:
            case ChildRole::kFiltered:
                if (!file_) file_ = child.get();
                break;
            case ChildRole::kData:
                data_ = child.get();
                break;
            case ChildRole::kBacking:
                backing_ = child.get();
                break;
        }
    }
}

void FormatNode::extend(uint64_t offset, uint64_t wanted, Extent& extent) {
    using Kind = Extent::Kind;
    if (extent.kind == Kind::kEncoded) return;
    for (unsigned step = 0; step < kExtendSteps && extent.length < wanted; step++) {
        Extent next;
        if (map(offset + extent.length, wanted - extent.length, next) != MapResult::kHit) return;
        if (next.kind != extent.kind || next.allocated != extent.allocated || next.must_copy != extent.must_copy ||
            next.transform != extent.transform) {
            return;
        }
        if (extent.kind == Kind::kData && (next.node != extent.node || next.offset != extent.offset + extent.length)) {
            return;
        }
        CHECK(next.length > 0, "a map must make progress");
        extent.length += std::min(next.length, wanted - extent.length);
    }
}

bool FormatNode::hit(uint64_t offset, uint64_t length, Extent& extent) {
    if (map(offset, length, extent) != MapResult::kHit) return false;
    CHECK(extent.length > 0, "a map must make progress");
    extent.length = std::min(extent.length, length);
    extend(offset, length, extent);
    return true;
}

Task<Result<Extent>> FormatNode::miss(Request& rq, uint64_t offset, uint64_t length) {
    CO_TRY(Extent extent, co_await load_map(rq, offset, length));
    CHECK(extent.length > 0, "a map must make progress");
    extent.length = std::min(extent.length, length);
    extend(offset, length, extent);
    co_return extent;
}

// ---- What a format may leave out ----

Task<Result<>> FormatNode::read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' has no decoder for {} bytes at {}", name(),
                   driver(), iov.bytes, offset);
}

Task<Result<>> FormatNode::decode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' has no transform to read {} bytes at {}", name(),
                   driver(), iov.bytes, guest_offset);
}

Task<Result<>> FormatNode::encode_in_place(Request& rq, uint64_t guest_offset, uint64_t host_offset, IoVec iov) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' has no transform to write {} bytes at {}", name(),
                   driver(), iov.bytes, guest_offset);
}

uint32_t FormatNode::write_unit(uint64_t offset) { return std::max<uint32_t>(cluster_size(), 1); }

Task<Result<WritePlan>> FormatNode::plan_write(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    co_return fail(ErrorKind::kReadOnly, "node '{}': driver '{}' cannot write", name(), driver());
}

Task<Result<>> FormatNode::commit_write(Request& rq, WritePlan& plan) { co_return Result<>(); }

Task<void> FormatNode::abort_write(Request& rq, WritePlan& plan) { co_return; }

Task<Error> FormatNode::write_refused(Request& rq, uint64_t host_offset, uint64_t length) {
    co_return Error(ErrorKind::kIo, fmt::format("node '{}': {} bytes at {:#x} of its file must not be written", name(),
                                                length, host_offset));
}

Task<Result<>> FormatNode::zero_mapped(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' has no zero state", name(), driver());
}

Task<Result<>> FormatNode::discard_mapped(Request& rq, uint64_t offset, uint64_t length) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' has no discard", name(), driver());
}

Task<Result<>> FormatNode::write_compressed(Request& rq, uint64_t offset, IoVec iov) {
    co_return fail(ErrorKind::kUnsupported, "node '{}': driver '{}' cannot compress", name(), driver());
}

Task<Result<>> FormatNode::flush_metadata(Request& rq) { co_return Result<>(); }

// ---- Flush and preload ----

Task<Result<>> FormatNode::do_flush(Request& rq) {
    if (!read_only()) CO_CHECK(co_await flush_metadata(rq));
    if (data_) CO_CHECK(co_await data_->node->flush(rq));
    co_return co_await file().flush(rq);
}

Task<Result<>> FormatNode::do_preload(Request& rq, uint64_t offset, uint64_t length) {
    Pass pass(*this);
    for (uint64_t pos = offset, end = offset + length; pos < end;) {
        Extent extent;
        if (!hit(pos, end - pos, extent)) {
            CO_TRY(extent, co_await miss(rq, pos, end - pos));
        }
        if (extent.kind == Extent::Kind::kData) {
            CO_CHECK(co_await extent.node->preload(rq, extent.offset, extent.length));
        } else if (extent.kind == Extent::Kind::kUnallocated && backing()) {
            CO_CHECK(co_await backing()->preload(rq, pos, extent.length));
        }
        pos += extent.length;
    }
    co_return Result<>();
}

}  // namespace gantry::block
