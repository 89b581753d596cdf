#include "block/protocols/null.h"

#include <algorithm>

#include "runtime/timer.h"

namespace gantry::block {

namespace {

constexpr uint64_t kDefaultSize = uint64_t{1} << 30;

/// Any loop; without state. The two drivers differ in name alone: a delay is a timer of the request's loop in both.
class NullNode final : public Node {
  public:
    NullNode(std::string_view driver, const OpenContext& context)
        : Node(driver, context.node_name(), context.flags()),
          latency_(context.options().integer("latency-ns")),
          read_zeroes_(context.options().flag("read-zeroes")) {
        set_size(context.options().size("size", kDefaultSize));
        limits_.supports_fua = true;
        limits_.supports_zeroes = true;
        allow_fast_paths(latency_.count() == 0, latency_.count() == 0);
    }

    // What nobody wrote must not be what the last user of the memory left there: reads fill it, read-zeroes or not.
    Task<Result<>> do_read(Request&, uint64_t, IoVec iov) override {
        if (latency_.count() != 0) co_await sleep_for(latency_);
        fill_iovec(iov, 0, iov.bytes);
        co_return Result<>();
    }
    Task<Result<>> do_write(Request&, uint64_t, IoVec, WriteFlags) override { return delayed(); }
    Task<Result<>> do_write_zeroes(Request&, uint64_t, uint64_t, WriteFlags) override { return delayed(); }
    Task<Result<>> do_discard(Request&, uint64_t, uint64_t) override { return delayed(); }
    Task<Result<>> do_flush(Request&) override { return delayed(); }

    Task<Result<BlockStatus>> do_block_status(Request&, uint64_t offset, uint64_t length) override {
        BlockStatus status;
        status.length = length;
        status.data = !read_zeroes_;
        status.zero = read_zeroes_;
        status.allocated = true;
        status.depth = 1;
        status.file = this;
        status.host_offset = offset;
        status.has_offset = true;
        co_return status;
    }

    int do_try_read(Request&, uint64_t, const IoVec& iov) override {
        fill_iovec(iov, 0, iov.bytes);
        return 0;
    }
    int do_try_write(Request&, uint64_t, const IoVec&, WriteFlags) override { return 0; }

    std::string filename() const override {
        const bool plain = std::ranges::all_of(
            options(), [](const auto& member) { return member.key() != "size" && member.key() != "read-zeroes"; });
        return plain ? fmt::format("{}://", driver()) : Node::filename();
    }
    Task<Result<ImageInfo>> image_info() override {
        ImageInfo info;
        info.virtual_size = size();
        info.actual_size = 0;
        co_return info;
    }

  private:
    Task<Result<>> delayed() {
        if (latency_.count() != 0) co_await sleep_for(latency_);
        co_return Result<>();
    }

    const std::chrono::nanoseconds latency_;
    const bool read_zeroes_;
};

Task<Result<std::shared_ptr<Node>>> open_null(std::string_view driver, OpenContext& context) {
    if (context.options().integer("latency-ns") < 0) co_return fail(ErrorKind::kInvalid, "latency-ns is invalid");
    if (context.options().integer("size") < 0)
        co_return fail(ErrorKind::kInvalid, "Parameter 'size' expects a >0 size");
    co_return std::make_shared<NullNode>(driver, context);
}

Task<Result<std::shared_ptr<Node>>> open_null_co(OpenContext& context) { return open_null("null-co", context); }
Task<Result<std::shared_ptr<Node>>> open_null_aio(OpenContext& context) { return open_null("null-aio", context); }

}  // namespace

constinit const Driver kNullCoDriver{.name = "null-co", .open = open_null_co, .is_protocol = true};
constinit const Driver kNullAioDriver{.name = "null-aio", .open = open_null_aio, .is_protocol = true};

}  // namespace gantry::block
