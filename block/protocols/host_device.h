// HostDeviceNode: a block device of this machine.

#pragma once

#include "block/protocols/file.h"

namespace gantry::block {

/// What a device does differently from a file: it cannot grow, its zeroes and discards have granules and other system
/// calls, and everything in it is data.
class HostDeviceNode final : public FileNode {
  public:
    HostDeviceNode(std::string name, const NodeFlags& flags, FileOptions options, OpenedFile file, bool use_locks);

    Task<Result<BlockStatus>> do_block_status(Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<size_t>> do_block_statuses(Request& rq, uint64_t offset, uint64_t length,
                                           std::span<BlockStatus> out) override;
    /// Only to the size that the device has by now.
    Task<Result<>> do_resize(uint64_t new_size) override;

  protected:
    int zero_blocking(const ZeroRequest& rq) override;
    int discard_blocking(uint64_t offset, uint64_t length) override;
    void adopt_limits() override;
};

}  // namespace gantry::block
