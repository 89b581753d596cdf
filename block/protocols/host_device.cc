#include "block/protocols/host_device.h"

#include <bit>

#include "block/protocols/file_alignment.h"
#include "runtime/blocking_pool.h"

namespace gantry::block {

namespace {

constexpr uint64_t kMaxGranule = 16 << 20;

}  // namespace

HostDeviceNode::HostDeviceNode(std::string name, const NodeFlags& flags, FileOptions options, OpenedFile file,
                               bool use_locks)
    : FileNode("host_device", std::move(name), flags, std::move(options), FileKind::kBlockDevice, std::move(file),
               use_locks) {
    can_.fast_device_zeroes = device_queue_value(fd(), "write_zeroes_max_bytes") > 0;
    HostDeviceNode::adopt_limits();
}

void HostDeviceNode::adopt_limits() {
    FileNode::adopt_limits();
    const uint32_t block = logical_block_size(fd());
    const uint64_t granule = device_queue_value(fd(), "discard_granularity");
    limits_.zeroes_alignment = std::max(block, limits_.request_alignment);
    limits_.discard_alignment = limits_.zeroes_alignment;
    if (granule > limits_.discard_alignment && granule <= kMaxGranule && std::has_single_bit(granule)) {
        limits_.discard_alignment = static_cast<uint32_t>(granule);
    }
}

int HostDeviceNode::zero_blocking(const ZeroRequest& rq) { return zero_device_range(fd(), can_, rq); }

int HostDeviceNode::discard_blocking(uint64_t offset, uint64_t length) {
    return discard_device_range(fd(), can_, offset, length);
}

Task<Result<BlockStatus>> HostDeviceNode::do_block_status(Request& rq, uint64_t offset, uint64_t length) {
    return Node::do_block_status(rq, offset, length);
}

Task<Result<size_t>> HostDeviceNode::do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                                       std::span<BlockStatus> out) {
    return Node::do_block_statuses(rq, offset, length, out);
}

Task<Result<>> HostDeviceNode::do_resize(uint64_t new_size) {
    const Result<uint64_t> now = co_await run_blocking([this] { return file_size(fd(), FileKind::kBlockDevice); });
    if (!now) co_return std::unexpected(now.error());
    if (new_size != *now) {
        co_return fail(ErrorKind::kUnsupported,
                       "Cannot resize device files; '{}' has {} bytes: change the device itself, then give its size",
                       filename(), *now);
    }
    set_size(*now);
    co_return Result<>();
}

}  // namespace gantry::block
