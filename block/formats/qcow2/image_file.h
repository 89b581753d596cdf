// ImageFile: reads and writes of an image's metadata, whole or an error.

#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "block/node.h"

namespace gantry::block::qcow2 {

/// Any loop (requests are internal ones of the calling loop); point_to() while nobody calls. Errors: those of the node
/// below, with what was read or written and where.
class ImageFile {
  public:
    explicit ImageFile(std::string node_name) : node_name_(std::move(node_name)) {}
    ImageFile(std::string node_name, Node& file) : node_name_(std::move(node_name)), file_(&file) {}

    void point_to(Node& file) { file_ = &file; }
    Node& node() const { return *file_; }
    const std::string& node_name() const { return node_name_; }
    /// Bytes of the file now.
    uint64_t size() const { return file_->size(); }

    /// Bytes beyond the end of the file read as zeroes. `what` for the error: "L2 table", "refcount block", ... (a
    /// literal: it outlives the call).
    Task<Result<>> read(uint64_t offset, std::span<uint8_t> to, std::string_view what) const;
    Task<Result<>> write(uint64_t offset, std::span<const uint8_t> from, std::string_view what) const;
    Task<Result<>> write_zeroes(uint64_t offset, uint64_t bytes, std::string_view what) const;
    /// Returns the range to the host; failures are only hints.
    Task<void> discard(uint64_t offset, uint64_t bytes) const;
    /// All completed writes are stable afterwards.
    Task<Result<>> flush() const;
    /// Cuts or extends the file; main loop, nothing in flight beyond `bytes`.
    Task<Result<>> truncate(uint64_t bytes) const;

  private:
    std::string node_name_;
    Node* file_ = nullptr;
};

}  // namespace gantry::block::qcow2
