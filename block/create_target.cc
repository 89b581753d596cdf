#include "block/create_target.h"

#include <algorithm>

#include "runtime/buffer.h"
#include "runtime/check.h"
#include "runtime/timer.h"

namespace gantry::block {

namespace {

constexpr uint64_t kReserveStep = uint64_t{1} << 30;
constexpr uint64_t kFillStep = uint64_t{2} << 20;

Error at(Error&& error, std::string_view verb, std::string_view what, const Node& node, uint64_t offset,
         uint64_t bytes) {
    return std::move(error).context(
        fmt::format("Could not {} {}; node '{}': {} bytes at {:#x}", verb, what, node.name(), bytes, offset));
}

}  // namespace

CreateTarget::~CreateTarget() { CHECK(!root_, "close() comes before the end of a target"); }

Task<Result<>> CreateTarget::open(json::value reference, std::string user) {
    RootOptions options;
    // Size is changed through Graph::resize, which takes the right to do so for that moment.
    options.perms = {Perm::kConsistentRead | Perm::kWrite, ~Perm::kWrite};
    options.user = std::move(user);
    options.busy_text = "an image is being made of it";
    CO_TRY(root_, co_await graph_.attach_reference(std::move(reference), std::move(options)));
    channel_ = co_await root_->channel(Loop::current());
    co_return Result<>();
}

Task<void> CreateTarget::close() {
    if (!root_) co_return;
    channel_ = nullptr;
    co_await graph_.detach(std::move(root_));
}

Task<Result<>> CreateTarget::empty(uint64_t bytes, uint64_t zeroes) {
    if (bytes > INT64_MAX) co_return fail(ErrorKind::kTooLarge, "a file of {} bytes is not possible", bytes);
    Result<> cut = co_await graph_.resize(node(), 0);
    if (cut) {
        all_zero_ = true;
        co_return co_await graph_.resize(node(), static_cast<int64_t>(bytes));
    }
    if (cut.error().kind() != ErrorKind::kUnsupported) co_return cut;
    if (size() < bytes) {
        co_return fail(ErrorKind::kNoSpace, "node '{}' has {} bytes, {} are needed, and it cannot be made larger: {}",
                       node().name(), size(), bytes, cut.error().message());
    }
    co_return co_await write_zeroes(0, std::min(zeroes, size()), WriteFlags::kMayUnmap, "the old contents");
}

Task<Result<>> CreateTarget::grow(uint64_t bytes) {
    if (size() >= bytes) co_return Result<>();
    if (bytes > INT64_MAX) co_return fail(ErrorKind::kTooLarge, "a file of {} bytes is not possible", bytes);
    co_return co_await graph_.resize(node(), static_cast<int64_t>(bytes));
}

Task<Result<>> CreateTarget::write(uint64_t offset, std::span<const uint8_t> from, std::string_view what) {
    if (from.empty()) co_return Result<>();
    const iovec iov{const_cast<uint8_t*>(from.data()), from.size()};
    Result<> done = co_await channel_->write(offset, IoVec(iov));
    if (!done) co_return std::unexpected(at(std::move(done).error(), "write", what, node(), offset, from.size()));
    co_return Result<>();
}

Task<Result<>> CreateTarget::write_zeroes(uint64_t offset, uint64_t bytes, WriteFlags flags, std::string_view what) {
    if (bytes == 0) co_return Result<>();
    Result<> done = co_await channel_->write_zeroes(offset, bytes, flags);
    if (!done) co_return std::unexpected(at(std::move(done).error(), "zero", what, node(), offset, bytes));
    co_return Result<>();
}

Task<Result<>> CreateTarget::flush() {
    Result<> done = co_await channel_->flush();
    if (!done) {
        co_return std::unexpected(
            std::move(done).error().context(fmt::format("Could not flush the new image; node '{}'", node().name())));
    }
    co_return Result<>();
}

Task<Result<>> CreateTarget::preallocate(uint64_t offset, uint64_t bytes, Preallocation mode, Progress progress) {
    if (mode != Preallocation::kFalloc && mode != Preallocation::kFull) co_return Result<>();
    const uint64_t step = mode == Preallocation::kFalloc ? kReserveStep : kFillStep;
    Buffer zeroes;
    if (mode == Preallocation::kFull) {
        zeroes = Buffer::alloc(std::min(step, bytes));
        std::ranges::fill(zeroes.span(), uint8_t{0});
    }
    for (uint64_t done = 0; done < bytes;) {
        const uint64_t now = std::min(step, bytes - done);
        if (mode == Preallocation::kFalloc) {
            CO_CHECK(co_await reserve(offset + done, now));
        } else {
            CO_CHECK(co_await write(offset + done, zeroes.span().first(now), "preallocated space"));
        }
        done += now;
        if (progress && !progress(done, bytes)) co_return fail(ErrorKind::kCancelled, "cancelled");
        co_await yield_turn();
    }
    co_return Result<>();
}

Task<Result<>> CreateTarget::reserve(uint64_t offset, uint64_t bytes) {
    // Without kMayUnmap the range is allocated afterwards.
    return write_zeroes(offset, bytes, WriteFlags::kNone, "preallocated space");
}

}  // namespace gantry::block
