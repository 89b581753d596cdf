#include "block/formats/qcow2/image_file.h"

#include <utility>

namespace gantry::block::qcow2 {

namespace {

Error at(Error&& error, std::string_view verb, std::string_view what, const std::string& node, uint64_t offset,
         uint64_t bytes) {
    return std::move(error).context(
        fmt::format("Could not {} {}; node '{}': {} bytes at {:#x}", verb, what, node, bytes, offset));
}

}  // namespace

Task<Result<>> ImageFile::read(uint64_t offset, std::span<uint8_t> to, std::string_view what) const {
    if (to.empty()) co_return Result<>();
    Request rq = Request::internal();
    const iovec iov{to.data(), to.size()};
    Result<> done = co_await file_->read(rq, offset, IoVec(iov));
    if (!done) co_return std::unexpected(at(std::move(done).error(), "read", what, node_name_, offset, to.size()));
    co_return Result<>();
}

Task<Result<>> ImageFile::write(uint64_t offset, std::span<const uint8_t> from, std::string_view what) const {
    if (from.empty()) co_return Result<>();
    Request rq = Request::internal();
    const iovec iov{const_cast<uint8_t*>(from.data()), from.size()};
    Result<> done = co_await file_->write(rq, offset, IoVec(iov));
    if (!done) co_return std::unexpected(at(std::move(done).error(), "write", what, node_name_, offset, from.size()));
    co_return Result<>();
}

Task<Result<>> ImageFile::write_zeroes(uint64_t offset, uint64_t bytes, std::string_view what) const {
    if (bytes == 0) co_return Result<>();
    Request rq = Request::internal();
    Result<> done = co_await file_->write_zeroes(rq, offset, bytes, WriteFlags::kNone);
    if (!done) co_return std::unexpected(at(std::move(done).error(), "zero", what, node_name_, offset, bytes));
    co_return Result<>();
}

Task<void> ImageFile::discard(uint64_t offset, uint64_t bytes) const {
    if (bytes == 0) co_return;
    Request rq = Request::internal();
    (void)co_await file_->discard(rq, offset, bytes);
}

Task<Result<>> ImageFile::flush() const {
    Request rq = Request::internal();
    Result<> done = co_await file_->flush(rq);
    if (!done) {
        co_return std::unexpected(
            std::move(done).error().context(fmt::format("Could not flush the image file; node '{}'", node_name_)));
    }
    co_return Result<>();
}

Task<Result<>> ImageFile::truncate(uint64_t bytes) const {
    if (bytes == file_->size()) co_return Result<>();
    if (file_->read_only()) {
        co_return fail(ErrorKind::kReadOnly, "Could not resize the image file; node '{}': its file is read-only",
                       node_name_);
    }
    Result<> done = co_await file_->do_resize(bytes);
    if (!done) {
        co_return std::unexpected(std::move(done).error().context(
            fmt::format("Could not resize the image file; node '{}': to {} bytes", node_name_, bytes)));
    }
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
