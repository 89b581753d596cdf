#include "block/crypto/luks_io.h"

#include "block/node.h"

namespace gantry::block::crypto {

namespace {

Result<> check_inside(const LuksArea& area, uint64_t at, uint64_t bytes, std::string_view what) {
    if (at <= area.length && bytes <= area.length - at) return {};
    return fail(ErrorKind::kCorrupt,
                "Request for data outside of extension header; {}: {} bytes at offset {:#x} of an area of {:#x} bytes",
                what, bytes, at, area.length);
}

Error in_context(Error error, const LuksArea& area, uint64_t at, std::string_view verb, std::string_view what) {
    return std::move(error).context(
        fmt::format("node '{}': {} {} at {:#x}", area.node->name(), verb, what, area.offset + at));
}

}  // namespace

Task<Result<>> read_area(LuksArea area, uint64_t at, std::span<uint8_t> to, std::string_view what) {
    CO_CHECK(check_inside(area, at, to.size(), what));
    const iovec iov{to.data(), to.size()};
    Request rq = Request::internal();
    Result<> read = co_await area.node->read(rq, area.offset + at, IoVec(iov));
    if (!read) co_return std::unexpected(in_context(std::move(read).error(), area, at, "reading", what));
    co_return Result<>();
}

Task<Result<>> write_area(LuksArea area, uint64_t at, std::span<const uint8_t> from, std::string_view what) {
    CO_CHECK(check_inside(area, at, from.size(), what));
    const iovec iov{const_cast<uint8_t*>(from.data()), from.size()};
    Request rq = Request::internal();
    Result<> written = co_await area.node->write(rq, area.offset + at, IoVec(iov));
    if (!written) co_return std::unexpected(in_context(std::move(written).error(), area, at, "writing", what));
    co_return Result<>();
}

Task<Result<>> zero_area(LuksArea area) {
    Request rq = Request::internal();
    Result<> zeroed = co_await area.node->write_zeroes(rq, area.offset, area.length, WriteFlags::kNone);
    if (!zeroed) co_return std::unexpected(in_context(std::move(zeroed).error(), area, 0, "zeroing", "key slots"));
    co_return Result<>();
}

Task<Result<>> flush_area(LuksArea area) {
    Request rq = Request::internal();
    Result<> flushed = co_await area.node->flush(rq);
    if (!flushed) co_return std::unexpected(in_context(std::move(flushed).error(), area, 0, "flushing", "key slots"));
    co_return Result<>();
}

}  // namespace gantry::block::crypto
